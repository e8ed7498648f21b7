"""Generation through the socket against transformers and PEFT: tokens, log-probabilities, text, where it stops."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lorikeet.v1 import common_pb2, inference_pb2, server_pb2
from tests.integration.conftest import World
from tests.support.client import Answer, Client, generation
from tests.support.peft_model import ADAPTERS
from tests.support.tiny_base import MAX_MODEL_LEN

LENGTH, STOP = common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP
EVERYONE = [None, *ADAPTERS]


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Tokenizer:
    return Tokenizer.from_file(str(world.base.path / "tokenizer.json"))


def prompt_of(index: int) -> list[int]:
    """Prompts of different lengths, some longer than a page of the KV cache."""
    return [2 + (7 * index + 13 * i) % 300 for i in range(3 + 5 * (index % 7))]


def test_a_batch_of_adapters_and_base_rows_is_token_exact(client: Client, world: World) -> None:
    """16 requests over 8 adapters of ranks 4 to 64 and 4 of the base, at once, each as transformers and PEFT alone."""
    requests = [(prompt_of(i), adapter) for i, adapter in enumerate([*ADAPTERS, *ADAPTERS, *[None] * 4])]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda r: client.stream(generation(r[0], r[1] or "", 32)), requests))
    for (prompt, adapter), answer in zip(requests, answers, strict=True):
        assert answer.token_ids == world.oracle.greedy(prompt, 32, adapter), adapter
        assert answer.digests == {world.store.resolve(adapter).digest if adapter else ""}
        assert answer.last is not None
        assert answer.last.finish_reason == LENGTH
        assert answer.last.usage.prompt_tokens == len(prompt)
        assert answer.last.usage.completion_tokens == 32


def test_every_adapter_changes_the_answer(client: Client) -> None:
    """Or the test above would show nothing."""
    answers = {tuple(client.generate(generation([5, 6, 7], adapter or "")).token_ids) for adapter in EVERYONE}
    assert len(answers) == len(EVERYONE)


def test_a_prompt_longer_than_a_step_is_token_exact(client: Client, world: World) -> None:
    prompt = [2 + (i * i) % 350 for i in range(1100)]
    limits = client.server.GetServerInfo(server_pb2.GetServerInfoRequest()).limits
    assert limits.max_batch_tokens < len(prompt)
    assert limits.max_model_len == MAX_MODEL_LEN
    for adapter in (None, "rank-24-patterns"):
        answer = client.generate(generation(prompt, adapter or "", 12))
        assert list(answer.token_ids) == world.oracle.greedy(prompt, 12, adapter)


def test_the_prefix_cache_belongs_to_one_adapter(client: Client, world: World) -> None:
    prompt = [3 + (i * 11) % 200 for i in range(200)]
    expected = {adapter: world.oracle.greedy(prompt, 8, adapter) for adapter in (None, "rank-4", "rank-64")}
    for repetition in range(2):
        for adapter, tokens in expected.items():
            answer = client.generate(generation(prompt, adapter or "", 8))
            assert list(answer.token_ids) == tokens
            assert (answer.usage.cached_prompt_tokens > 0) == (repetition > 0)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(client: Client) -> None:
    kinds = [{}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.02}, {"repetition_penalty": 1.3, "frequency_penalty": 0.4}]
    requests = [
        generation(prompt_of(i), adapter or "", 24, temperature=0.9, seed=100 + i, **kinds[i % len(kinds)])
        for i, adapter in enumerate([*EVERYONE, *EVERYONE])
    ]
    alone = [list(client.generate(request).token_ids) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = [answer.token_ids for answer in pool.map(client.stream, requests)]
    assert together == alone
    reseeded = [request | {"sampling": _reseeded(request["sampling"])} for request in requests]
    assert all(list(client.generate(r).token_ids) != tokens for r, tokens in zip(reseeded, alone, strict=True))


def _reseeded(sampling: common_pb2.Sampling) -> common_pb2.Sampling:
    changed = common_pb2.Sampling()
    changed.CopyFrom(sampling)
    changed.seed += 1000
    return changed


@pytest.mark.parametrize("adapter", [None, "rank-16-rslora"])
def test_logprobs_are_those_of_transformers(client: Client, world: World, adapter: str | None) -> None:
    """Also under a temperature, which changes the draw and not the log-probabilities."""
    prompt = prompt_of(3)
    sampled = generation(prompt, adapter or "", 10, temperature=1.5, top_p=0.9, seed=3, logprobs=5)
    for fields in (generation(prompt, adapter or "", 10, logprobs=5), sampled):
        answer = client.generate(fields)
        tokens = list(answer.token_ids)
        expected = world.oracle.logits(prompt + tokens, adapter).log_softmax(-1)[len(prompt) - 1 : -1]
        assert len(answer.logprobs) == len(tokens)
        for i, position in enumerate(answer.logprobs):
            assert position.drawn.token_id == tokens[i]
            assert position.drawn.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-4)
            top = expected[i].topk(5)
            assert [entry.token_id for entry in position.top] == top.indices.tolist()
            torch.testing.assert_close(
                torch.tensor([entry.logprob for entry in position.top]), top.values, rtol=0, atol=1e-4
            )
    assert len(client.generate(generation(prompt, "", 3)).logprobs) == 0
    drawn_only = client.generate(generation(prompt, "", 3, logprobs=0)).logprobs
    assert [len(position.top) for position in drawn_only] == [0, 0, 0]


def test_text_is_whole_characters_and_all_of_them(client: Client, tokenizer: Tokenizer) -> None:
    """Random weights make many tokens that are parts of characters, and bytes that are none at all."""
    for adapter in EVERYONE:
        answer = client.stream(generation(prompt_of(1), adapter or "", 120))
        assert answer.text == tokenizer.decode(answer.token_ids)
        assert client.generate(generation(prompt_of(1), adapter or "", 120)).text == answer.text


def test_text_and_chat_prompts_are_tokenized_as_by_transformers(client: Client, world: World) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(world.base.path)
    text = "The parrot answers: été 漢字 👍🏽"
    expected = world.oracle.greedy(reference(text).input_ids, 12, "rank-8")
    assert list(client.generate(generation(text, "rank-8", 12)).token_ids) == expected
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    ids = reference.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    fields = generation([0], "rank-8", 12)
    del fields["token_ids"]
    fields["messages"] = common_pb2.Chat(messages=[common_pb2.ChatMessage(**turn) for turn in turns])
    answer = client.generate(fields)
    assert list(answer.token_ids) == world.oracle.greedy(ids, 12, "rank-8")
    assert answer.usage.prompt_tokens == len(ids)


def spanning_stop(tokenizer: Tokenizer, tokens: list[int]) -> tuple[str, int]:
    """A string that first appears where two tokens meet, and where in the text it does."""
    text = tokenizer.decode(tokens)
    for i in range(4, len(tokens) - 4):
        left, right = tokenizer.decode([tokens[i]]), tokenizer.decode([tokens[i + 1]])
        start = len(tokenizer.decode(tokens[: i + 1])) - 1
        stop = left[-1:] + right[:1]
        if stop.isascii() and stop.isprintable() and len(stop) == 2 and text.find(stop) == start:
            return stop, start
    raise AssertionError("no two tokens of this answer meet in a string of their own")


@pytest.mark.parametrize("adapter", [None, "rank-8", "rank-32-last-layer"])
def test_a_stop_string_is_found_across_tokens(client: Client, tokenizer: Tokenizer, adapter: str | None) -> None:
    full = client.generate(generation(prompt_of(2), adapter or "", 100))
    stop, start = spanning_stop(tokenizer, list(full.token_ids))
    for request in (client.stream, client.generate):
        answer = request(generation(prompt_of(2), adapter or "", 100, stop=["never this", stop]))
        assert answer.text == full.text[:start]
        last = answer.last if isinstance(answer, Answer) else answer
        assert last is not None
        assert last.finish_reason == STOP
        assert list(answer.token_ids) == list(full.token_ids)[: len(answer.token_ids)]
        assert last.usage.completion_tokens == len(answer.token_ids) < 100


def test_stop_tokens_and_the_end_token_end_the_answer(client: Client, world: World, tokenizer: Tokenizer) -> None:
    tokens = world.oracle.greedy(prompt_of(4), 40, "rank-8")
    stop_id = next(token for i, token in enumerate(tokens) if i > 5 and token not in tokens[:i])
    end = tokens.index(stop_id) + 1
    answer = client.stream(generation(prompt_of(4), "rank-8", 40, stop_ids=[stop_id]))
    assert answer.token_ids == tokens[:end]
    assert answer.text == tokenizer.decode(tokens[: end - 1])
    assert answer.last is not None
    assert answer.last.finish_reason == STOP
    seeds = (client.generate(generation([9, 9], "", 400, ignore_eos=False, temperature=2.0, seed=s)) for s in range(99))
    ended = next(answer for answer in seeds if answer.finish_reason == STOP)
    assert list(ended.token_ids).index(1) == len(ended.token_ids) - 1
    assert "<|end|>" not in ended.text


def test_without_max_tokens_the_context_is_the_limit(client: Client) -> None:
    prompt = [5] * (MAX_MODEL_LEN - 20)
    answer = client.generate(generation(prompt, "", None))
    assert answer.usage.completion_tokens == 20
    assert answer.finish_reason == LENGTH


def test_a_response_tells_what_served_it_and_how_long_it_took(client: Client, world: World) -> None:
    fields = generation(prompt_of(1), "rank-12", 5) | {"request_id": "mine-1"}
    answer: inference_pb2.GenerateResponse = client.generate(fields)
    assert answer.request_id == "mine-1"
    assert answer.adapter_digest == world.store.resolve("rank-12").digest
    timings = answer.timings
    assert timings.prefill_seconds > 0
    assert timings.decode_seconds > 0
    assert timings.queue_seconds >= timings.adapter_load_seconds >= 0
    assert client.generate(generation([5], "", 1)).request_id != ""
