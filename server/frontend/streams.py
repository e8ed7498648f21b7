"""Where the engine's outputs wait for the reader of one request.

Written by the task that reads the engine's socket, which never waits for a reader; read by the one consumer. What
the consumer has not taken is merged: a slow one gets fewer and longer pieces, never a queue of them, so that a
request holds at most its own tokens.
"""

import asyncio
from dataclasses import dataclass

from adapters.errors import LorikeetError
from server.engine.messages import Output, Serving, Timings, TokenLogprob

# The most tokens taken at once: a piece with logprobs has to fit a message.
MAX_PIECE = 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens in order; `finish_reason` is the engine's, with the last of them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None


class Stream:
    """The outputs of one request that are not yet taken. Times are those of the event loop's clock.

    `first_at` and `last_at` are when its first and last tokens came, `unread_since` when the oldest that nobody
    waited for came (None: all is taken).
    """

    __slots__ = (
        "_error",
        "_finish_reason",
        "_logprobs",
        "_token_ids",
        "_waiter",
        "first_at",
        "last_at",
        "num_cached",
        "serving",
        "timings",
        "unread_since",
    )

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._finish_reason: str | None = None
        self._error: LorikeetError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.num_cached = 0
        self.timings: Timings | None = None
        self.serving = Serving.UNMERGED
        self.first_at: float | None = None
        self.last_at = 0.0
        self.unread_since: float | None = None

    def push(self, output: Output, now: float) -> None:
        self._token_ids += output.token_ids
        if output.logprobs is not None:
            self._logprobs = output.logprobs if self._logprobs is None else self._logprobs + output.logprobs
        if output.num_cached is not None:
            self.num_cached = output.num_cached
        if output.timings is not None:
            self.timings, self.serving = output.timings, output.serving
        if output.finish_reason is not None:
            self._finish_reason = output.finish_reason
        if self.first_at is None:
            self.first_at = now
        self.last_at = now
        self._wake(now)

    def fail(self, error: LorikeetError, now: float) -> None:
        """Ends the stream; the consumer gets what is there and then the error."""
        self._error = error
        self._wake(now)

    async def take(self) -> Piece:
        """All that came since the last call, up to MAX_PIECE tokens; waits until there is something. Raises the
        error with which the stream failed."""
        if not self._token_ids and self._finish_reason is None and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self.unread_since = None
        if len(self._token_ids) > MAX_PIECE:
            self.unread_since = asyncio.get_running_loop().time()
            return self._take_some()
        if not self._token_ids and self._error is not None:
            raise self._error
        piece = Piece(self._token_ids, self._logprobs, self._finish_reason)
        self._token_ids, self._logprobs = [], None
        return piece

    def _take_some(self) -> Piece:
        token_ids, self._token_ids = self._token_ids[:MAX_PIECE], self._token_ids[MAX_PIECE:]
        logprobs = None
        if self._logprobs is not None:
            logprobs, self._logprobs = self._logprobs[:MAX_PIECE], self._logprobs[MAX_PIECE:]
        return Piece(token_ids, logprobs, None)

    def _wake(self, now: float) -> None:
        if self._waiter is None:
            if self.unread_since is None:
                self.unread_since = now
        elif not self._waiter.done():
            self._waiter.set_result(None)
