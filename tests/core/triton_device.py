"""Where tests of Triton kernels run: on a GPU if there is one, else interpreted; without either, nowhere.

Imported by these tests before any kernel.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from triton import language
from triton.runtime import interpreter

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

if not HAS_GPU and not isinstance(language.sum, interpreter.InterpretedFunction):
    pytest.skip("TRITON_INTERPRET must be set before triton is imported", allow_module_level=True)
