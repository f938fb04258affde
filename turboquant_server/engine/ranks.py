"""Ranks: the processes among which a model is divided, as one of them sees them.

All run the same engine on the same messages and so compute the same steps together. What could differ among
them, such as the memory that is left or a token that was drawn, is agreed on here. Knows no model, and not
who starts the processes.
"""
# mypy: disable-error-code="attr-defined, no-untyped-call"
# (torch's own names and methods)

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from turboquant_server.engine.grammar import GrammarError
from turboquant_server.load_error import ModelLoadError

# Ranks wait for each other while weights are read, and in a step. While there is none, nothing waits here.
TIMEOUT = timedelta(minutes=30)
# For what they do on their own meanwhile, such as to capture graphs.
MEETING_TIMEOUT = timedelta(minutes=5)
LOOPBACK = "127.0.0.1"

_T = TypeVar("_T")


class Ranks:
    """Let ranks agree; each method is called by all of them, in the same order.

    Args:
        rank: Which of them this process is.
        size: How many there are.
        device: Where this one computes.
        port: Where they find each other, on the loopback interface.
        listener: Listens there; the first rank's.
        start_others: Called before this one waits for them; the first rank's.

    Attributes:
        has_joined: The ranks have found each other.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
        port: int = 0,
        listener: socket.socket | None = None,
        start_others: Callable[[], None] | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.has_joined = False
        self._port = port
        self._listener = listener
        self._start_others = start_others
        self._store: Any = None
        self._num_meetings = 0
        self._num_threads: int | None = None  # those that one rank would have

    def join(self) -> None:
        """Wait until all ranks are there."""
        assert self.device is not None
        if self._start_others is not None:
            self._start_others()
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(self.device)
        else:  # they share the cores
            self._num_threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self._num_threads // self.size))
        # Without it gloo listens on the address of the machine's name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ["LOCAL_RANK"] = str(self.rank)  # by which transformers knows its GPU
        is_first = self._listener is not None
        descriptor = None if self._listener is None else self._listener.detach()
        self._store = dist.TCPStore(
            LOOPBACK, self._port, self.size, is_first, TIMEOUT, False, master_listen_fd=descriptor
        )
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
            device_id=self.device if is_cuda else None,
        )
        self.has_joined = True

    def leave(self) -> None:
        """Undo `join`, or give it up."""
        if self.has_joined:
            dist.destroy_process_group()
        self._store = None
        if self._listener is not None:
            self._listener.close()
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)

    def smallest(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        return int(self._reduce(number, torch.int64, dist.ReduceOp.MIN))

    def largest(self, number: float) -> float:
        """Return the largest of the ranks' numbers; infinity if one is none."""
        number = float("inf") if number != number else number
        return self._reduce(number, torch.float64, dist.ReduceOp.MAX)

    def of_first(self, value: _T) -> _T:
        """Return the first rank's value, a small one that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def any_failure(self, failure: str) -> str:
        """Return why a rank cannot use CUDA graphs, or nothing if all can.

        They meet on the host, as a failure of one may leave others waiting for it on their devices.

        Args:
            failure: Why this one cannot, if so.

        Raises:
            ModelLoadError: Some do not come.
        """
        if self._store is None:
            return failure
        self._num_meetings += 1
        names = [f"failure {self._num_meetings} of {rank}" for rank in range(self.size)]
        self._store.set(names[self.rank], failure)
        try:
            self._store.wait(names, MEETING_TIMEOUT)
        except dist.DistStoreError as error:
            reason = f" ({failure})" if failure else ""
            raise ModelLoadError(
                f"CUDA graphs cannot be captured on all GPUs{reason}; start with --enforce-eager"
            ) from error
        return next(filter(None, (self._store.get(name).decode() for name in names)), "")

    def take_first(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with the first rank's, without waiting for the device, and return it."""
        if self.size > 1 and tensor.numel():
            dist.broadcast(tensor, src=0)
        return tensor

    def check_shared(self, error: Exception) -> None:
        """Raise an error that other ranks may not have: they wait where this one does not come any more."""
        if self.size > 1 and not isinstance(error, GrammarError):
            raise error

    def _reduce(self, number: float, dtype: torch.dtype, operation: Any) -> float:
        if self.size == 1:
            return number
        reduced = torch.tensor(number, dtype=dtype, device=self.device)
        dist.all_reduce(reduced, operation)
        return reduced.item()


ALONE = Ranks()
