"""scripts/: what they install, in which order, and when nothing; Python, pip and nvidia-smi are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Answers for Python, pip and torch from files beside it, and logs what pip is asked to install.
PYTHON = """#!/usr/bin/env bash
state={state}
case "$*" in
    -V) echo "Python 3.12.0" ;;
    "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python"
        cp "$state/server" "${{@: -1}}/bin/turboquant-server" ;;
    "-m pip --version") [ "$0" != python3 ] ;;
    "-m pip"*--report*) cp "$state/report.json" "$7" ;;
    "-m pip"*) echo "${{*:3}}" >>"$state/pip.log"; sleep "$(cat "$state/seconds")"
        case "$*" in *torch==2*|*" torch") cat "$state/torch_build" >"$state/torch" ;; esac ;;
    -c*urllib*) [ -e "$state/index_answers" ] ;;
    -c*importlib.metadata*) cat "$state/torch" ;;
    *) exec {python} "$@" ;;
esac
"""

# Writes line by line, as nvidia-smi may.
NVIDIA_SMI = """#!/bin/sh
while read -r line; do echo "$line"; sleep 0.1; done <{state}/gpus
"""


class Machine:
    """A checkout with our scripts on a machine that is made of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.state, binaries = folder / "a checkout", folder / "state", folder / "bin"
        for path in (self.checkout, self.state, binaries):
            path.mkdir()
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts", ignore=shutil.ignore_patterns("*.py*"))
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        self.put(
            "report.json", '{"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "sympy"}}]}'
        )
        self.put("torch_build", "2.13.0+cpu")
        self.put("seconds", "0")
        self._put_program(self.state / "server", "#!/bin/sh\necho serving $*\n")
        self._put_program(binaries / "python3", PYTHON.format(state=self.state, python=sys.executable))
        self._put_program(binaries / "nvidia-smi", NVIDIA_SMI.format(state=self.state))
        self.environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}

    def put(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        command = [self.checkout / "scripts" / script, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, cwd="/", stdout=pipe, stderr=pipe, text=True)

    def run(self, script: str, *arguments: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments)
        output, messages = process.communicate(timeout=60)
        return process.returncode, output, messages

    def installed(self) -> list[str]:
        """Return what pip was asked to install since the last call, one line per call of pip."""
        log = self.state / "pip.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line for line in lines if "pip>=" not in line]

    @staticmethod
    def _put_program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_serve_installs_a_cpu_torch_first_and_then_the_project_under_its_constraint(machine: Machine) -> None:
    code, output, messages = machine.run("serve", "--port", "8123")
    assert (code, output) == (0, "serving --port 8123\n")
    torch, project = machine.installed()
    assert torch == "install -qq torch==2.13.0"
    assert "--constraint" in project and project.endswith(f"--editable {machine.checkout}")
    assert (machine.checkout / ".venv/constraints.txt").read_text() == "torch==2.13.0+cpu\n"
    assert "does not answer" in messages


def test_the_second_start_installs_nothing_and_says_nothing(machine: Machine) -> None:
    machine.run("serve")
    machine.installed()
    assert machine.run("serve") == (0, "serving\n", "")
    assert machine.installed() == []


def test_a_changed_pyproject_is_installed_again_with_the_torch_that_is_there(machine: Machine) -> None:
    machine.run("serve")
    machine.installed()
    with (machine.checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    machine.run("serve")
    [project] = machine.installed()
    assert "--editable" in project


def test_the_dev_packages_come_after_serve_and_cover_it(machine: Machine) -> None:
    machine.run("serve")
    machine.installed()
    machine.run("test", "--version")
    [project] = machine.installed()
    assert project.endswith("[dev]")
    (machine.checkout / ".venv/installed-serve").unlink()
    machine.run("serve")
    assert machine.installed() == []


def test_pytorchs_own_index_is_preferred_where_it_answers(machine: Machine) -> None:
    machine.put("index_answers", "")
    _, _, messages = machine.run("serve")
    assert machine.installed()[0] == "install -qq --index-url https://download.pytorch.org/whl/cpu torch"
    assert "from PyTorch's CPU index" in messages


def test_without_a_gpu_cuda_libraries_are_never_downloaded(machine: Machine) -> None:
    plan = '{"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "nvidia-cublas"}}]}'
    machine.put("report.json", plan)
    code, _, messages = machine.run("serve")
    assert code == 1 and "no CPU build of torch for Python 3.12.0 is at hand" in messages
    assert machine.installed() == []


def test_with_a_gpu_the_ordinary_torch_and_the_cuda_packages_are_installed(machine: Machine) -> None:
    machine.put("gpus", "GPU 0: NVIDIA H200\nGPU 1: NVIDIA H200\n")
    machine.put("torch_build", "2.13.0")
    _, output, messages = machine.run("serve")
    torch, project = machine.installed()
    assert output == "serving\n" and "an NVIDIA GPU is present" in messages
    assert torch == "install -qq torch" and project.endswith("[cuda]")


def test_two_scripts_at_once_install_once(machine: Machine) -> None:
    machine.put("seconds", "1")
    first = machine.start("serve")
    time.sleep(0.5)
    code, output, messages = machine.run("serve")
    assert (code, output) == (0, "serving\n") and "waiting for another script" in messages
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert len(machine.installed()) == 2


def test_a_python_that_cannot_make_environments_gets_one_sentence(machine: Machine, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "cat", "grep"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    machine._put_program(
        tools / "python3",
        f'#!/bin/bash\ncase "$2" in *ensurepip*) exit 1 ;; esac\nexec {sys.executable} "$@"\n',
    )
    machine.environment["PATH"] = str(tools)
    code, _, messages = machine.run("serve")
    assert code == 1 and "has no venv module; install it" in messages and len(messages.splitlines()) == 1
