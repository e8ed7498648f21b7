"""ServerService: what is served, on what, within which limits."""

from collections.abc import Mapping

from google.protobuf.message import Message

from lorikeet.v1 import server_pb2
from server.base.resolve import BaseModel
from server.config import ServeConfig
from server.errors import EngineUnavailable
from server.rpc import convert
from server.rpc.backend import Backend
from server.rpc.call import Call, Calls
from server.rpc.handlers import Method

DESCRIPTOR = server_pb2.DESCRIPTOR.services_by_name["ServerService"]


class ServerService:
    """Answers while the server drains, too: `draining` says so."""

    def __init__(self, config: ServeConfig, base: BaseModel, backend: Backend, calls: Calls) -> None:
        self._config = config
        self._base = base
        self._backend = backend
        self._calls = calls

    @property
    def methods(self) -> Mapping[str, Method]:
        return {"GetServerInfo": self.get_server_info}

    async def get_server_info(self, message: server_pb2.GetServerInfoRequest, call: Call) -> Message:
        ready = self._backend.info
        if ready is None:
            raise EngineUnavailable("the base model is still loading", retry_after=1.0)
        merged = self._backend.merged_digest
        return convert.server_info(self._config, self._base, ready, merged, draining=self._calls.draining)
