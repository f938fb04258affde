"""A real server as a process of its own, started as a user does. Knows nothing of what it is asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120
STOP_SECONDS = 60


@dataclass(frozen=True)
class ServerProcess:
    """A server that answers.

    Attributes:
        process: Its process.
        url: Where it answers.
        log: The file with all that it has printed.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def stop(self) -> int:
        """End it with SIGTERM and return its exit status."""
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)


@contextmanager
def started_server(
    directory: Path,
    variables: Mapping[str, str],
    arguments: Sequence[str] = (),
    start_seconds: float = START_SECONDS,
) -> Iterator[ServerProcess]:
    """Start a server, by default of the bundled model on a free port, and at last kill it if it still runs.

    Args:
        directory: Where the process runs and its log is written.
        variables: Environment variables beside the caller's own.
        arguments: Of the command; a later ``--port`` wins.
        start_seconds: How long it may take to start.

    Raises:
        RuntimeError: It does not start; the message is its log.
    """
    log = directory / "log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TURBOQUANT_")}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "turboquant_server", "--port", "0", *arguments],
            cwd=directory,
            env=inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(variables),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield ServerProcess(process, _wait_for_url(process, log, start_seconds), log)
    finally:
        process.kill()
        process.wait()


@contextmanager
def running_server(directory: Path, variables: Mapping[str, str]) -> Iterator[str]:
    """Start the bundled model on a free port, yield the server's URL, and end it with SIGTERM."""
    with started_server(directory, variables) as server:
        yield server.url
        assert server.stop() == 0, server.log.read_text()


def _wait_for_url(process: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        # Told when the model has been loaded.
        url = re.search(r"^Serving on (https?://\S+)$", log.read_text(), re.MULTILINE)
        if url:
            return url[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text()}")
