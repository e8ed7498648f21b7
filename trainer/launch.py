"""Several processes of one command on this machine, by torchrun's own machinery. No torch until they are started."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

FAILED = 1
INTERRUPTED = 130
GRACE = 60  # seconds: from being asked to end until being made to, enough for a step and its checkpoint


def own_rank() -> int:
    """This process's place among those that torchrun started, 0 without it; known before they have met."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """Whether torchrun started this process, with or without others."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `trainer` with `arguments` in so many processes. When one fails, the others are ended.

    Returns 0, or the exit code of one that failed for a reason of its own.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    agent = logging.getLogger("torch.distributed.elastic")  # what is below it has levels of its own
    agent.handlers, agent.propagate = [logging.NullHandler()], False  # the process that failed has said why
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # a machine's own name need not resolve
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=GRACE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "trainer", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > FAILED), FAILED)
    except SignalException:
        return INTERRUPTED
    return 0
