"""Runs in several processes each, as torchrun would start them.

    python -m tests.trainer.processes JOBS_JSON

Each process is a fork of this one, which has imported everything and computed nothing. A job is {"run", "size",
"settings"} or {"run", "size", "resume": true}, with "stop" or "fail" a step of the last process: there its user stops
the run, or a fault ends it; "memory" has the bytes that each process finds free. Prints, for each job, its processes'
exit codes and what they said.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import TCPStore

from adapters.errors import LorikeetError
from trainer.fit import Watcher, fit, resume
from trainer.groups import joined
from trainer.loop import Interrupted, Step
from trainer.memory import available_memory as available
from trainer.settings import Settings

STOPPED = 130


def meeting_place() -> tuple[TCPStore, dict[str, str]]:
    """A store of this process, and the environment by which others find it: so torchrun has it, and so nobody can take
    the port before they do."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    return store, address | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def work(job: dict[str, Any], rank: int, said: Path) -> int:
    """One process of a job; its exit code."""
    torch.set_num_threads(1)
    is_last, at = rank == job["size"] - 1, 0  # `at` is the step that was made last

    def on_step(step: Step) -> None:
        nonlocal at
        at = step.index + 1

    def is_stopped() -> bool:
        if is_last and at == job.get("fail"):
            raise LorikeetError("a fault of its own")
        return is_last and at == job.get("stop")

    watcher = Watcher(on_step=on_step, is_stopped=is_stopped)
    run = Path(job["run"])
    memory = job.get("memory")
    try:
        with (
            patch("trainer.prepare.available_memory", lambda device: memory[rank] if memory else available(device)),
            joined("cpu") as group,
        ):
            if job.get("resume"):
                resume(run, watcher, group)
            else:
                fit(Settings.from_mapping(job["settings"]), run, watcher, group=group)
    except Interrupted:
        return STOPPED
    except LorikeetError as error:
        said.write_text(error.message)
        return 1
    return 0


def main() -> None:
    outcomes = []
    for number, job in enumerate(json.loads(sys.argv[1])):
        store, address = meeting_place()
        pids, files = [], [Path(f"{job['run']}.said-{number}-{rank}") for rank in range(job["size"])]
        for rank, said in enumerate(files):
            said.unlink(missing_ok=True)
            if (pid := os.fork()) == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["size"])}
                os.environ |= address
                code = 1
                try:
                    code = work(job, rank, said)
                except Exception:  # noqa: BLE001 (the process boundary)
                    said.write_text(traceback.format_exc())
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        del store
        outcomes.append({"codes": codes, "said": [file.read_text() if file.is_file() else "" for file in files]})
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
