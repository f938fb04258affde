"""The CUDA kernels compile for every target, without a GPU, and keep what they work on in registers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from turboquant_core.kernels import cuda_kernel
from turboquant_core.kernels.cuda_kernel import KernelError, compile_source
from turboquant_core.kernels.decode_shape import DecodeShape, fit_device, kernel_constants

pytest.importorskip("cuda.bindings.nvrtc")

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_120a")
SHAPES = [
    # dims of keys and values, their bits, group size
    (128, 128, 4, 4, 4),
    (128, 128, 4, 3, 4),
    (128, 128, 3, 3, 4),
    (128, 128, 2, 2, 4),
    (128, 128, 8, 8, 4),
    (128, 128, 4, 4, 8),
    (128, 128, 4, 4, 9),
    (128, 128, 4, 4, 16),
    (128, 128, 8, 8, 16),
    (16, 16, 4, 4, 1),
    (64, 64, 4, 4, 1),
    (64, 64, 8, 4, 7),
    (80, 80, 4, 4, 1),
    (96, 96, 4, 2, 3),
    (192, 128, 4, 4, 1),
    (64, 128, 2, 2, 4),
    (16, 256, 8, 2, 1),
    (256, 256, 4, 4, 8),
    (16, 16, 3, 8, 12),
    (128, 128, 16, 16, 4),
    (64, 64, 16, 16, 7),
    (128, 128, 16, 16, 16),
    (256, 256, 16, 16, 2),
]


def shape_of(
    key_dim: int, value_dim: int, key_bits: int, value_bits: int, group_size: int, dtype: torch.dtype
) -> DecodeShape:
    return DecodeShape(key_dim, value_dim, key_bits, value_bits, group_size, 4, 192, dtype)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_kernels_compile_and_do_not_spill(shape: tuple[int, int, int, int, int], arch: str) -> None:
    decode_shape = shape_of(*shape, torch.bfloat16)
    fit = fit_device(decode_shape, int(re.sub(r"\D", "", arch)))
    _, log = compile_source("decode", kernel_constants(decode_shape, fit), arch)
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores"
    spills = {name: int(stores) for name, stores in re.findall(pattern, log, re.DOTALL)}
    assert spills == dict.fromkeys(
        ["prepare", "prepare_many", "decode", "merge_few", "merge", "merge_many"], 0
    )


def test_the_read_kernel_compiles() -> None:
    cubin, _ = compile_source("read", {}, "sm_90a")
    assert cubin.startswith(b"\x7fELF")


def test_an_error_in_a_source_is_told_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.cu").write_text("no kernel")
    monkeypatch.setattr(cuda_kernel, "_FOLDER", tmp_path)
    with pytest.raises(KernelError, match=r"broken\.cu does not compile for sm_90a[\s\S]*error"):
        compile_source("broken", {}, "sm_90a")


def test_a_compiled_kernel_is_found_again_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda_kernel._cached_cubin.cache_clear()
    first = cuda_kernel._cached_cubin("read", (), "sm_90a")
    [file] = (tmp_path / "turboquant" / "kernels").iterdir()
    assert file.read_bytes().endswith(first)
    monkeypatch.setattr(cuda_kernel, "compile_source", None)
    cuda_kernel._cached_cubin.cache_clear()
    assert cuda_kernel._cached_cubin("read", (), "sm_90a") == first
    cuda_kernel._cached_cubin.cache_clear()


@pytest.mark.parametrize("kept_share", [0, 0.5, 0.99])
def test_a_kept_kernel_that_is_cut_off_or_changed_is_made_again(
    kept_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda_kernel._cached_cubin.cache_clear()
    first = cuda_kernel._cached_cubin("read", (), "sm_90a")
    [file] = (tmp_path / "turboquant" / "kernels").iterdir()
    whole = file.read_bytes()
    cut = int(kept_share * len(whole))
    for broken in (whole[:cut], whole[:cut] + bytes(len(whole) - cut)):
        file.write_bytes(broken)
        cuda_kernel._cached_cubin.cache_clear()
        assert cuda_kernel._cached_cubin("read", (), "sm_90a") == first
        assert file.read_bytes() == whole
    cuda_kernel._cached_cubin.cache_clear()


def test_a_folder_that_cannot_be_written_to_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "turboquant").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda_kernel._cached_cubin.cache_clear()
    assert cuda_kernel._cached_cubin("read", (), "sm_90a").startswith(b"\x7fELF")
    cuda_kernel._cached_cubin.cache_clear()


@pytest.mark.parametrize(
    ("change", "is_supported"),
    [
        ({}, True),
        ({"key_dim": 72}, False),
        ({"value_dim": 272}, False),
        ({"group_size": 17}, False),
        ({"group_size": 9, "key_dim": 256}, False),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, True),
    ],
)
def test_shapes_without_a_kernel_are_told_apart(change: dict[str, object], is_supported: bool) -> None:
    fields: dict[str, object] = {
        "key_dim": 128,
        "value_dim": 128,
        "key_bits": 4,
        "value_bits": 4,
        "group_size": 4,
        "num_sinks": 4,
        "ring_size": 192,
        "dtype": torch.bfloat16,
    }
    assert DecodeShape(**(fields | change)).is_supported is is_supported  # type: ignore[arg-type]
