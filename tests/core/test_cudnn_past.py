"""cuDNN attends to a long past where that is faster and right; without a GPU something steps in for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from paged_requests import FULL, Engine, Layer, Shape, make_codec, random_tokens
from test_triton_prefill import compute, engine_of
from torch import Tensor
from triton_device import DEVICE, HAS_GPU

from turboquant_core.kernels import cudnn_past, triton_prefill
from turboquant_core.reference import AttentionOptions

pytestmark = [
    pytest.mark.usefixtures("loops_in_the_interpreter"),
    # Of queries that see nothing, in the interpreter only.
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
]


def fake_cudnn(in_base: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function like cuDNN's with logarithms to some base, of which only its own is right."""

    def attend(
        queries: Tensor, keys: Tensor, values: Tensor, *_: object, scale: float
    ) -> tuple[Tensor, Tensor]:
        group = queries.shape[1] // keys.shape[1]
        keys, values = (states.repeat_interleave(group, 1) for states in (keys, values))
        scores = scale * queries @ keys.mT
        return scores.softmax(-1) @ values, scores.logsumexp(-1, keepdim=True) / math.log(in_base)

    return attend


@pytest.mark.skipif(HAS_GPU, reason="where cuDNN is, it is tested itself")
@pytest.mark.parametrize("in_base", [math.e, 2])
@pytest.mark.parametrize("most_numbers", [2**24, 3 * 64 * 2 * 64, 2 * 64 * 2 * 64])
def test_a_long_past_may_be_attended_to_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most_numbers: int, in_base: float
) -> None:
    """And is not, if what comes from there is wrong."""
    monkeypatch.setattr(triton_prefill, "_SCRATCH_NUMBERS", most_numbers)
    monkeypatch.setattr(cudnn_past, "_KEYS", 128)
    monkeypatch.setattr(cudnn_past, "_works", None)
    monkeypatch.setattr(cudnn_past, "_is_taken", lambda *_: True)
    monkeypatch.setattr(cudnn_past, "_attend", fake_cudnn(in_base))
    monkeypatch.setattr(cudnn_past, "_FULL_QUERIES", 128)  # 112 become as many
    shape = Shape(2, 2, 32, 32)
    engine = engine_of(shape, (4, 4))
    compute(engine, engine.open(random_tokens(shape, 500, seed=14), 500), 388, 500, tolerance=1e-5)
    assert cudnn_past._works is (in_base == math.e)
    assert ("its results are wrong" in caplog.text) is (in_base != math.e)


def test_what_happens_to_lie_in_memory_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_past, "_works", None)
    monkeypatch.setattr(cudnn_past, "_attend", fake_cudnn(math.e))
    queries, keys = torch.full((16, 4, 8), 1e30), torch.full((2, 32, 8), torch.nan)
    assert cudnn_past._try(queries, keys, keys, 1.0) is not None
    assert cudnn_past._works


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("num_tokens", "num_attended"),
    [(1024, 4096), (900, 0), (1700, 4096)],  # 1700 become 2048
)
@pytest.mark.parametrize("most_numbers", [2**24, 2**20])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_long_past_is_left_to_cudnn_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, most_numbers: int, has_sinks: bool, num_tokens: int, num_attended: int
) -> None:
    if torch.cuda.get_device_capability()[0] not in cudnn_past._CAPABILITIES:
        pytest.skip("Triton attends to it here")
    monkeypatch.setattr(triton_prefill, "_SCRATCH_NUMBERS", most_numbers)
    attended = []
    attend_past = triton_prefill.attend_past
    monkeypatch.setattr(
        triton_prefill,
        "attend_past",
        lambda *args, **kwargs: attended.append(attend_past(*args, **kwargs)) or attended[-1],
    )
    shape = Shape(2, 2, 64, 64)
    sinks = torch.tensor([-1.0, 3.0, 0.0, 1.0], device=DEVICE) if has_sinks else None
    options = AttentionOptions(0.125, None, sinks)
    layers = [Layer(make_codec((4, 4), shape, torch.bfloat16), FULL, options)]
    engine = Engine(shape, layers, num_slots=5, dtype=torch.bfloat16, device=DEVICE)
    engine.store.uses_kernels = True
    tokens = random_tokens(shape, 6500, seed=13, dtype=torch.bfloat16)
    monkeypatch.setattr(cudnn_past, "_works", None)
    compute(engine, engine.open(tokens, 4612 + num_tokens), 4612, 4612 + num_tokens, tolerance=2**-6)
    assert sum(attended) == num_attended
    assert cudnn_past._works is (True if num_attended else None)
