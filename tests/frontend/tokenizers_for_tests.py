"""Tiny tokenizers, trained in a moment: byte-level BPE (GPT-2, Llama 3, Qwen) and sentencepiece-style BPE (Llama 2)."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer

CORPUS = ["the quick brown fox jumps over the lazy dog", "漢字 漢字 👍🏽 👩‍👩‍👧 été", "hello world, hello there"] * 4


def byte_level_tokenizer() -> Tokenizer:
    """Ids 0 and 1 are <|begin|> and <|end|>, 2 is <tool>, added but not special."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=330,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: ▁ for spaces, one at the start, bytes for unknown characters, <s> (id 0) before a text."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<unk>", *fallback], show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:1] * 4, trainer)
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_only_first_special(state, 3))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def words_tokenizer() -> Tokenizer:
    """Whole words, no decoder: text is joined with spaces."""
    words = dict.fromkeys(" ".join(CORPUS).split())
    tokenizer = Tokenizer(WordLevel({"<unk>": 0} | {word: i + 1 for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _only_first_special(state: str, count: int) -> str:
    """The trainer wants the byte tokens as special ones; in a real tokenizer they are ordinary tokens."""
    content = json.loads(state)
    content["added_tokens"] = content["added_tokens"][:count]
    return json.dumps(content)
