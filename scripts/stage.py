"""A stage of an image, as a folder: commands run in it by chroot, in namespaces of their own.

Needs root, and the Linux tools in TOOLS. Knows no Dockerfile and no server.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = ("unshare", "nsenter", "ip")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What unshare starts in the new namespaces, where it becomes the command.
ENTER = """
set -e
root=$1; shift
mount --rbind /dev "$root/dev"
for path in $BINDS; do mount --bind "$path" "$root$path"; done
! [ "$NETWORK" = own ] || ip link set lo up
exec "$@"
"""


@dataclass
class Stage:
    """Hold where a stage's files are and what has been set in it.

    Attributes:
        root: The folder.
        arguments: Of the build.
        variables: Of the environment.
        user: As in ``1000:0``.
        directory: The working directory, in the stage.
        settings: What matters when it runs, by instruction: ``ENTRYPOINT``, ``HEALTHCHECK``.
    """

    root: Path
    arguments: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "0:0"
    directory: str = "/"
    settings: dict[str, str] = field(default_factory=dict)

    def inside(self, path: str) -> Path:
        """Return where a path of the stage, from its working directory on, lies on this machine."""
        return self.root / os.path.join(self.directory, path).lstrip("/")

    def build(self, script: str, variables: Mapping[str, str]) -> int:
        """Run a shell's script with this machine's network, and return its exit status.

        Args:
            script: In sh.
            variables: Beside the stage's own; files and folders that they name are there, too.
        """
        paths = [value for value in variables.values() if value.startswith("/") and Path(value).exists()]
        for path in paths:
            place = self.root / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if Path(path).is_dir():
                place.mkdir(exist_ok=True)
            else:
                place.touch()
        environment = {"BINDS": " ".join(paths), "NETWORK": "shared"}
        command = self.command(["sh", "-c", script], {**self.arguments, **variables})
        return self._unshare(command, environment).wait()

    def start(self, arguments: Sequence[str]) -> Container:
        """Start a command as process 1 with a network of its own, which has no way out."""
        return Container(self, self._unshare(self.command(arguments), {"NETWORK": "own"}, "--net"))

    def command(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> list[str]:
        """Return what runs a command in the stage."""
        assigned = [f"{name}={value}" for name, value in {**(variables or {}), **self.variables}.items()]
        chroot = ["chroot", f"--userspec={self.user}", str(self.root)]
        change = ["sh", "-c", 'cd "$0" && exec "$@"', self.directory]
        return ["env", "-i", *assigned, *chroot, *change, *arguments]

    def _unshare(
        self, command: Sequence[str], environment: Mapping[str, str], *options: str
    ) -> subprocess.Popen[bytes]:
        spaces = ["--mount", f"--mount-proc={self.root}/proc", "--pid", "--fork", "--kill-child", *options]
        arguments = ["unshare", *spaces, "sh", "-c", ENTER, "sh", str(self.root), *command]
        return subprocess.Popen(arguments, env={**os.environ, **environment})


class Container:
    """A command that runs in a stage, and what can be done beside it.

    Args:
        stage: Its files.
        unshare: Has the command as its child.
    """

    def __init__(self, stage: Stage, unshare: subprocess.Popen[bytes]) -> None:
        self._stage = stage
        self._unshare = unshare
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
        while not (found := children.read_text().split()):
            assert unshare.poll() is None, "the container did not start"
            time.sleep(0.01)
        self._pid = int(found[0])

    def execute(self, *arguments: str) -> subprocess.Popen[str]:
        """Start another command, as ``docker exec`` does."""
        spaces = [f"--target={self._pid}", "--mount", "--pid", "--net"]
        command = ["nsenter", *spaces, *self._stage.command(arguments)]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def send(self, signal: int) -> None:
        """Send the command a signal."""
        os.kill(self._pid, signal)

    def wait(self, seconds: float) -> int:
        """Return the exit status."""
        return self._unshare.wait(seconds)

    def kill(self) -> None:
        """End all that runs in it."""
        self._unshare.kill()
        self._unshare.wait()
