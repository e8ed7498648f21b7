"""Compile a CUDA C++ source with NVRTC, load it, launch its kernel. No nvcc, no headers, no torch extension."""

from collections.abc import Mapping, Sequence
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.base.cache import cache_root
from server.kernels.cuda.cubins import Cubins, Program

Argument = Any  # a tensor, a number or a tensor map


@cache
def is_available(device: torch.device) -> bool:
    """Whether kernels can be compiled and launched there: on a Hopper GPU, with NVIDIA's bindings and NVRTC, which
    torch's CUDA wheels bring."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return False
    try:
        _check(_bindings("nvrtc").nvrtcVersion())
    except (ImportError, RuntimeError):  # bindings without the library itself
        return False
    return True


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel, which may use `shared_bytes` of dynamic shared memory."""

    function: Any
    shared_bytes: int

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Argument],
        types: Sequence[type | None],
        early: bool,
    ) -> None:
        """Enqueue on torch's current stream. `types` are ctypes', one an argument, None for a tensor map; a tensor
        goes as its address.
        `early`: before what precedes it has ended (the kernel waits, by `griddepcontrol.wait`)."""
        driver = _bindings("driver")
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        attributes = [_early_attribute()] if early else []
        config.attrs, config.numAttrs = attributes, len(attributes)
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        _check(driver.cuLaunchKernelEx(config, self.function, (values, tuple(types)), 0))


POINTER, INT, LONG, FLOAT = c_void_p, c_int, c_longlong, c_float


def load(source: str, name: str, macros: Mapping[str, int], shared_bytes: int, device: torch.device) -> Kernel:
    """The kernel `name` of file `source` (beside this one), compiled for `device` now or at an earlier start."""
    driver = _bindings("driver")
    torch.cuda.init()
    with torch.cuda.device(device):
        torch.empty(1, device=device)  # makes the device's context current
        major, minor = torch.cuda.get_device_capability(device)
        cubins = Cubins(cache_root() / "kernels", compile_program)
        binary = cubins.get(read_program(source, macros, f"sm_{major}{minor}a"))
        library = _check(driver.cuModuleLoadData(binary))
        function = _check(driver.cuModuleGetFunction(library, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, limit, shared_bytes))
    return Kernel(function, shared_bytes)


def tensor_map(address: int, shape: tuple[int, int], stride: int, box: tuple[int, int], dtype: torch.dtype) -> Any:
    """Of a matrix of 16-bit numbers, rows `stride` of them apart, for bulk copies of a box of it; a row of the box has
    128 bytes, and its 16-byte pieces lie in shared memory as the tensor cores want them. Past the matrix, zeros are
    copied."""
    driver = _bindings("driver")
    kinds = driver.CUtensorMapDataType
    bfloat16, float16 = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    return _check(
        driver.cuTensorMapEncodeTiled(
            bfloat16 if dtype is torch.bfloat16 else float16,
            2,
            address,
            [driver.cuuint64_t(size) for size in reversed(shape)],
            [driver.cuuint64_t(stride * 2)],
            [driver.cuuint32_t(size) for size in reversed(box)],
            [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def compile_source(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """The machine code of file `source` for an architecture (`sm_90a`), made now."""
    return compile_program(read_program(source, macros, architecture))


def read_program(source: str, macros: Mapping[str, int], architecture: str) -> Program:
    """File `source` (beside this one) with all headers there, for an architecture."""
    folder = Path(__file__).parent
    return Program(
        name=source,
        text=(folder / source).read_bytes(),
        headers=tuple((path.name, path.read_bytes()) for path in sorted(folder.glob("*.cuh"))),
        options=(
            f"--gpu-architecture={architecture}",
            "--std=c++17",
            *(f"-D{key}={value}" for key, value in macros.items()),
        ),
        compiler=_check(_bindings("nvrtc").nvrtcVersion()),
    )


def compile_program(program: Program) -> bytes:
    """Its machine code, by NVRTC."""
    nvrtc = _bindings("nvrtc")
    texts = [text for _, text in program.headers]
    names = [name.encode() for name, _ in program.headers]
    handle = _check(nvrtc.nvrtcCreateProgram(program.text, program.name.encode(), len(names), texts, names))
    options = [option.encode() for option in program.options]
    (result,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(handle))
        _check(nvrtc.nvrtcGetProgramLog(handle, log))
        raise AssertionError(f"{program.name} does not compile: {log.decode()}")
    binary: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(handle))
    _check(nvrtc.nvrtcGetCUBIN(handle, binary))
    _check(nvrtc.nvrtcDestroyProgram(handle))
    return binary


@cache
def _early_attribute() -> Any:
    driver = _bindings("driver")
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    return attribute


def _bindings(name: str) -> Any:
    """Module `name` of cuda.bindings, which has no types, and need not be there where nothing is launched."""
    return import_module(f"cuda.bindings.{name}")


def _check(answer: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returned beside its status, which must be success."""
    status, *values = answer
    assert int(status) == 0, f"CUDA: {status!r}"
    return values[0] if len(values) == 1 else tuple(values)
