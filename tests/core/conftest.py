"""What tests of Triton kernels need where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def loops_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bounds of loops be tensors: NumPy 2.4 makes no integer of an array of one number."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
