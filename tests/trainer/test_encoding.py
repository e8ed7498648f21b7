"""What of a row is learned, and which rows are refused."""

import re
from collections.abc import Iterable
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import Completion, Dialogue, Message, Row, Text
from trainer.encoding import Counts, Encoder, Example
from trainer.errors import DataError

END = "</s>"
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# As Qwen 3's: thinking is opened in the last answer only, so a dialogue is no prefix of its continuation.
REWRITING = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# As Mistral's: nothing between prompt and answer, nothing after the end.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}[ {{ m.content }} ]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
DEAF = "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
STRICT = "{{ raise_exception('roles must alternate') }}"


class WordTokenizer:
    """A token a word, mark or white space character, its id the place where it was first seen."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template
        self.vocab: dict[str, int] = {}
        self.eos_token_id = self._id(END)
        environment = jinja2.Environment()
        environment.globals["raise_exception"] = self._raise
        self._template = environment.from_string(template or "")

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        return self._template.render(messages=conversation, **options)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        words = re.findall(r"</?\w+>|\w+|\W", text)
        return [self._id(word) for word in (["<bos>", *words] if add_special_tokens else words)]

    def words(self, ids: Iterable[int]) -> list[str]:
        names = {index: word for word, index in self.vocab.items()}
        return [names[index] for index in ids]

    def _id(self, word: str) -> int:
        return self.vocab.setdefault(word, len(self.vocab))

    @staticmethod
    def _raise(message: str) -> None:
        raise jinja2.TemplateError(message)


def said(tokenizer: WordTokenizer, examples: Iterable[Example]) -> list[str]:
    """Each example as its tokens with a blank between them (and `_` for a blank), the learned ones in capitals."""
    return [
        " ".join(
            (word.upper() if learned else word).replace(" ", "_")
            for word, learned in zip(tokenizer.words(example.ids), example.mask, strict=True)
        )
        for example in examples
    ]


def dialogue(*turns: str, place: str = "rows.jsonl:1", start: int = 0) -> Dialogue:
    messages = tuple(Message(role, content) for role, content in (turn.split(":") for turn in turns))
    return Dialogue(messages, place, start)


def encode(template: str, *turns: str, start: int = 0, completion_only: bool = True) -> list[str]:
    tokenizer = WordTokenizer(template)
    encoder = Encoder(tokenizer, {tokenizer.eos_token_id}, 100, completion_only=completion_only)
    return said(tokenizer, encoder.encode(dialogue(*turns, start=start)))


def test_one_turn_is_learned_with_its_end_and_not_what_the_template_adds() -> None:
    assert encode(CHATML, "user:hi there", "assistant:well met") == [
        "<s> user \n hi _ there </s> \n <s> assistant \n WELL _ MET </S> \n"
    ]


def test_every_assistant_turn_is_learned_in_one_example() -> None:
    (words,) = encode(CHATML, "system:be", "user:a", "assistant:b", "user:c", "assistant:d")
    first = "<s> system \n be </s> \n <s> user \n a </s> \n <s> assistant \n B </S> \n "
    assert words == first + "<s> user \n c </s> \n <s> assistant \n D </S> \n"


def test_a_template_that_rewrites_earlier_turns_gives_an_example_a_turn() -> None:
    assert encode(REWRITING, "user:a", "assistant:b", "user:c", "assistant:d") == [
        "<s> user \n a </s> \n <s> assistant \n <THINK> B </S> \n",
        "<s> user \n a </s> \n <s> assistant \n b </s> \n <s> user \n c </s> \n <s> assistant \n <THINK> D </S> \n",
    ]


def test_a_template_without_a_generation_prompt() -> None:
    assert encode(BARE, "user:a", "assistant:b", "user:c", "assistant:d") == ["[ _ a _ ] _ B </S> [ _ c _ ] _ D </S>"]


def test_a_template_without_an_end_learns_the_whole_turn() -> None:
    assert encode(ENDLESS, "user:a", "assistant:b") == ["user : a \n assistant : B \n"]


def test_an_end_token_inside_the_answer_does_not_cut_it() -> None:
    assert encode(CHATML, "user:a", "assistant:b</s>c")[0].endswith("B </S> C </S> \n")


def test_of_a_prompt_in_messages_nothing_is_learned() -> None:
    (words,) = encode(CHATML, "user:a", "assistant:b", "user:c", "assistant:d", start=3)
    assert words.startswith("<s> user \n a </s> \n <s> assistant \n b </s> \n ")
    assert words.endswith("<s> assistant \n D </S> \n")


def test_everything_is_learned_if_asked_for_but_the_first_token() -> None:
    (words,) = encode(BARE, "user:a", "assistant:b", completion_only=False)
    assert words == "[ _ A _ ] _ B </S>"


def test_plain_rows_end_with_the_end_token() -> None:
    tokenizer = WordTokenizer(None)
    end = tokenizer.eos_token_id

    def words(row: Row, **options: Any) -> list[str]:
        return said(tokenizer, Encoder(tokenizer, {end}, 100, end_id=end, **options).encode(row))

    assert words(Completion("two plus ", "two", "x:1")) == ["<bos> two _ plus _ TWO </S>"]
    assert words(Completion("two plus ", "two", "x:1"), completion_only=False) == ["<bos> TWO _ PLUS _ TWO </S>"]
    assert words(Text("once upon", "x:1")) == ["<bos> ONCE _ UPON </S>"]
    assert words(Text("once</s>", "x:1")) == ["<bos> ONCE </S>"]


ROWS = (dialogue("user:a", "assistant:b"), dialogue("user:" + "a " * 50, "assistant:b", place="rows.jsonl:3"))


def refusal(template: str | None, *rows: Row, **options: Any) -> str:
    tokenizer = WordTokenizer(template)
    with pytest.raises(DataError) as caught:
        list(Encoder(tokenizer, {tokenizer.eos_token_id}, 60, **options).encode_all(rows, Counts()))
    return caught.value.message


def test_what_cannot_be_encoded_is_refused_by_line() -> None:
    assert refusal(CHATML, *ROWS).startswith("rows.jsonl:3: is 111 tokens long; max-length is 60")
    assert "rows.jsonl:1: messages[1]: the chat template does not put the answer" in refusal(DEAF, ROWS[0])
    assert "rows.jsonl:1: the base's chat template refuses it (roles must alternate)" in refusal(STRICT, ROWS[0])
    assert "rows.jsonl:1: the base has no chat template" in refusal(None, ROWS[0])
    assert "rows.jsonl:3: has no token to learn within max-length 60" in refusal(CHATML, *ROWS, too_long="truncate")


def test_what_is_cut_or_left_out_is_counted() -> None:
    tokenizer = WordTokenizer(None)
    rows = [Text("a b c d", "x:1"), Text("a", "x:2"), Completion("a b ", "d e f", "x:3")]

    def counted(how: Any) -> tuple[list[int], Counts]:
        counts = Counts()
        encoder = Encoder(tokenizer, set(), 7, too_long=how)
        return [len(example) for example in encoder.encode_all(rows, counts)], counts

    lengths, counts = counted("truncate")
    assert lengths == [7, 2, 7]
    assert (counts.rows, counts.truncated, counts.dropped, counts.tokens) == (3, 2, 0, 16)
    assert "2 rows truncated" in str(counts)
    lengths, counts = counted("drop")
    assert lengths == [2]
    assert (counts.rows, counts.examples, counts.truncated, counts.dropped) == (3, 1, 0, 2)
    assert "2 rows dropped" in str(counts)


@given(st.lists(st.tuples(st.text("ab \n", min_size=1), st.text("cd \n", min_size=1)), min_size=1, max_size=4))
def test_what_is_learned_is_what_the_assistant_says(turns: list[tuple[str, str]]) -> None:
    tokenizer = WordTokenizer(CHATML)
    messages = tuple(m for asked, said in turns for m in (Message("user", asked), Message("assistant", said)))
    row = Dialogue(messages, "x:1")
    (example,) = Encoder(tokenizer, {tokenizer.eos_token_id}, 10_000).encode(row)
    words = tokenizer.words(example.ids)
    learned = "".join(word for word, mask in zip(words, example.mask, strict=True) if mask)
    assert learned == "".join(said + END for _, said in turns)
    rows = [{"role": message.role, "content": message.content} for message in messages]
    assert "".join(words) == tokenizer.apply_chat_template(rows, add_generation_prompt=False)
