"""Train a run in several lives: each but the last ends by SIGKILL, at a step or a moment that chance decides.

    python -m tests.trainer.lives SEED LIVES RUN SETTINGS_JSON

Each life is a fork of this process, which has imported everything and computed nothing.
"""

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch

from trainer.fit import Watcher, fit, resume
from trainer.loop import Step
from trainer.run_directory import RunDirectory
from trainer.settings import CONFIG_FILE, Settings


def live(run: Path, settings: Settings, kill_at: int | None, kill_after: float | None) -> None:
    """From the start or from where the last life ended, until killed or done."""
    torch.set_num_threads(1)

    def on_step(step: Step) -> None:
        if step.index + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_after is not None:
        timer = threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    watcher = Watcher(on_step=on_step)
    if (run / CONFIG_FILE).is_file() and (run / "run.json").is_file():
        resume(run, watcher)
    else:
        fit(settings, run, watcher)


def main() -> None:
    seed, lives, run = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    settings = Settings.from_mapping(json.loads(sys.argv[4]))
    chance = random.Random(seed)
    ends = []
    for life in range(lives):
        is_last = life == lives - 1
        kill_at = None if is_last or life % 2 else chance.randint(2, 9) + 4 * life
        kill_after = None if is_last or life % 2 == 0 else chance.uniform(0.02, 0.5)
        pid = os.fork()
        if pid == 0:
            live(run, settings, kill_at, kill_after)
            sys.stdout.flush()
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if ends[-1] != -signal.SIGKILL:
            break
    if ends[-1] != 0:
        sys.exit(f"a life ended with {ends[-1]}")
    progress = RunDirectory(run).checkpoints().load(RunDirectory(run).checkpoints().steps()[-1]).state
    print(json.dumps({"ends": ends, "state": progress}))


if __name__ == "__main__":
    main()
