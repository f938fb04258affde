"""Launches of Triton kernels that cost the host little: what Triton finds out of arguments is remembered.

Before each launch Triton asks of each argument what it makes other code for: a tensor's type, whether an
address or a number is a multiple of 16, whether a number is 1 or needs 64 bits. That takes longer than the
launch itself, and most launches are alike. Here a launch whose arguments have the same types and numbers as
those of an earlier one gets the kernel that Triton compiled for that. Knows no kernel.
"""
# mypy: disable-error-code="no-untyped-call"
# (Triton's functions)

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_INT32 = range(-(2**31), 2**31)
_type_of = operator.attrgetter("dtype")


def quick_launch(function: Any) -> Any:
    """Decorate what `triton.jit` returns, so that its launches, ``function[grid](...)``, cost little.

    Tensors come first, then numbers, both given by position; constants come last, all given by name. A number
    that is often another one should not be specialized on: launches with each of its values are remembered.
    """
    # The interpreter makes another kind of function.
    return _QuickKernel(function) if isinstance(function, JITFunction) else function


def cdiv(number: int, divisor: int) -> int:
    """Return a quotient, rounded up. Triton's own function, which kernels may call too, takes 2 us."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def _is_watched() -> bool:
    """Return whether somebody has hooks at launches, as profilers have."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


class _Kinds(NamedTuple):
    """Launches whose arguments have the same Python types.

    Attributes:
        num_tensors: How many of the arguments, the first, are tensors.
        address_masks: Bits of each one's address that must be zero.
        is_key: Of each argument, whether it is a number whose value counts.
        is_free: Whether it is an integer of which only the width counts.
        compiled: What launches were compiled as, and their constants in order, by all that counts.
    """

    num_tensors: int
    address_masks: list[int]
    is_key: list[bool]
    is_free: list[bool]
    compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]


class _QuickKernel:
    def __init__(self, function: JITFunction[Any]) -> None:
        self._function = function
        self._kinds: dict[tuple[type, ...], _Kinds] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].get_device()
        if device < 0:  # on no GPU: whoever asks for that wants to see what would be launched
            self._function[grid](*arguments, **constants)
            return
        if device != driver.active.get_current_device():
            with torch.cuda.device(device):
                self._launch(grid, *arguments, **constants)
            return
        types = tuple(map(type, arguments))
        kinds = self._kinds.get(types)
        if kinds is None:
            kinds = self._kinds[types] = self._kinds_of(types)
        num_tensors, address_masks, is_key, is_free, compiled = kinds
        tensors = arguments[:num_tensors]
        addresses = tuple(map(Tensor.data_ptr, tensors))
        if (
            torch.version.hip  # there Triton also asks how large the memory is that a tensor lies in
            or any(map(operator.and_, addresses, address_masks))
            or not all(map(_INT32.__contains__, compress(arguments, is_free)))
            or _is_watched()
        ):
            self._function[grid](*arguments, **constants)
            return
        key = (
            device,
            *map(_type_of, tensors),
            *compress(arguments, is_key),
            *constants,
            *constants.values(),
        )
        known = compiled.get(key)
        if known is None:
            kernel = self._function[grid](*arguments, **constants)
            if kernel is not None:  # as it is where a hook of Triton's forbids to compile
                names = self._function.arg_names[len(arguments) :]
                compiled[key] = kernel, tuple(constants[name] for name in names)
            return
        kernel, ordered = known
        # What Triton itself calls; it takes an address for a tensor, and looks no other up.
        kernel.run(
            *(*grid, 1, 1)[:3],
            driver.active.get_current_stream(device),
            kernel.function,
            kernel.packed_metadata,
            None,
            None,
            None,
            *addresses,
            *arguments[num_tensors:],
            *ordered,
        )

    def _kinds_of(self, types: tuple[type, ...]) -> _Kinds:
        are_tensors = [issubclass(each, Tensor) for each in types]
        num_tensors = sum(are_tensors)
        params = self._function.params[: len(types)]
        assert all(are_tensors[:num_tensors]), "tensors come first"
        assert [param.num for param in self._function.params if not param.is_constexpr] == [
            *range(len(types))
        ], "constants come last and have names"
        is_free = [each is int and param.do_not_specialize for each, param in zip(types, params, strict=True)]
        return _Kinds(
            num_tensors,
            [0 if param.do_not_specialize_on_alignment else 15 for param in params[:num_tensors]],
            [not (is_tensor or free) for is_tensor, free in zip(are_tensors, is_free, strict=True)],
            is_free,
            {},
        )
