"""A real server as a process of its own, for tests that start it as a user does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120
STOP_SECONDS = 60


@contextmanager
def running_server(directory: Path, variables: Mapping[str, str]) -> Iterator[str]:
    """Start the bundled model on a free port, yield the server's URL, and end it with SIGTERM.

    Args:
        directory: Where the process runs and its log is written.
        variables: Environment variables beside the test's own.
    """
    log = directory / "log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TURBOQUANT_")}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "turboquant_server", "--port", "0"],
            cwd=directory,
            env=inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(variables),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _wait_for_url(process, log)
        process.terminate()
        assert process.wait(STOP_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        # Told when the model has been loaded.
        url = re.search(r"^Serving on (http://\S+)$", log.read_text(), re.MULTILINE)
        if url:
            return url[1]
        time.sleep(0.1)
    raise AssertionError(f"the server did not start: {log.read_text()}")
