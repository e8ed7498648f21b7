"""For every test: nothing of the user's is read or written, no network, and the same Hypothesis examples in CI."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# One thread a process: tiny models gain nothing from more, and threads waiting for each other crawl on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

# Read once, when the hub's package is imported: by the first test module that does.
os.environ["HF_HUB_OFFLINE"] = "1"

HAS = pytest.StashKey[dict[str, bool]]()
LEFT_OUT = pytest.StashKey[dict[str, int]]()

# What the tests with a marker need; without it they are left out, and counted.
NEEDS = {
    "gpu": "a GPU",
    "prometheus": "Prometheus (scripts/test-tools)",
    "browser": "Chromium (scripts/test-tools)",
    "systemd": "systemd-analyze (scripts/test-tools)",
}

# A busy machine is slow to draw, too.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def _has_gpu() -> bool:
    import torch  # after the number of threads is set

    return torch.cuda.is_available()


HAS_GPU = _has_gpu()
if not HAS_GPU:
    # Triton interprets its kernels; it reads that when it is first imported, by whichever conftest or test.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[HAS] = {
        "gpu": HAS_GPU,
        "prometheus": shutil.which("prometheus") is not None and shutil.which("promtool") is not None,
        "browser": shutil.which("chromium") is not None,
        "systemd": shutil.which("systemd-analyze") is not None and shutil.which("systemd-sysusers") is not None,
    }


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need what is not here, and say how many they are."""
    config.stash[LEFT_OUT] = {}
    for marker, is_here in config.stash[HAS].items():
        left_out = [] if is_here else [item for item in items if item.get_closest_marker(marker)]
        if left_out:
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
            config.stash[LEFT_OUT][marker] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for marker, count in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"{count} tests need {NEEDS[marker]} and were left out (pytest -m {marker})")


@pytest.fixture(autouse=True, scope="session")
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point the user's data directory elsewhere, for this process and all that it starts. The cache stays: what is
    in it is checked by hash, and fetching a base model anew for every run would be rude."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.delenv("LORIKEET_SERVER", raising=False)
        yield


@pytest.fixture
def examples() -> Path:
    """The example datasets."""
    return Path(__file__).parent.parent / "examples"
