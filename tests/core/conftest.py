"""What tests of Triton kernels need where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def loops_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bounds of loops be tensors: NumPy 2.4 makes no integer of an array of one number. And be quicker.

    A fifth of the time is for what each function that a kernel calls makes of triton.language, once again.
    """
    from triton.runtime import interpreter

    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched: set[int] = set()  # by the newest launch, for functions with these globals

    def patch_bounds(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch_language(function)

    def launch_afresh(*args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(*args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_bounds)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
