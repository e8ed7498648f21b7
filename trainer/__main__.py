"""`python -m trainer`, which torchrun and accelerate start."""

import os
import sys

from trainer.cli import main
from trainer.launch import is_launched

if __name__ == "__main__":
    code = main()
    if is_launched():  # at once: while the interpreter is torn down, threads of gloo or NCCL may abort the process, and
        sys.stdout.flush()  # others would notice that this one ends before torchrun does
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
