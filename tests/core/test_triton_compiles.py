"""The Triton kernels compile for every target, without a GPU, and fit its memory and its registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
KIB = 1024
# What a program may have; a driver takes 1 KiB of Nvidia's 100, 164 and 228.
SHARED_BYTES = {
    "sm_80": 163 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
# Of a thread. A kernel whose numbers are laid out badly takes thousands.
MAX_STACK_BYTES = 512

Shape = tuple[int, int, int, int, int, str, float | None]
# Dims and bits of keys and of values, query heads of each, dtype, softcap.
COMMON: Shape = (128, 128, 4, 4, 4, "bfloat16", None)
UNEQUAL: Shape = (80, 64, 3, 8, 1, "float16", 30.0)
SMALL: Shape = (16, 24, 8, 2, 7, "float32", None)
WIDE: Shape = (256, 256, 2, 3, 8, "bfloat16", None)
CASES = [
    *((target, COMMON) for target in SHARED_BYTES),
    ("sm_90", UNEQUAL),
    ("sm_120", UNEQUAL),
    ("sm_80", SMALL),
    ("sm_80", WIDE),
    ("sm_90", WIDE),
    ("sm_89", WIDE),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Shape], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/core/triton_offline.py", json.dumps(CASES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("target", "shape"), CASES, ids=str)
def test_kernels_compile_and_fit(
    results: dict[tuple[str, Shape], dict[str, Any]], target: str, shape: Shape
) -> None:
    result = results[target, shape]
    assert result["error"] is None
    assert set(result["kernels"]) == {
        "_encode",
        "_make_plain",
        "_keep",
        "_add",
        "_read",
        "_read_plain",
        "_multiply",
        "attend",
        "_merge",
        "attend_dense",
    }
    for name, usage in result["kernels"].items():
        assert usage["shared"] <= SHARED_BYTES[target], name
        assert usage["stack"] <= MAX_STACK_BYTES, name
