"""AdapterService: what is published, what of it is in memory, and where labels point."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from google.protobuf.message import Message

from adapters.errors import InvalidAdapterId
from adapters.ids import DEFAULT_LABEL, check_digest, check_label, check_name
from adapters.records import ABSENT
from adapters.versions import Version
from lorikeet.v1 import adapter_pb2
from server.engine.messages import CallProgress, MergeReport
from server.errors import InvalidRequest
from server.frontend.types import OnProgress
from server.rpc import convert
from server.rpc.backend import Backend, Catalog
from server.rpc.call import Call
from server.rpc.handlers import Method

T = TypeVar("T")

DESCRIPTOR = adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"]

Progressing = (
    type[adapter_pb2.StreamLoadAdapterResponse]
    | type[adapter_pb2.StreamUnloadAdapterResponse]
    | type[adapter_pb2.StreamMergeAdapterResponse]
    | type[adapter_pb2.StreamUnmergeAdapterResponse]
)


class AdapterService:
    """Every response tells of an adapter as it is when the call ends."""

    def __init__(self, backend: Backend, catalog: Catalog) -> None:
        self._backend = backend
        self._catalog = catalog

    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "ListAdapters": self.list_adapters,
            "GetAdapter": self.get_adapter,
            "LoadAdapter": self.load_adapter,
            "StreamLoadAdapter": self.stream_load_adapter,
            "UnloadAdapter": self.unload_adapter,
            "StreamUnloadAdapter": self.stream_unload_adapter,
            "PinAdapter": self.pin_adapter,
            "UnpinAdapter": self.unpin_adapter,
            "MergeAdapter": self.merge_adapter,
            "StreamMergeAdapter": self.stream_merge_adapter,
            "UnmergeAdapter": self.unmerge_adapter,
            "StreamUnmergeAdapter": self.stream_unmerge_adapter,
            "MoveAdapterLabel": self.move_adapter_label,
            "RollbackAdapterLabel": self.rollback_adapter_label,
            "DeleteAdapter": self.delete_adapter,
        }

    async def list_adapters(self, message: adapter_pb2.ListAdaptersRequest, call: Call) -> Message:
        entries, token = await self._catalog.list(message.page_size, message.page_token)
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self._adapter(entry.version) for entry in entries], next_page_token=token
        )

    async def get_adapter(self, message: adapter_pb2.GetAdapterRequest, call: Call) -> Message:
        version = await self._catalog.resolve(message.adapter_id)
        return adapter_pb2.GetAdapterResponse(adapter=self._noted(version, call))

    async def load_adapter(self, message: adapter_pb2.LoadAdapterRequest, call: Call) -> Message:
        version = await self._backend.load_adapter(message.adapter_id)
        return adapter_pb2.LoadAdapterResponse(adapter=self._noted(version, call))

    async def stream_load_adapter(self, message: adapter_pb2.StreamLoadAdapterRequest, call: Call) -> None:
        def load(on_progress: OnProgress) -> Awaitable[Version]:
            return self._backend.load_adapter(message.adapter_id, on_progress=on_progress)

        version = await self._stream(load, adapter_pb2.StreamLoadAdapterResponse, call)
        await call.write(adapter_pb2.StreamLoadAdapterResponse(adapter=self._noted(version, call)))

    async def unload_adapter(self, message: adapter_pb2.UnloadAdapterRequest, call: Call) -> Message:
        version = await self._backend.unload_adapter(message.adapter_id, drain=_drains(message.mode))
        return adapter_pb2.UnloadAdapterResponse(adapter=self._noted(version, call))

    async def stream_unload_adapter(self, message: adapter_pb2.StreamUnloadAdapterRequest, call: Call) -> None:
        drain = _drains(message.mode)

        def unload(on_progress: OnProgress) -> Awaitable[Version]:
            return self._backend.unload_adapter(message.adapter_id, drain=drain, on_progress=on_progress)

        version = await self._stream(unload, adapter_pb2.StreamUnloadAdapterResponse, call)
        await call.write(adapter_pb2.StreamUnloadAdapterResponse(adapter=self._noted(version, call)))

    async def pin_adapter(self, message: adapter_pb2.PinAdapterRequest, call: Call) -> Message:
        version = await self._backend.load_adapter(message.adapter_id, pin=True)
        return adapter_pb2.PinAdapterResponse(adapter=self._noted(version, call))

    async def unpin_adapter(self, message: adapter_pb2.UnpinAdapterRequest, call: Call) -> Message:
        version = await self._backend.unpin_adapter(message.adapter_id)
        return adapter_pb2.UnpinAdapterResponse(adapter=self._noted(version, call))

    async def merge_adapter(self, message: adapter_pb2.MergeAdapterRequest, call: Call) -> Message:
        version, report = await self._backend.merge_adapter(message.adapter_id, convert.merge_options(message))
        return adapter_pb2.MergeAdapterResponse(adapter=self._noted(version, call), report=convert.merge_report(report))

    async def stream_merge_adapter(self, message: adapter_pb2.StreamMergeAdapterRequest, call: Call) -> None:
        options = convert.merge_options(message)

        def merge(on_progress: OnProgress) -> Awaitable[tuple[Version, MergeReport | None]]:
            return self._backend.merge_adapter(message.adapter_id, options, on_progress=on_progress)

        version, report = await self._stream(merge, adapter_pb2.StreamMergeAdapterResponse, call)
        last = adapter_pb2.StreamMergeAdapterResponse(
            adapter=self._noted(version, call), report=convert.merge_report(report)
        )
        await call.write(last)

    async def unmerge_adapter(self, message: adapter_pb2.UnmergeAdapterRequest, call: Call) -> Message:
        version = await self._backend.unmerge_adapter(message.adapter_id, convert.merge_options(message))
        return adapter_pb2.UnmergeAdapterResponse(adapter=self._noted(version, call))

    async def stream_unmerge_adapter(self, message: adapter_pb2.StreamUnmergeAdapterRequest, call: Call) -> None:
        options = convert.merge_options(message)

        def unmerge(on_progress: OnProgress) -> Awaitable[Version]:
            return self._backend.unmerge_adapter(message.adapter_id, options, on_progress=on_progress)

        version = await self._stream(unmerge, adapter_pb2.StreamUnmergeAdapterResponse, call)
        await call.write(adapter_pb2.StreamUnmergeAdapterResponse(adapter=self._noted(version, call)))

    async def move_adapter_label(self, message: adapter_pb2.MoveAdapterLabelRequest, call: Call) -> Message:
        version = await self._catalog.move_label(
            _checked("name", check_name, message.name),
            _checked("label", check_label, message.label),
            _checked("digest", check_digest, message.digest),
            _expected(message),
        )
        return adapter_pb2.MoveAdapterLabelResponse(adapter=self._noted(version, call))

    async def rollback_adapter_label(self, message: adapter_pb2.RollbackAdapterLabelRequest, call: Call) -> Message:
        version = await self._catalog.rollback(
            _checked("name", check_name, message.name),
            _checked("label", check_label, message.label or DEFAULT_LABEL),
            _expected(message),
        )
        return adapter_pb2.RollbackAdapterLabelResponse(adapter=self._noted(version, call))

    async def delete_adapter(self, message: adapter_pb2.DeleteAdapterRequest, call: Call) -> Message:
        name = _checked("name", check_name, message.name)
        digest = _checked("digest", check_digest, message.digest) if message.digest else None
        digests = await self._backend.delete_adapter(name, digest, drain=_drains(message.mode))
        call.record.adapter = name
        return adapter_pb2.DeleteAdapterResponse(digests=digests)

    async def _stream(self, work: Callable[[OnProgress], Awaitable[T]], response: Progressing, call: Call) -> T:
        """Sends the progress of `work` as it comes; what it ends with."""
        stages: asyncio.Queue[CallProgress | None] = asyncio.Queue()
        task = asyncio.ensure_future(work(stages.put_nowait))
        task.add_done_callback(lambda done: stages.put_nowait(None))
        try:
            while (progress := await stages.get()) is not None:
                await call.write(response(progress=convert.progress(progress)))
            return await task
        finally:
            task.cancel()
            await asyncio.wait((task,))

    def _noted(self, version: Version, call: Call) -> adapter_pb2.Adapter:
        call.record.adapter, call.record.digest = version.name, version.digest
        return self._adapter(version)

    def _adapter(self, version: Version) -> adapter_pb2.Adapter:
        return convert.adapter(version, self._backend.residency(version.digest))


def _drains(mode: int) -> bool:
    """Raises InvalidRequest for a mode that is not known here: a client newer than this server means something."""
    if mode not in adapter_pb2.UnloadMode.values():
        raise InvalidRequest("mode", f"{mode} is not known")
    return mode == adapter_pb2.UNLOAD_MODE_DRAIN


def _expected(message: adapter_pb2.MoveAdapterLabelRequest | adapter_pb2.RollbackAdapterLabelRequest) -> str | None:
    """Where a label has to be, as the store takes it."""
    if not message.HasField("expected_digest"):
        return None
    digest = message.expected_digest
    return _checked("expected_digest", check_digest, digest) if digest else ABSENT


def _checked(field: str, check: Callable[[str], str], text: str) -> str:
    """Raises InvalidRequest that names the field."""
    try:
        return check(text)
    except InvalidAdapterId as error:
        raise InvalidRequest(field, error.message) from error
