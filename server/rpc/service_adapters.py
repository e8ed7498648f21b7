"""AdapterService: what is published, and what of it is in memory."""

import asyncio
from collections.abc import Mapping

from google.protobuf.message import Message

from adapters.store import Version
from lorikeet.v1 import adapter_pb2
from server.rpc import convert
from server.rpc.backend import Backend, Registry
from server.rpc.call import Call
from server.rpc.handlers import Method

DESCRIPTOR = adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"]

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000


class AdapterService:
    """Reads of the store run in a thread: a slow disk holds up nobody's stream."""

    def __init__(self, backend: Backend, registry: Registry) -> None:
        self._backend = backend
        self._registry = registry

    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "ListAdapters": self.list_adapters,
            "GetAdapter": self.get_adapter,
            "LoadAdapter": self.load_adapter,
            "UnloadAdapter": self.unload_adapter,
        }

    async def list_adapters(self, message: adapter_pb2.ListAdaptersRequest, call: Call) -> Message:
        size = min(message.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        versions, token = await asyncio.to_thread(self._registry.list, size, message.page_token)
        return adapter_pb2.ListAdaptersResponse(adapters=map(self._adapter, versions), next_page_token=token)

    async def get_adapter(self, message: adapter_pb2.GetAdapterRequest, call: Call) -> Message:
        version = await asyncio.to_thread(self._registry.resolve, message.adapter_id)
        call.adapter = version.name
        return adapter_pb2.GetAdapterResponse(adapter=self._adapter(version))

    async def load_adapter(self, message: adapter_pb2.LoadAdapterRequest, call: Call) -> Message:
        version = await self._backend.load_adapter(message.adapter_id)
        call.adapter = version.name
        return adapter_pb2.LoadAdapterResponse(adapter=self._adapter(version))

    async def unload_adapter(self, message: adapter_pb2.UnloadAdapterRequest, call: Call) -> Message:
        version = await self._backend.unload_adapter(message.adapter_id)
        call.adapter = version.name
        return adapter_pb2.UnloadAdapterResponse(adapter=self._adapter(version))

    def _adapter(self, version: Version) -> adapter_pb2.Adapter:
        return convert.adapter(version, self._backend.residency(version.digest))
