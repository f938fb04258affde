"""A remembered launch is of the kernel that Triton itself would launch, with the same arguments."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from turboquant_core.kernels.triton_launch import cdiv, next_power_of_2, quick_launch


def _kernel(first, second, unaligned, number, other, free, ratio, SIZE: tl.constexpr, SETTING: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


class Call(NamedTuple):
    """One launch: its grid, its arguments by position and by name."""

    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Launched(NamedTuple):
    """What reached a compiled kernel: which it is, where it is launched, and its arguments."""

    key: str
    grid: tuple[int, ...]
    stream: int
    handles: tuple[object, ...]
    arguments: tuple[Any, ...]


class Device:
    """A GPU that launches nothing and remembers what it was to launch."""

    def __init__(self) -> None:
        self.current = 0
        self.launched: list[Launched] = []
        self.num_asked = 0  # launches that Triton itself made

    def function(self) -> Any:
        return JITFunction(_kernel, do_not_specialize=["free"], do_not_specialize_on_alignment=["unaligned"])

    def compile(self, function: Any, key: str, signature: object, device: int, *_: object) -> Any:
        def run(x: int, y: int, z: int, stream: int, handle: str, metadata: str, *rest: Any) -> None:
            addresses = [each.data_ptr() if isinstance(each, Tensor) else each for each in rest[3:]]
            self.launched.append(Launched(key, (x, y, z), stream, (handle, metadata), (*addresses,)))

        def launch_metadata(*_: object) -> None:
            self.num_asked += 1

        kernel = SimpleNamespace(
            run=run,
            function=f"function of {key}",
            packed_metadata="metadata",
            launch_metadata=launch_metadata,
        )
        function.device_caches[device][0][key] = kernel
        return kernel


@pytest.fixture(name="device")
def fixture_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with _device(monkeypatch) as device:
        yield device


@contextlib.contextmanager
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()

    @contextlib.contextmanager
    def use(index: int) -> Iterator[None]:
        before, device.current = device.current, index
        yield
        device.current = before

    monkeypatch.setattr(JITFunction, "_do_compile", lambda *arguments: device.compile(*arguments))
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "device", use)
    active = SimpleNamespace(
        get_current_device=lambda: device.current,
        get_current_stream=lambda index: 100 + index,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", active)
    yield device


def _tensor(dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Return a tensor that begins so many bytes after a multiple of 64."""
    memory = torch.empty(256, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + offset
    return memory[start : start + 64].view(dtype)


def _call(grid: tuple[int, ...] = (2, 3), **changes: Any) -> Call:
    arguments = {
        "first": _tensor(),
        "second": _tensor(),
        "unaligned": _tensor(),
        "number": 32,
        "other": 7,
        "free": 5,
        "ratio": 0.5,
    }
    constants = {"SIZE": 16, "SETTING": (1, 2.5), "num_warps": 4}
    arguments |= {name: changes[name] for name in changes if name in arguments}
    constants |= {name: changes[name] for name in changes if name not in arguments}
    return Call(grid, tuple(arguments.values()), constants)


def _launch(kernel: Any, call: Call) -> None:
    kernel[call.grid](*call.arguments, **call.constants)


INTEGERS = st.sampled_from([0, 1, 2, 16, 48, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63])
NUMBERS = st.one_of(INTEGERS, st.sampled_from([0.0, 1.0, -2.5, True, False, None]))
TENSORS = st.builds(
    _tensor, st.sampled_from([torch.float32, torch.bfloat16, torch.int32]), st.sampled_from([0, 4, 8, 16])
)
CALLS = st.builds(
    _call,
    grid=st.sampled_from([(1,), (4, 2), (4, 2, 3), (0, 2)]),
    first=TENSORS,
    second=TENSORS,
    unaligned=TENSORS,
    number=NUMBERS,
    other=NUMBERS,
    free=NUMBERS,
    ratio=NUMBERS,
    SIZE=st.sampled_from([1, 16, 32, 1.0, True, None]),
    SETTING=st.sampled_from([(), (1, 2), (2, 1), ((1,), 2.0), "a"]),
    num_warps=st.sampled_from([4, 8]),
    num_stages=st.sampled_from([2, 3]),
)


@settings(max_examples=150, deadline=None)
@given(calls=st.lists(CALLS, min_size=2, max_size=6), order=st.lists(st.integers(0, 5), max_size=12))
def test_launches_are_those_of_triton(calls: list[Call], order: list[int]) -> None:
    # Some calls again, and some with tensors and what is not specialized on of another.
    calls += [calls[index % len(calls)] for index in order]
    calls += [
        Call(call.grid, (*other.arguments[:3], *call.arguments[3:5], *other.arguments[5:]), call.constants)
        for call, other in itertools.pairwise(calls)
    ]
    with pytest.MonkeyPatch.context() as monkeypatch, _device(monkeypatch) as device:
        plain, quick = device.function(), quick_launch(device.function())
        for call in calls:
            _launch(plain, call)
            expected = device.launched.pop()
            _launch(quick, call)
            assert device.launched.pop() == expected
            assert not device.launched


@pytest.mark.parametrize(
    "changes",
    [
        {"first": _tensor(offset=16)},
        {"unaligned": _tensor(offset=4)},
        {"free": 16},
        {"free": 2**31 - 1},
        {"grid": (7,)},
    ],
    ids=" ".join,  # not of the numbers, which are what lay in memory
)
def test_what_triton_compiles_nothing_else_for_is_not_asked_again(
    device: Device, changes: dict[str, Any]
) -> None:
    kernel = quick_launch(device.function())
    _launch(kernel, _call())
    _launch(kernel, _call(**changes))
    assert device.num_asked == 1
    assert device.launched[0].key == device.launched[1].key


@pytest.mark.parametrize(
    "changes",
    [
        {"first": _tensor(torch.bfloat16)},
        {"second": _tensor(offset=4)},
        {"number": 33},
        {"number": 32.0},
        {"other": 1},
        {"other": True},
        {"free": 2**31},
        {"free": 5.0},
        {"SIZE": 32},
        {"SETTING": (2.5, 1)},
        {"num_warps": 8},
        {"num_stages": 5},
    ],
    ids=" ".join,  # not of the numbers, which are what lay in memory
)
def test_what_triton_compiles_something_else_for_is_told_apart(
    device: Device, changes: dict[str, Any]
) -> None:
    kernel = quick_launch(device.function())
    for _ in range(2):
        _launch(kernel, _call())
        _launch(kernel, _call(**changes))
    keys = [launched.key for launched in device.launched]
    assert keys[:2] == keys[2:]
    assert keys[0] != keys[1]


def test_constants_in_another_order_are_the_same(device: Device) -> None:
    kernel = quick_launch(device.function())
    call = _call()
    _launch(kernel, call)
    turned = dict(reversed(call.constants.items()))
    for _ in range(2):
        _launch(kernel, Call(call.grid, call.arguments, turned))
    assert device.launched[0] == device.launched[1] == device.launched[2]


def test_a_launch_is_on_the_device_of_its_tensors(device: Device) -> None:
    kernel = quick_launch(device.function())
    for current in (0, 0, 3, 3):
        device.current = current
        _launch(kernel, _call())
        assert device.current == current
    assert [launched.stream for launched in device.launched] == [100] * 4


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_to_launches_hears_of_all(device: Device, name: str) -> None:
    kernel = quick_launch(device.function())
    hook: Callable[..., None] = lambda *_: None  # noqa: E731
    _launch(kernel, _call())
    hooks = getattr(triton.knobs.runtime, name)
    hooks.add(hook)
    _launch(kernel, _call())
    hooks.remove(hook)
    _launch(kernel, _call())
    assert device.num_asked == 2


def test_amd_is_asked_every_time(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kernel = quick_launch(device.function())
    _launch(kernel, _call())
    _launch(kernel, _call())
    assert device.num_asked == 2


def test_what_is_not_compiled_is_not_remembered(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = quick_launch(device.function())
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", lambda *_: None)
        _launch(kernel, _call())
    _launch(kernel, _call())
    assert len(device.launched) == 1


def test_tensors_on_no_gpu_are_left_to_triton(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "get_device", lambda self: -1)
    kernel = quick_launch(device.function())
    _launch(kernel, _call())
    _launch(kernel, _call())
    assert device.num_asked == 2


def test_the_interpreters_functions_stay_what_they_are() -> None:
    function = object()
    assert quick_launch(function) is function


def test_arguments_in_another_order_are_refused(device: Device) -> None:
    kernel, call = quick_launch(device.function()), _call()
    with pytest.raises(AssertionError, match="tensors come first"):
        _launch(kernel, _call(unaligned=5, free=_tensor()))
    with pytest.raises(AssertionError, match="constants come last"):
        kernel[call.grid](*call.arguments, 16, SETTING=())


@given(number=st.integers(1, 2**20), divisor=st.integers(1, 2**12))
def test_sizes_are_rounded_as_by_triton(number: int, divisor: int) -> None:
    assert cdiv(number, divisor) == triton.cdiv(number, divisor)
    assert next_power_of_2(number) == triton.next_power_of_2(number)
