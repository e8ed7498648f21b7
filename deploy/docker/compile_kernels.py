"""Compile, when an image is built, what would need a compiler when it runs. Needs nvcc, g++, Python's headers; no GPU.

`FLASHINFER_CUDA_ARCH_LIST="8.0 9.0a" python compile_kernels.py` puts FlashInfer's attention kernels where its package
looks first, and the C module through which Triton launches kernels into Triton's cache under $HOME.
"""

import ctypes
import shutil
import tempfile
from itertools import product
from pathlib import Path

import torch
from flashinfer.compilation_context import CompilationContext
from flashinfer.jit import build_jit_specs, env
from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module
from flashinfer.jit.core import JitSpec
from flashinfer.jit.cpp_ext import get_cuda_path

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


def attention_kernels() -> list[JitSpec]:
    """Those that `server.model.flashinfer_attention` may ask for: by head size and number format, and by backend."""
    majors = {major for major, _ in CompilationContext().TARGET_CUDA_ARCHS}
    backends = ("fa2", "fa3") if 9 in majors else ("fa2",)  # FlashAttention 3 is for Hopper
    specs = []
    for size, dtype in product(HEAD_DIMS, DTYPES):
        types = {"dtype_q": dtype, "dtype_kv": dtype, "dtype_o": dtype, "dtype_idx": torch.int32}
        sizes = {"head_dim_qk": size, "head_dim_vo": size}
        plain = {"pos_encoding_mode": 0, "use_sliding_window": False, "use_logits_soft_cap": False}
        specs.append(gen_batch_decode_module(**types, **sizes, **plain))
        for backend in backends:
            specs.append(gen_batch_prefill_module(backend, **types, **sizes, **plain, use_fp16_qk_reduction=False))
    return specs


def compile_attention() -> None:
    """Into the folder of FlashInfer's package for kernels that were compiled ahead."""
    specs = attention_kernels()
    build_jit_specs(specs, verbose=False, skip_prebuilt=False)
    for spec in specs:
        spec.aot_path.parent.mkdir(parents=True)
        shutil.copy(spec.jit_library_path, spec.aot_path)
    shutil.rmtree(env.FLASHINFER_CACHE_DIR)


def compile_launcher() -> None:
    """Triton's module links to the driver's library, which comes with a GPU: here CUDA's stub stands for it."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaUtils

    with tempfile.TemporaryDirectory() as directory:
        stub = Path(directory) / "libcuda.so.1"
        stub.symlink_to(next(Path(get_cuda_path()).rglob("stubs/libcuda.so")))
        knobs.nvidia.libcuda_path = directory
        ctypes.CDLL(str(stub))  # so that it is found when the module is loaded
        CudaUtils()


if __name__ == "__main__":
    compile_launcher()
    compile_attention()
