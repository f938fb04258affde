"""Followers: the processes of all ranks but the first, which starts them, leads them and ends with them.

What they are told goes through their standard input. Its end, however it comes, is theirs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch

from turboquant_server.engine.ranks import LOOPBACK, Ranks

# A program that unpickles (rank, size, port, settings) and then has a message for each step.
MODULE = "turboquant_server.follower"
END = b""
END_SECONDS = 10
LAST_WORDS_SECONDS = 2

logger = logging.getLogger(__name__)


class Followers:
    """Start the processes when the first rank joins, so that there are none for what is refused before.

    Args:
        size: Number of ranks, this process included.
        device: Where this one computes.
        settings: What the others are told, besides which rank they are.

    Attributes:
        ranks: For this process to join.
        on_failure: Called, on any thread, before this process ends because another one has.
    """

    def __init__(self, size: int, device: torch.device, settings: object) -> None:
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
        self.ranks = Ranks(0, size, device, port, listener, lambda: self._start(settings, port))
        self.on_failure: Callable[[], None] = _do_nothing
        self._is_ending = False
        self._lock = threading.Lock()
        self._processes: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def send(self, message: bytes) -> None:
        """Send all followers a message that is not empty."""
        for _, pipe in self._processes:
            pipe.send_bytes(message)

    def fail(self) -> None:
        """End this process after its last words: the ranks can no longer compute together."""
        with self._lock:
            if self._is_ending:
                return
            self._is_ending = True
        self.on_failure()
        timer = threading.Timer(LAST_WORDS_SECONDS, self._exit)
        timer.daemon = True
        timer.start()

    def end(self) -> None:
        """End the followers after the step that they are in."""
        with self._lock:
            self._is_ending = True
        self.on_failure = _do_nothing
        gc.collect()  # CUDA graphs have to go before the communication of the ranks that they have captured
        for _, pipe in self._processes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(END)
        # All leave at the same time; one that hangs must not keep this one.
        leaving = threading.Thread(target=self.ranks.leave, name="leave", daemon=True)
        leaving.start()
        leaving.join(END_SECONDS)
        for process, pipe in self._processes:
            if not self.ranks.has_joined:
                process.kill()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            pipe.close()

    def _start(self, settings: object, port: int) -> None:
        size = self.ranks.size
        self._processes += [_start(rank, size, port, settings) for rank in range(1, size)]
        for process, _ in self._processes:
            threading.Thread(target=self._watch, args=(process,), name="watch", daemon=True).start()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self.fail()

    def _exit(self) -> None:
        for rank, (process, _) in enumerate(self._processes, start=1):
            if (status := process.poll()) is not None:
                how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
                logger.critical(
                    "rank %d of %d has ended %s, and the server with it", rank, self.ranks.size, how
                )
                break
        else:
            logger.critical("rank 0 of %d has failed, and the server ends", self.ranks.size)
        os._exit(1)


def _do_nothing() -> None:
    pass


def _start(rank: int, size: int, port: int, settings: object) -> tuple[subprocess.Popen[bytes], Connection]:
    reader, writer = Pipe(duplex=False)
    with reader:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=reader.fileno(),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    with contextlib.suppress(OSError):  # it has ended already, which is noticed elsewhere
        writer.send_bytes(pickle.dumps((rank, size, port, settings)))
    return process, writer
