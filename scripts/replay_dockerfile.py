"""Replay docker/Dockerfile without a container engine, and use the container once.

Each stage begins with Debian's packages, from debootstrap, in place of the base image. Then the server is
started as `docker run` would start it, has to become healthy and to answer, and is stopped while it streams.
Needs root, debootstrap and iproute2. What pip and TLS are told by variables (PIP_*, *_CERT...) holds while
building, too.

    scripts/replay_dockerfile.py FOLDER --build-arg DEVICE=cpu --build-arg BASE=python:3.11-slim-bookworm

The Debian of BASE must have that Python among its packages: bookworm has 3.11, trixie 3.13.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dockerfile import Instruction, expand, parse_dockerfile
from stage import TOOLS, Container, Stage

ROOT = Path(__file__).resolve().parents[1]
HANDED_IN = re.compile(r"PIP_\w+|\w+_CA_BUNDLE|\w+_CERT|SSL_CERT_\w+|\w+_proxy", re.IGNORECASE)
HEALTHY_SECONDS = 180
STOP_SECONDS = 45
# Prints an answer as it comes.
CHAT = """
import sys, urllib.request as u
body = sys.argv[1].encode()
request = u.Request("http://127.0.0.1:8000/v1/chat/completions", body, {"Content-Type": "application/json"})
for line in u.urlopen(request):
    print(line.decode(), end="", flush=True)
"""
QUESTION = "The access code of the harbour is 271828. What is the access code of the harbour?"


class Build:
    """Carry out instructions, one after the other.

    Args:
        folder: Where the stages' files are made.
        arguments: Values of ARGs in place of the Dockerfile's.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, str]) -> None:
        self._folder = folder
        self._given = arguments
        self._before_stages: dict[str, str] = {}
        self._stages: dict[str, Stage] = {}
        self._stage: Stage | None = None

    def run(self, instructions: Sequence[Instruction]) -> Stage:
        """Return the last stage."""
        for instruction in instructions:
            say(" ".join(instruction))
            start = time.monotonic()
            self._carry_out(instruction)
            say(f"    {time.monotonic() - start:.0f} s")
        assert self._stage is not None
        return self._stage

    def _carry_out(self, instruction: Instruction) -> None:
        name, value = instruction
        stage = self._stage
        if name == "ARG":
            known = stage.arguments if stage else self._before_stages
            for key, default in instruction.assignments({}).items():
                known[key] = self._given.get(key, default or self._before_stages.get(key, ""))
        elif name == "FROM":
            image, *alias = expand(value, self._before_stages).split(" AS ")
            self._stage = Stage(self._copy_base(image))
            self._stages[alias[0] if alias else ""] = self._stage
        elif stage is None:
            raise SystemExit(f"{name} before FROM")
        elif name == "ENV":
            stage.variables |= instruction.assignments(stage.arguments | stage.variables)
        elif name == "RUN":
            run(stage, value)
        elif name == "COPY":
            self._copy(stage, value.split())
        elif name == "WORKDIR":
            stage.directory = value
            stage.inside("").mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = value
        elif name in ("ENTRYPOINT", "HEALTHCHECK", "STOPSIGNAL", "VOLUME", "EXPOSE", "LABEL"):
            stage.settings[name] = value
        else:
            raise SystemExit(f"cannot replay {name}")

    def _copy_base(self, image: str) -> Path:
        match = re.fullmatch(r"python:(3\.\d+)-slim-(\w+)", image)
        if match is None:
            raise SystemExit(f"cannot make a base like {image}, only python:3.N-slim-DEBIAN")
        version, suite = match.groups()
        base = self._folder / f"{suite}-python{version}"
        if not base.exists():
            unfinished = Path(f"{base}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            command = [
                "debootstrap",
                "--variant=minbase",
                "--include=ca-certificates",
                suite,
                str(unfinished),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            script = f"apt-get install --yes --no-install-recommends python{version}-venv"
            run(Stage(unfinished), script)
            (unfinished / "usr/local/bin/python").symlink_to(f"/usr/bin/python{version}")
            unfinished.rename(base)
        root = self._folder / f"stage-{len(self._stages)}"
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "--archive", base, root], check=True)
        return root

    def _copy(self, stage: Stage, paths: Sequence[str]) -> None:
        *sources, target = paths
        context = ROOT
        if sources[0].startswith("--from="):
            context = self._stages[sources.pop(0).removeprefix("--from=")].root
        for source in sources:
            path = context / source.lstrip("/")
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__") if context == ROOT else None
                shutil.copytree(path, stage.inside(target), symlinks=True, ignore=ignored)
            else:
                shutil.copy(path, stage.inside(target))


def run(stage: Stage, script: str) -> None:
    """Run a script in a stage.

    Raises:
        SystemExit: It fails.
    """
    shutil.copy("/etc/resolv.conf", stage.root / "etc/resolv.conf")
    handed_in = {name: value for name, value in os.environ.items() if HANDED_IN.fullmatch(name)}
    status = stage.build(script, handed_in)
    expect(status == 0, f"RUN ended with {status}")


def try_out(stage: Stage) -> None:
    """Let a server become healthy, answer, and finish an answer after the signal to stop.

    Raises:
        SystemExit: It does not.
    """
    container = stage.start(json.loads(stage.settings["ENTRYPOINT"]))
    try:
        check = json.loads(stage.settings["HEALTHCHECK"].partition(" CMD ")[2])
        start = time.monotonic()
        while container.execute(*check).wait():
            expect(time.monotonic() - start < HEALTHY_SECONDS, "the server did not become healthy")
            time.sleep(0.5)
        say(f"healthy after {time.monotonic() - start:.0f} s")

        answer, errors = chat(container).communicate()
        expect("271828" in answer, f"the answer is wrong: {answer}{errors}")
        say(f"answered: {json.loads(answer)['choices'][0]['message']['content']}")

        stream = chat(container, stream=True, ignore_eos=True, max_tokens=300)
        assert stream.stdout is not None
        first = stream.stdout.readline()
        container.send(signal.Signals[stage.settings["STOPSIGNAL"]])
        start = time.monotonic()
        time.sleep(0.5)
        expect("503" in chat(container).communicate()[1], "a new request was not sent away")
        rest, errors = stream.communicate()
        expect("[DONE]" in rest, f"the open answer was cut off: {first}{rest[-500:]}{errors}")
        status = container.wait(STOP_SECONDS)
        seconds = time.monotonic() - start
        say(f"finished the open answer and ended with {status}, {seconds:.1f} s after the signal")
        expect(status == 0, "the exit status should be 0")
    finally:
        container.kill()


def chat(container: Container, **fields: object) -> subprocess.Popen[str]:
    """Ask the server, and let the answer come."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **fields}
    return container.execute("python", "-c", CHAT, json.dumps(body))


def expect(truth: bool, message: str) -> None:
    """End with a message unless something is true."""
    if not truth:
        raise SystemExit(message)


def say(text: str) -> None:
    """Print at once, between what the commands print."""
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Build, then use."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, help="where stages are made; a base there is used again")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(argv)
    missing = [tool for tool in ("debootstrap", *TOOLS) if shutil.which(tool) is None]
    expect(not missing, f"not found: {', '.join(missing)}")
    expect(os.geteuid() == 0, "only root can change to a stage's root")
    options.folder.mkdir(parents=True, exist_ok=True)
    arguments = dict(argument.partition("=")[::2] for argument in options.build_arg)
    build = Build(options.folder.resolve(), arguments)
    try_out(build.run(parse_dockerfile((ROOT / "docker/Dockerfile").read_text())))


if __name__ == "__main__":
    main()
