"""AdapterService: what is published, and what of it is in memory."""

from collections.abc import Mapping

from google.protobuf.message import Message

from adapters.store import Version
from lorikeet.v1 import adapter_pb2
from server.rpc import convert
from server.rpc.backend import Backend, Registry
from server.rpc.call import Call
from server.rpc.handlers import Method

DESCRIPTOR = adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"]


class AdapterService:
    """Reads the store on the event loop: the registry costs one stat for each adapter it has seen before."""

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
        entries, token = self._registry.list(message.page_size, message.page_token)
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self._adapter(entry.version) for entry in entries], next_page_token=token
        )

    async def get_adapter(self, message: adapter_pb2.GetAdapterRequest, call: Call) -> Message:
        version = self._registry.resolve(message.adapter_id)
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
