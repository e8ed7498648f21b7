"""For every test: nothing of the user's is read or written, no network, and the same Hypothesis examples in CI."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# One thread a process: tiny models gain nothing from more, and threads waiting for each other crawl on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True, scope="session")
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point the user's data directory elsewhere, for this process and all that it starts. The cache stays: what is
    in it is checked by hash, and fetching a base model anew for every run would be rude."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.delenv("LORIKEET_SERVER", raising=False)
        yield


@pytest.fixture
def examples() -> Path:
    """The example datasets."""
    return Path(__file__).parent.parent / "examples"
