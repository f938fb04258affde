"""Kernel: a CUDA source of this folder, compiled at run time and launched on PyTorch's current stream.

NVRTC compiles, so that no compiler has to be installed; what it makes is kept on disk and found again by a
hash of all that it depends on. Knows nothing of what kernels compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Argument: TypeAlias = "Tensor | int | float | None"

_FOLDER = Path(__file__).parent
_OPTIONS = ("--std=c++17", "--use_fast_math", "--extra-device-vectorization")
_DIGEST_BYTES = 32  # in front of a kept cubin


class KernelError(RuntimeError):
    """CUDA refused to compile, load or launch a kernel."""


def compile_source(name: str, constants: Mapping[str, int], arch: str) -> tuple[bytes, str]:
    """Compile a source of this folder.

    Args:
        name: The file's name without ``.cu``.
        constants: Values of the names that the source leaves open.
        arch: As in ``sm_90a``.

    Returns:
        The cubin, and what the assembler says of registers, stack and spills.

    Raises:
        KernelError: The source has an error; the message is the compiler's.
    """
    from cuda.bindings import nvrtc

    defines = [f"-D{key}={value}" for key, value in constants.items()]
    options = [
        option.encode()
        for option in (*_OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v", *defines)
    ]
    source = _read(name).encode()
    program = _checked(nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), 0, [], []))
    result, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode(errors="replace").rstrip("\0 \n")
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"{name}.cu does not compile for {arch} with {dict(constants)}:\n{text}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin, text


class Kernel:
    """One function of a source, for one device.

    Args:
        source: See `compile_source`.
        name: The function's.
        constants: See `compile_source`.
        device: A CUDA device.
        num_threads: Of a block.
        shared_bytes: Dynamic shared memory of a block.

    Raises:
        KernelError: It does not compile or load.
    """

    def __init__(
        self,
        source: str,
        name: str,
        constants: Mapping[str, int],
        device: torch.device,
        num_threads: int,
        shared_bytes: int = 0,
    ) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._num_threads = num_threads
        self._shared_bytes = shared_bytes
        cubin = _cached_cubin(source, tuple(constants.items()), _arch(device))
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the device's context
            self._library = _checked(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
            self._kernel = _checked(driver.cuLibraryGetKernel(self._library, name.encode()))
            if shared_bytes:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                index = torch.cuda.current_device()
                _checked(
                    driver.cuKernelSetAttribute(attribute, shared_bytes, self._kernel, driver.CUdevice(index))
                )
        self._function = driver.CUfunction(int(self._kernel))
        self._can_overlap = torch.cuda.get_device_capability(device) >= (9, 0)
        self._overlap = driver.CUlaunchAttribute()
        self._overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self._overlap.value.programmaticStreamSerializationAllowed = 1

    def launch(self, grid: Sequence[int], *arguments: Argument, overlaps: bool = False) -> None:
        """Launch on the current stream of the arguments' device.

        Args:
            grid: Number of blocks in up to three dimensions.
            arguments: Tensors are passed as pointers, None as a null pointer, ints as 32 bits and floats as
                float32.
            overlaps: The kernel may start before the one that was launched before it is done: both are
                written for that. Devices before Hopper do not.
        """
        values, types = zip(*map(_converted, arguments), strict=True)
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = self._num_threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        if overlaps and self._can_overlap:
            config.attrs = [self._overlap]
            config.numAttrs = 1
        _checked(self._driver.cuLaunchKernelEx(config, self._function, (values, types), 0))


def _converted(argument: Argument) -> tuple[Any, Any]:
    if isinstance(argument, Tensor):
        return argument.data_ptr(), ctypes.c_void_p
    if argument is None:
        return 0, ctypes.c_void_p
    return argument, ctypes.c_float if isinstance(argument, float) else ctypes.c_int


def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@functools.lru_cache(maxsize=256)
def _cached_cubin(name: str, constants: tuple[tuple[str, int], ...], arch: str) -> bytes:
    from cuda.bindings import nvrtc

    version = _checked(nvrtc.nvrtcVersion())
    key = repr((_read(name), constants, arch, version, _OPTIONS)).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "turboquant" / "kernels"
    path = folder / f"{name}-{hashlib.sha256(key).hexdigest()[:32]}.cubin"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        cubin = kept[_DIGEST_BYTES:]
        if kept[:_DIGEST_BYTES] == hashlib.sha256(cubin).digest():  # else it was cut off or changed
            return cubin
    cubin, _ = compile_source(name, dict(constants), arch)
    with contextlib.suppress(OSError):  # it only has to be compiled again next time
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(file.name, path)
    return cubin


def _read(name: str) -> str:
    """Return a source with the files of this folder that it includes in place."""
    lines = []
    for line in (_FOLDER / f"{name}.cu").read_text().splitlines(keepends=True):
        if line.startswith('#include "'):
            lines.append((_FOLDER / line.split('"')[1]).read_text())
        else:
            lines.append(line)
    return "".join(lines)


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a call gave, or raise."""
    status, *values = result
    if int(status):
        raise KernelError(f"CUDA error {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
