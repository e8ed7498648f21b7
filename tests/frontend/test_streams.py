"""What waits for a reader: merged, in order, and complete before an error is raised."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.messages import Output, TokenLogprob
from server.errors import ServerBusy
from server.frontend.streams import MAX_PIECE, Stream


def output(tokens: list[int], finish: str | None = None) -> Output:
    return Output("r", tokens, [TokenLogprob(-float(token)) for token in tokens], finish)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=700), min_size=1, max_size=12))
def test_nothing_is_lost_however_late_it_is_read(steps: list[list[int]]) -> None:
    async def test() -> None:
        stream = Stream()
        for i, tokens in enumerate(steps):
            stream.push(output(tokens, "length" if i == len(steps) - 1 else None), now=float(i))
        pieces = [await stream.take()]
        while pieces[-1].finish_reason is None:
            pieces.append(await stream.take())
        taken = [token for piece in pieces for token in piece.token_ids]
        assert taken == [token for tokens in steps for token in tokens]
        assert [entry.logprob for piece in pieces for entry in piece.logprobs or []] == [-float(t) for t in taken]
        assert len(pieces) == max(1, -(-len(taken) // MAX_PIECE))

    asyncio.run(test())


def test_what_is_left_after_a_longest_piece_is_still_unread() -> None:
    async def test() -> None:
        stream = Stream()
        stream.push(output([1] * (MAX_PIECE + 1)), now=0.0)
        await stream.take()
        assert stream.unread_since is not None
        await stream.take()
        assert stream.unread_since is None

    asyncio.run(test())


def test_an_error_comes_after_the_tokens() -> None:
    async def test() -> None:
        stream = Stream()
        stream.push(output([1, 2]), now=0.0)
        stream.fail(ServerBusy("full"), now=0.0)
        assert (await stream.take()).token_ids == [1, 2]
        with pytest.raises(ServerBusy):
            await stream.take()

    asyncio.run(test())


def test_knows_since_when_it_is_not_read() -> None:
    async def test() -> None:
        stream = Stream()
        reader = asyncio.create_task(stream.take())
        await asyncio.sleep(0)
        stream.push(output([1]), now=1.0)
        await reader
        assert stream.unread_since is None
        stream.push(output([2]), now=2.0)
        stream.push(output([3]), now=3.0)
        assert stream.unread_since == 2.0
        assert (await stream.take()).token_ids == [2, 3]
        assert stream.unread_since is None
        assert (stream.first_at, stream.last_at) == (1.0, 3.0)

    asyncio.run(test())
