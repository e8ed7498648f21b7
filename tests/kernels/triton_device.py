"""Where Triton kernels run in tests: on a GPU, or by Triton's interpreter. Import before any kernel."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
