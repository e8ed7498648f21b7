"""The front end against an engine process without a model, over a real socket."""

import asyncio
import threading
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterInUse, AdapterNotFound, InvalidAdapter, LorikeetError, UnsupportedAdapter
from server.engine.messages import SamplingParams
from server.errors import InvalidRequest, ServerBusy, ShuttingDown, StreamStalled
from server.frontend.streams import MAX_PIECE
from server.frontend.tokenizer import Tokenizer
from server.frontend.types import ChatMessage, Usage
from tests.frontend.fake_engine import (
    AT_ONCE,
    ECHO,
    EOS,
    HOLD,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    REFUSE,
    REFUSE_ADAPTER,
    RETRY_AFTER,
    TIMINGS,
    VOCAB_SIZE,
)
from tests.frontend.harness import collect, ids, request, run, started, text, token_text, tokens

EMOJI = "the fox 👩‍👩‍👧 漢字 jumps"


def test_streams_text_tokens_and_a_last_delta_with_the_counts(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            answer = ids(EMOJI)
            deltas = await collect(frontend, request([ECHO, *answer]))
            assert text(deltas) == EMOJI
            assert tokens(deltas) == answer
            assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            last = deltas[-1]
            assert last.finish_reason == "length"
            assert last.usage == Usage(len(answer) + 1, 3, len(answer))
            assert last.timings is not None
            assert (last.timings.queue, last.timings.prefill) == (TIMINGS.queue, TIMINGS.prefill)
            assert {delta.adapter_digest for delta in deltas} == {""}
            assert [call["count"] for call in recorder.named("prompt_tokens")] == [len(answer) + 1]
            assert sum(call["count"] for call in recorder.named("generation_tokens")) == len(answer)
            assert [call["count"] for call in recorder.named("output_tokens")] == [len(answer) - 1]
            assert [call["adapter"] for call in recorder.named("first_token")] == [""]

    run(test())


@pytest.mark.parametrize("opcode", [ECHO, AT_ONCE])
def test_many_streams_keep_their_own_tokens(tmp_path: Path, opcode: int) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            texts = [f"{EMOJI} {i} " * (i % 5 + 1) for i in range(40)]
            answers = [
                collect(frontend, request([opcode, *ids(wanted)], adapter=f"adapter-{i}"))
                for i, wanted in enumerate(texts)
            ]
            for i, deltas in enumerate(await asyncio.gather(*answers)):
                assert text(deltas) == texts[i]
                assert {delta.adapter_digest for delta in deltas} == {f"sha256:adapter-{i}"}

    run(test())


def test_prompts_are_text_tokens_or_messages(tmp_path: Path) -> None:
    """The fake engine answers with the prompt."""

    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            long = "the quick fox " * 250  # encoded in a thread
            for wanted in ("hello", long):
                chat = [ChatMessage("user", wanted[:3]), ChatMessage("assistant", wanted[3:])]
                for prompt in (wanted, ids(wanted), chat):
                    assert text(await collect(frontend, request(prompt))) == wanted

    run(test())


def test_a_slow_reader_gets_fewer_and_longer_deltas(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            answer = ids("the quick fox " * 150)
            asked = request([AT_ONCE, *answer], sampling=SamplingParams(logprobs=1))
            async with aclosing(frontend.generate(asked)) as generation:
                deltas = [await anext(generation)]
                # The engine has sent all by the time it answers a later request.
                await collect(frontend, request([ECHO, *ids("x")]))
                deltas += [delta async for delta in generation]
            assert tokens(deltas) == answer
            assert text(deltas) == "the quick fox " * 150
            assert len(deltas) < 10
            logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
            assert [entry.logprob for entry in logprobs] == [-float(token) for token in answer]

    run(test())


def test_logprobs_are_those_of_the_tokens_of_the_same_delta(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            asked = request([ECHO, *ids(EMOJI)], sampling=SamplingParams(logprobs=2), stop_strings=("never seen",))
            for delta in await collect(frontend, asked):
                assert delta.logprobs is not None
                assert [entry.logprob for entry in delta.logprobs] == [-float(token) for token in delta.token_ids]
                assert all(len(entry.top) == 2 for entry in delta.logprobs)

    run(test())


def test_a_stop_string_ends_the_answer_and_the_sequence(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            answer = ids("the quick brown fox jumps over")
            deltas = await collect(frontend, request([HOLD, *answer], stop_strings=("zzz", "wn f")))
            used = next(n for n in range(len(answer) + 1) if "wn f" in "".join(map(token_text, answer[:n])))
            assert text(deltas) == "the quick bro"
            assert tokens(deltas) == answer[:used]
            assert deltas[-1].finish_reason == "stop"
            assert deltas[-1].usage == Usage(len(answer) + 1, 3, used)
            timings = deltas[-1].timings
            assert timings is not None
            assert (timings.queue, timings.load, timings.prefill) == (TIMINGS.queue, TIMINGS.load, TIMINGS.prefill)
            assert timings.decode > 0
            await recorder.until_cancels(1)

    run(test())


def test_tokens_past_a_stop_string_are_dropped_when_they_come_with_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            answer = ids("abcdefghij" * 3)
            asked = request([AT_ONCE, *answer], stop_strings=("ef",), sampling=SamplingParams(logprobs=0))
            async with aclosing(frontend.generate(asked)) as generation:
                deltas = [await anext(generation)]
                await collect(frontend, request([ECHO, *ids("x")]))
                deltas += [delta async for delta in generation]
            assert text(deltas) == "abcd"
            assert tokens(deltas) == answer[:6]
            assert sum(len(delta.logprobs or []) for delta in deltas) == 6
            assert deltas[-1].usage == Usage(31, 3, 6)

    run(test())


def test_what_looked_like_a_stop_string_is_shown_at_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            deltas = await collect(frontend, request([ECHO, *ids("hello EN")], stop_strings=("END",)))
            assert text(deltas) == "hello EN"
            assert deltas[-1].finish_reason == "length"

    run(test())


def test_a_stop_token_is_the_last_token_and_adds_no_text(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            answer = ids("hello world")
            stop = answer[-1]
            for stop_ids, tail in (((stop,), [stop]), ((), [EOS])):
                deltas = await collect(frontend, request([ECHO, *answer[:-1], *tail, 5], stop_token_ids=stop_ids))
                assert tokens(deltas) == [*answer[:-1], *tail]
                assert text(deltas) == "".join(map(token_text, answer[:-1]))
                assert deltas[-1].finish_reason == "stop"
            deltas = await collect(frontend, request([ECHO, *answer, EOS, *answer], ignore_eos=True))
            assert text(deltas) == "hello worldhello world"
            assert deltas[-1].finish_reason == "length"

    run(test())


def test_an_unfinished_character_is_shown_at_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            lead_byte = ids("ö")[0]
            deltas = await collect(frontend, request([ECHO, *ids("hi"), lead_byte]))
            assert text(deltas) == "hi\ufffd"

    run(test())


def test_closing_the_generator_cancels_in_the_engine(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            for _ in range(20):
                async with aclosing(frontend.generate(request([HOLD, *ids("hello")]))) as generation:
                    await anext(generation)
            await recorder.until_cancels(20)

    run(test())


def test_cancelling_the_reader_cancels_in_the_engine(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            reader = asyncio.create_task(collect(frontend, request([HOLD, *ids("hello")])))
            await recorder.until(lambda: recorder.stats is not None and recorder.stats.num_running == 1)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            await recorder.until_cancels(1)

    run(test())


@pytest.mark.parametrize(
    ("opcode", "kind", "message"),
    [(REFUSE, ServerBusy, "the queue is full"), (REFUSE_ADAPTER, UnsupportedAdapter, "use_dora is not supported")],
)
def test_an_error_of_the_engine_is_raised_as_what_it_was(
    tmp_path: Path, opcode: int, kind: type[LorikeetError], message: str
) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            with pytest.raises(kind, match=message) as caught:
                await collect(frontend, request([opcode, 5]))
            assert caught.value.retry_after == (1.5 if kind is ServerBusy else None)
            assert caught.value.metadata == ({"limit": "8"} if kind is ServerBusy else {})
            assert text(await collect(frontend, request([ECHO, *ids("fine")]))) == "fine"

    run(test())


def test_a_full_queue_refuses_before_the_prompt_is_looked_at(tmp_path: Path) -> None:
    """The engine, which reads what it is sent between two steps, is not asked."""

    async def test() -> None:
        async with started(tmp_path, max_waiting=1) as (frontend, recorder), AsyncExitStack() as streams:
            held = [frontend.generate(request([HOLD, *ids("x")])) for _ in range(MAX_NUM_SEQS + 1)]
            for generation in held:
                await streams.enter_async_context(aclosing(generation))
                await anext(generation)
            for asked in (
                request([ECHO, *ids("no")]),
                request("not even \ud800 encoded"),
                request([REFUSE, 1], "missing"),
            ):
                with pytest.raises(ServerBusy, match="1 requests are waiting, more may not") as caught:
                    await collect(frontend, asked)
                assert caught.value.retry_after == RETRY_AFTER, "as the engine last said"
            assert recorder.stats is not None
            assert recorder.stats.num_running == len(held)
            await held.pop().aclose()
            assert text(await collect(frontend, request([ECHO, *ids("room")]))) == "room"

    run(test())


def test_requests_whose_prompt_is_being_encoded_count(tmp_path: Path) -> None:
    """A burst of long prompts is encoded in threads: none of them is in the engine when the last one comes."""

    async def test() -> None:
        async with started(tmp_path, max_waiting=1) as (frontend, _):
            long = "the quick fox " * 250
            room = MAX_NUM_SEQS + 1
            burst = [collect(frontend, request(long)) for _ in range(room + 10)]
            answers = await asyncio.gather(*burst, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, BaseException)]
            assert [type(error) for error in refused] == [ServerBusy] * 10
            assert all(text(answer) == long for answer in answers if not isinstance(answer, BaseException))
            assert text(await collect(frontend, request(long))) == long

    run(test())


def test_adapters_are_loaded_and_dropped(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            assert frontend.residency("sha256:pirate").fastest == "disk"
            assert (await frontend.load_adapter("pirate")).digest == "sha256:pirate"
            assert frontend.residency("sha256:pirate").fastest == "device"
            async with aclosing(frontend.generate(request([HOLD, *ids("x")], adapter="pirate"))) as generation:
                await anext(generation)
                with pytest.raises(AdapterInUse):
                    await frontend.unload_adapter("pirate")
            await frontend.unload_adapter("pirate")
            assert frontend.residency("sha256:pirate").fastest == "disk"
            assert [call["residency"] for call in recorder.named("first_token")] == ["device"]
            with pytest.raises(InvalidAdapter, match="lora_A has a NaN") as caught:
                await frontend.load_adapter("broken")
            assert caught.value.faults == ("lora_A has a NaN", "lora_B has shape [1, 2]")
            for asked in (frontend.load_adapter("missing"), collect(frontend, request("hi", adapter="missing"))):
                with pytest.raises(AdapterNotFound):
                    await asked

    run(test())


BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("sampling.temperature", {"sampling": SamplingParams(temperature=-0.1)}),
    ("sampling.temperature", {"sampling": SamplingParams(temperature=2.1)}),
    ("sampling.temperature", {"sampling": SamplingParams(temperature=float("nan"))}),
    ("sampling.top_k", {"sampling": SamplingParams(top_k=-1)}),
    ("sampling.top_p", {"sampling": SamplingParams(top_p=0.0)}),
    ("sampling.top_p", {"sampling": SamplingParams(top_p=1.01)}),
    ("sampling.min_p", {"sampling": SamplingParams(min_p=float("inf"))}),
    ("sampling.repetition_penalty", {"sampling": SamplingParams(repetition_penalty=0.0)}),
    ("sampling.presence_penalty", {"sampling": SamplingParams(presence_penalty=-2.5)}),
    ("sampling.frequency_penalty", {"sampling": SamplingParams(frequency_penalty=float("nan"))}),
    ("sampling.seed", {"sampling": SamplingParams(seed=2**63)}),
    ("sampling.logprobs", {"sampling": SamplingParams(logprobs=21)}),
    ("stopping.max_tokens", {"max_tokens": 0}),
    ("stopping.max_tokens", {"max_tokens": MAX_MODEL_LEN}),
    ("stopping.stop_strings", {"stop_strings": ("a",) * 17}),
    ("stopping.stop_strings[1]", {"stop_strings": ("a", "")}),
    ("stopping.stop_strings[0]", {"stop_strings": ("a" * 1001,)}),
    ("stopping.stop_token_ids[1]", {"stop_token_ids": (0, VOCAB_SIZE)}),
    ("stopping.stop_token_ids", {"stop_token_ids": (0,) * (VOCAB_SIZE + 1)}),
    ("text", {"prompt": ""}),
    ("text", {"prompt": "the " * 5000}),
    ("prompt", {"prompt": []}),
    ("token_ids[2]", {"prompt": [0, 1, -1]}),
    ("token_ids[0]", {"prompt": [VOCAB_SIZE]}),
    ("token_ids", {"prompt": [5] * MAX_MODEL_LEN}),
    ("messages", {"prompt": [ChatMessage("user", "a" * 5000)]}),
    ("messages", {"prompt": [ChatMessage("user", "")]}),
]


def test_each_field_out_of_range_is_refused_by_its_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, recorder):
            for field, changes in BAD_FIELDS:
                asked = replace(request([ECHO, 5]), **changes)
                with pytest.raises(InvalidRequest) as caught:
                    await collect(frontend, asked)
                assert caught.value.field == field, changes
            assert recorder.stats is None, "one reached the engine"

    run(test())


@pytest.mark.parametrize("left", [1, 7])
def test_a_prompt_may_take_all_but_one_token_of_the_context(tmp_path: Path, left: int) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            prompt = [ECHO, *[5] * (MAX_MODEL_LEN - left - 1)]
            deltas = await collect(frontend, request(prompt))
            assert deltas[-1].usage == Usage(MAX_MODEL_LEN - left, 3, left)
            assert len(tokens(await collect(frontend, request(prompt, max_tokens=left)))) == left
            with pytest.raises(InvalidRequest, match=f"leave {left} of") as caught:
                await collect(frontend, request(prompt, max_tokens=left + 1))
            assert caught.value.field == "stopping.max_tokens"

    run(test())


def test_a_stream_that_is_not_read_is_ended(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path, stall_timeout=0.05) as (frontend, recorder):
            async with aclosing(frontend.generate(request([HOLD, *[5] * (MAX_PIECE + 10)]))) as generation:
                first = await anext(generation)
                await recorder.until_cancels(1)
                rest: list[str] = []
                with pytest.raises(StreamStalled, match=r"not read for 0\.05 seconds"):
                    rest.extend([delta.text async for delta in generation])
            assert first.finish_reason is None

    run(test())


def test_stop_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            told: list[bool] = []
            frontend.on_ready_change(told.append)
            async with aclosing(frontend.generate(request([ECHO, *ids(EMOJI)]))) as generation:
                deltas = [await anext(generation)]
                stopping = asyncio.create_task(frontend.stop(grace=30))
                await asyncio.sleep(0)
                assert not frontend.ready
                assert told == [False]
                with pytest.raises(ShuttingDown):
                    await collect(frontend, request("hi"))
                with pytest.raises(ShuttingDown):
                    await frontend.load_adapter("pirate")
                deltas += [delta async for delta in generation]
            await stopping
            assert text(deltas) == EMOJI

    run(test())


def test_stop_ends_what_did_not_finish_in_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            reader = asyncio.create_task(collect(frontend, request([HOLD, *ids("hello")])))
            loading = asyncio.create_task(frontend.load_adapter("slow"))
            await asyncio.sleep(0)
            await frontend.stop(grace=0.01)
            for task in (reader, loading):
                with pytest.raises(ShuttingDown) as caught:
                    await task
                assert caught.value.retry_after is not None

    run(test())


def test_what_was_not_yet_submitted_when_the_engine_ended_hears_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt takes longer to encode than the server has left."""
    go_on = threading.Event()

    def encode(self: Tokenizer, text: str, max_tokens: int | None = None) -> list[int]:
        assert go_on.wait(60)
        return ids("hello")

    async def test() -> None:
        async with started(tmp_path) as (frontend, _):
            monkeypatch.setattr(Tokenizer, "encode_text", encode)
            reader = asyncio.create_task(collect(frontend, request("the quick fox " * 250)))
            await asyncio.sleep(0)
            await frontend.stop(grace=0.01)
            go_on.set()
            with pytest.raises(ShuttingDown):
                await reader

    run(test())
