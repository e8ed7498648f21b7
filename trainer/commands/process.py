"""The process that trains, before torch is there."""

import logging
import os
import warnings


def prepare_process() -> None:
    """Before torch loads: threads that sleep while they wait, and no bars or advice of the libraries' own.

    OpenMP's default is to spin between parallel regions. Where anything else runs on the same cores that takes
    several times as long (measured on two busy ones: 9 s of wall time a step against 3).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "torch.utils.flop_counter"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they advise other packages
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of PEFT's calls, not ours
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
