"""How a run looks on the terminal: a bar with loss, speed, memory and time left; elsewhere a line now and then."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.fit import Watcher
    from trainer.loop import Evaluation, Step

GIB = 1 << 30


def note(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def watching(*, quietly: bool = False) -> "Iterator[Watcher]":
    """A watcher that draws, unless `quietly`; Ctrl-C and SIGTERM end the run after its current step, once more at
    once."""
    import signal
    import threading

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from trainer.fit import Watcher, peak_memory

    console = Console(stderr=True)
    started, num_tokens, stopped, is_running = time.perf_counter(), 0, threading.Event(), False
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),  # of "?" steps until the first tells how many there are
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TextColumn("{task.fields[memory]:.1f} GiB"),
        TimeRemainingColumn(),
    )

    def stop(number: int, frame: object) -> None:
        if stopped.is_set() or not is_running:
            raise KeyboardInterrupt
        stopped.set()
        if not quietly:  # by no `print`: what this interrupts may be one that waits for its reader, and would raise
            os.write(2, b"\n" * console.is_terminal + b"stopping after this step; once more to stop at once\n")

    with Progress(*columns, console=console, disable=quietly or not console.is_terminal) as bar:
        task = bar.add_task("training", total=None, loss=float("nan"), speed=0.0, memory=0.0, start=False)

        def on_step(step: "Step") -> None:
            nonlocal started, num_tokens, is_running
            if not is_running:
                is_running, started = True, time.perf_counter() - step.seconds
                bar.start_task(task)
            if quietly:
                return
            num_tokens += step.num_tokens
            done, speed = step.index + 1, num_tokens / (time.perf_counter() - started)
            memory = peak_memory() / GIB
            bar.update(task, completed=done, total=step.num_steps, loss=step.loss, speed=speed, memory=memory)
            if not console.is_terminal and done * 10 // step.num_steps > step.index * 10 // step.num_steps:
                left = (step.num_steps - done) * (time.perf_counter() - started) / done
                line = f"step {done}/{step.num_steps}  loss {step.loss:.3f}  {speed:.0f} tokens/s"
                note(f"{line}  {memory:.1f} GiB  {left:.0f} s left")

        def on_evaluation(evaluation: "Evaluation") -> None:
            best = ", the best so far" if evaluation.is_best else ""
            message = f"evaluation after step {evaluation.step}: loss {evaluation.loss:.4f}{best}"
            bar.console.print(message, highlight=False) if console.is_terminal else note(message)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if quietly:
                yield Watcher(on_step=on_step, is_stopped=stopped.is_set)
            else:
                yield Watcher(note, on_step, on_evaluation, stopped.is_set)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
