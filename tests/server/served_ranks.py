"""The command with two ranks, as processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

ROOT = Path(__file__).parents[2]
START_SECONDS, END_SECONDS, TIMEOUT = 150, 30, 30


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    log: Path
    url: str
    follower: int

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT)

    def wait(self) -> int:
        """Return the exit status, once the follower has ended, too."""
        status = self.process.wait(END_SECONDS)
        deadline = time.monotonic() + END_SECONDS
        while is_alive(self.follower):
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.02)
        return status


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@contextmanager
def served(directory: Path, arguments: Sequence[str], **variables: str) -> Iterator[Server]:
    """Start two ranks as a user does, and leave no process."""
    log = directory / "log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "turboquant_server", "--port", "0", "--kv-cache-memory", "16MiB"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=directory,
            env=environment | {"PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    pids = [process.pid]
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (url := re.search(r"^Serving on (\S+)$", log.read_text(), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        pids += children_of(process.pid)
        [_, follower] = pids
        yield Server(process, log, url[1], follower)
    finally:
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()
