"""What tests of CUDA graphs have in common."""

from __future__ import annotations

import pytest

from turboquant_server.engine import compiled_forward


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile nothing: compiled code rounds otherwise, and what graphs change is the question."""
    monkeypatch.setattr(compiled_forward, "BACKENDS", {})
