"""Free memory is the system's own figure, less what is left to others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from turboquant_server import memory
from turboquant_server.memory import free_memory


def test_half_of_a_machines_available_memory_may_be_used() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    unused = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    # What is available is more than what is unused, because file caches can be dropped.
    assert 0.4 * unused < free_memory(torch.device("cpu")) <= total / 2


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(torch.device("cpu")) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 2000


def test_nine_tenths_of_a_gpus_free_memory_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert free_memory(torch.device("cuda:0")) == 900
