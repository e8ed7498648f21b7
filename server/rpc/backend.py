"""What the services need of the layers below, so that they can be run on anything that has it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from adapters.registry import AdapterEntry
from adapters.versions import Version
from server.engine.messages import MergeReport, Ready
from server.frontend.types import Delta, GenerateRequest, MergeOptions, OnProgress, Residency


class Backend(Protocol):
    """Generates, and holds adapters; `server.frontend.frontend.Frontend` in a real server.

    Its methods raise LorikeetError for what a user is to hear of: ShuttingDown once `stop` was called,
    EngineUnavailable while there is no engine. `stop` can be called again, to end sooner or for nothing.
    """

    @property
    def info(self) -> Ready | None: ...

    @property
    def merged_digest(self) -> str | None: ...

    @property
    def ready(self) -> bool: ...

    async def start(self) -> None: ...

    async def stop(self, grace: float) -> None: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta]: ...

    async def load_adapter(
        self, adapter_id: str, *, pin: bool = False, on_progress: OnProgress = lambda progress: None
    ) -> Version: ...

    async def unload_adapter(
        self, adapter_id: str, *, drain: bool = False, on_progress: OnProgress = lambda progress: None
    ) -> Version: ...

    async def unpin_adapter(self, adapter_id: str) -> Version: ...

    async def merge_adapter(
        self, adapter_id: str, options: MergeOptions, *, on_progress: OnProgress = lambda progress: None
    ) -> tuple[Version, MergeReport | None]: ...

    async def unmerge_adapter(
        self, adapter_id: str, options: MergeOptions, *, on_progress: OnProgress = lambda progress: None
    ) -> Version: ...

    async def delete_adapter(self, name: str, digest: str | None = None, *, drain: bool = False) -> Sequence[str]: ...

    def on_ready_change(self, callback: Callable[[bool], None]) -> None: ...

    def residency(self, digest: str) -> Residency: ...


class Catalog(Protocol):
    """The published adapters; `server.frontend.catalog.Catalog` in a real server."""

    async def resolve(self, adapter_id: str) -> Version: ...

    async def list(self, page_size: int, page_token: str) -> tuple[Sequence[AdapterEntry], str]: ...

    async def move_label(self, name: str, label: str, digest: str, expected: str | None) -> Version: ...

    async def rollback(self, name: str, label: str, expected: str | None) -> Version: ...
