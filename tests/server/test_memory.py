"""What a server may take is the system's own figure, less what is left to others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from turboquant_server import memory
from turboquant_server.memory import memory_budget, memory_in_use

CPU = torch.device("cpu")
GPU = torch.device("cuda:1")


def gpu(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int = 0, allocated: int = 0) -> None:
    """Pretend that cuda:1 has 1,000 bytes."""

    def on_the_gpu(value: object, device: torch.device) -> object:
        assert device == GPU
        return value

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: on_the_gpu((free, 1000), device))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: on_the_gpu(reserved, device))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: on_the_gpu(allocated, device))


def test_half_of_a_machines_available_memory_may_be_used() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    unused = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    # What is available is more than what is unused, because file caches can be dropped.
    assert 0.4 * unused < memory_budget(CPU) <= total / 2


def test_a_share_of_a_machines_memory_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert memory_budget(CPU) == 500
    assert memory_budget(CPU, utilization=0.9) == 900
    assert memory_budget(CPU, vram_limit=10) == 500


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory_budget(CPU) == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_budget(CPU) > 2000


@pytest.mark.parametrize(
    ("utilization", "vram_limit", "budget"),
    [(None, None, 900), (0.5, None, 500), (1.0, None, 1000), (None, 300, 300), (0.2, 300, 200)],
)
def test_a_share_of_a_whole_gpu_up_to_a_limit_may_be_used(
    monkeypatch: pytest.MonkeyPatch, utilization: float | None, vram_limit: int | None, budget: int
) -> None:
    gpu(monkeypatch, free=1000)
    assert memory_budget(GPU, utilization, vram_limit) == budget
    gpu(monkeypatch, free=400, reserved=600)
    assert memory_budget(GPU, utilization, vram_limit) == budget


def test_what_other_programs_hold_of_a_gpu_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, free=250, reserved=100)
    assert memory_budget(GPU) == 350
    assert memory_budget(GPU, utilization=0.3) == 300
    assert memory_budget(GPU, vram_limit=700) == 350


def test_tensors_count_on_a_gpu_and_are_out_of_a_cpus_budget_already(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, free=250, reserved=100, allocated=80)
    assert memory_in_use(GPU) == 80
    assert memory_in_use(CPU) == 0
