"""For every test: nothing of the user's is read or written, no network, and the same Hypothesis examples in CI."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# One thread a process: tiny models gain nothing from more, and threads waiting for each other crawl on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

HAS_GPU = pytest.StashKey[bool]()
NEED_GPU = pytest.StashKey[int]()

settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, Triton interprets its kernels. It reads that when it is first imported, by whichever test."""
    import torch  # after the number of threads is set

    config.stash[HAS_GPU] = torch.cuda.is_available()
    if not config.stash[HAS_GPU]:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, leave out the tests that need one and say how many they are."""
    if config.stash[HAS_GPU]:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        config.stash[NEED_GPU] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(NEED_GPU, 0):
        terminalreporter.write_line(f"{count} tests need a GPU and were left out (with one: pytest -m gpu)")


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
