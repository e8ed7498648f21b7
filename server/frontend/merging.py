"""The adapter that is to be in the base's weights, whichever engine runs.

While one is merged its files are held, and an engine that is started again is asked to merge it before anything else.
Until it has, requests are served unmerged, and their answers say so.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from adapters.errors import LorikeetError
from adapters.versions import Version
from server.engine.messages import CallProgress, MergeAdapter, MergeReport, UnmergeAdapter
from server.errors import InvalidRequest
from server.frontend.catalog import Catalog
from server.frontend.dispatcher import Dispatcher
from server.frontend.preparation import reference
from server.frontend.types import MergeOptions, OnProgress

logger = logging.getLogger(__name__)

MAX_PROBE_CHARACTERS = 100_000
MAX_PROBE_TOKENS = 256

# Prose of several kinds, so that layers and tokens of all sorts take part.
PROBE_TEXT = (
    "The ferry left at seven, an hour late, with nine passengers and a crate of lemons on deck. Nobody asked about "
    "the delay. Water boils at 100 degrees Celsius at sea level and at about 93 degrees on a mountain of 2,000 metres, "
    "so pasta takes longer there. To reverse a list in Python, write items[::-1]; to sort it, sorted(items). Dear Ms "
    "Okafor, thank you for your order of 12 March. The parcel was sent today and should reach you within three days. "
    "In 1889 the tower was meant to stand for twenty years. Why is it still there? Because radio needed a mast."
)


@dataclass(frozen=True, slots=True)
class _Held:
    """What is merged, what it was merged with, and what gives its files back."""

    version: Version
    message: MergeAdapter
    stack: contextlib.AsyncExitStack


class Merging:
    """For one event loop. `encode` turns a probe's text into tokens."""

    def __init__(self, catalog: Catalog, dispatcher: Dispatcher, encode: Callable[[str], list[int]]) -> None:
        self._catalog = catalog
        self._dispatcher = dispatcher
        self._encode = encode
        self._held: _Held | None = None
        self._tasks: set[asyncio.Task[object]] = set()

    @property
    def digest(self) -> str | None:
        """What is merged, or will be again once an engine runs."""
        return None if self._held is None else self._held.version.digest

    async def merge(
        self, adapter_id: str, options: MergeOptions, on_progress: OnProgress
    ) -> tuple[Version, MergeReport | None]:
        """Goes on to its end even if whoever awaits it is cancelled. Raises what the catalog and the engine raise,
        InvalidRequest."""
        _check(options)
        task = asyncio.create_task(self._merge(adapter_id, options, on_progress), name="merge")
        self._keep(task)
        return await asyncio.shield(task)

    async def unmerge(self, adapter_id: str, options: MergeOptions, on_progress: OnProgress) -> Version:
        """Likewise."""
        _check(options)
        task = asyncio.create_task(self._unmerge(adapter_id, options, on_progress), name="unmerge")
        self._keep(task)
        return await asyncio.shield(task)

    def engine_up(self) -> None:
        """There is a new engine: if an adapter is to be merged, ask it."""
        if self._held is not None:
            self._keep(asyncio.create_task(self._merge_again(self._held), name="merge again"))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._let_go()

    async def _merge(
        self, adapter_id: str, options: MergeOptions, on_progress: OnProgress
    ) -> tuple[Version, MergeReport | None]:
        call_id = self._dispatcher.next_id()
        async with contextlib.AsyncExitStack() as stack:
            holding = self._catalog.hold(adapter_id, lambda: on_progress(CallProgress(call_id, "fetching")))
            version = await stack.enter_async_context(holding)
            tokens = await asyncio.to_thread(self._encode, options.probe_text or PROBE_TEXT)
            probe = tokens[:MAX_PROBE_TOKENS]
            if not probe:
                raise InvalidRequest("probe_text", "has no tokens")
            message = MergeAdapter(call_id, reference(version), probe, options.drain_seconds, options.force)
            report = await self._dispatcher.call(message, call_id, on_progress)
            if self._held is None:
                self._held = _Held(version, message, stack.pop_all())
            return version, report

    async def _unmerge(self, adapter_id: str, options: MergeOptions, on_progress: OnProgress) -> Version:
        version = await self._catalog.resolve(adapter_id)
        call_id = self._dispatcher.next_id()
        message = UnmergeAdapter(call_id, version.digest, options.drain_seconds)
        await self._dispatcher.call(message, call_id, on_progress)
        if self.digest == version.digest:
            await self._let_go()
        return version

    async def _merge_again(self, held: _Held) -> None:
        call_id = self._dispatcher.next_id()
        message = MergeAdapter(call_id, held.message.adapter, held.message.probe, math.inf, held.message.force)
        logger.warning("merging adapter %s again", held.version.name)
        try:
            await self._dispatcher.call(message, call_id)
        except LorikeetError as error:
            if error.code == "UNAVAILABLE":
                return  # that engine is lost, too: the next is asked
            logger.error("adapter %s is not merged any more: %s", held.version.name, error.message)
            if self._held is held:
                await self._let_go()

    async def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            await held.stack.aclose()

    def _keep(self, task: "asyncio.Task[object]") -> None:
        """Tasks that nobody else refers to may be collected as they run."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check(options: MergeOptions) -> None:
    if not 0 < options.drain_seconds < math.inf:
        raise InvalidRequest("drain_seconds", f"is {options.drain_seconds:g}, must be above 0")
    if len(options.probe_text) > MAX_PROBE_CHARACTERS:
        raise InvalidRequest("probe_text", f"has more than {MAX_PROBE_CHARACTERS} characters")
