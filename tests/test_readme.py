"""Every code block of the READMEs: run on the bundled model where that can be done here, checked otherwise.

What is changed in a block before it runs: the address of the server is that of the tests', and NAME is the
bundled model's. A block that is not in the table below fails.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from turboquant_server.deploy_config import DeployConfig
from turboquant_server.flags import parse_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FILES = [path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
ADDRESS, NAME = "http://127.0.0.1:8000", "turboquant-demo"


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        file: Where it stands.
        language: As in ``bash``; empty for what is no code.
        text: What is between the fences.
    """

    file: Path
    language: str
    text: str

    def substituted(self, url: str) -> str:
        """Return the text with the tests' server and model."""
        return re.sub(r"\bNAME\b", NAME, self.text.replace(ADDRESS, url))

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line of a shell's script."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks_of(file: Path) -> list[Block]:
    found = FENCE.finditer((ROOT / file).read_text())
    return [
        Block(file, language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
        for indent, language, text in (match.groups() for match in found)
    ]


BLOCKS = [block for file in FILES for block in blocks_of(file)]


def run_shell(block: Block, url: str, more: str = "") -> str:
    """Run a script in the checkout, and more after it, and return what it prints."""
    script = f"{block.substituted(url)}\n{more}"
    command = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_python(block: Block, url: str, names: dict[str, Any]) -> str:
    """Run a program in the checkout and return what it prints; its names are added to those it is given."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(block.substituted(url), str(block.file), "exec"), names)
    return output.getvalue()


def ask_with_curl(block: Block, url: str) -> None:
    assert "271828" in run_shell(block, url)


def ask_with_the_sdk(block: Block, url: str) -> None:
    names: dict[str, Any] = {}
    assert "271828" in run_python(block, url, names)
    names["client"].close()


def generate_with_the_cache(block: Block, url: str) -> None:
    answer, footprint = run_python(block, url, {}).splitlines()
    held, bf16 = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{4,}", footprint))
    assert "271828" in answer and held < bf16 / 2


def use_the_core(block: Block, url: str) -> None:
    """Run what takes a model and a text from the reader: here the bundled one and the licence."""
    demo = ROOT / "turboquant_server/demo"
    model = AutoModelForCausalLM.from_pretrained(demo)
    inputs = AutoTokenizer.from_pretrained(demo)(Path(ROOT / "LICENSE").read_text(), return_tensors="pt")
    names: dict[str, Any] = {"model": model, "inputs": {"input_ids": inputs["input_ids"][:, :300]}}
    run_python(block, url, names | {"input_ids": inputs["input_ids"][:, :2000]})


def ask_with_anthropics_sdk(block: Block, url: str) -> None:
    """Claude Code itself is not here; Anthropic's SDK takes its place."""
    program = (
        "import os, anthropic; messages = [{'role': 'user', 'content': 'Hello'}]; "
        "model = os.environ['ANTHROPIC_MODEL']; client = anthropic.Anthropic(); "
        "print(client.messages.create(model=model, messages=messages, max_tokens=9).model)"
    )
    variables, command = block.text.rstrip().rsplit("\n", 1)
    assert command == "claude"
    settings = Block(block.file, block.language, variables)
    assert run_shell(settings, url, shlex.join([sys.executable, "-c", program])) == f"{NAME}\n"


def configure_codex(block: Block, url: str) -> None:
    """Codex itself is not here; what it would be told is true."""
    config = tomllib.loads(block.substituted(url))
    provider = config["model_providers"][config["model_provider"]]
    path = f"{provider['base_url']}/{provider['wire_api']}"
    body = {"model": config["model"], "input": "Hello", "max_output_tokens": 1}
    assert httpx.post(path, json=body, timeout=60).status_code == 200


def name_scripts_and_flags(block: Block, url: str) -> None:
    """Not run: scripts would install environments, lint and test, or fetch a model from the hub."""
    for command in block.commands:
        check_script(*command[command[0] == ".venv/bin/python" :])


def check_script(script: str, *arguments: str) -> None:
    """Check that a script exists, and what it is given."""
    path = ROOT / script
    assert path.exists() and (path.suffix or os.access(path, os.X_OK)), script
    if script == "scripts/serve":
        parse_config(arguments)
        return
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(rf"{argument}(?![\w-])", path.read_text()), f"{script} has no {argument}"
        elif argument.startswith("tests/"):
            assert (ROOT / argument).exists(), argument


def configure_models(block: Block, url: str) -> None:
    """Not run: it fetches models from the hub."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(block.text)
        file.flush()
        config = parse_config(["--config", file.name])
    assert [one.served_model_name for one in config.of_models()] == [("small",), ("big",)]


def unload_without_a_key(block: Block, url: str) -> None:
    """The tests' server has no admin key, and says so."""
    assert "admin" in run_shell(block, url)


def name_flags(block: Block, url: str) -> None:
    """Not run: it fetches a model from the hub, for several GPUs."""
    for command in block.commands:
        assert command[0] == "turboquant-server"
        parse_config(command[1:])


def install_and_deploy(block: Block, url: str) -> None:
    """Not run: it installs, and asks for docker, the hub and Ray; all that it names exists."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for command in block.commands:
        program, verb, *arguments = command
        if (program, verb) == ("pip", "install"):
            assert all(extra in extras for extra in re.findall(r"\w+", arguments[0]))
        elif (program, verb) == ("docker", "build"):
            assert (ROOT / arguments[arguments.index("-f") + 1]).exists()
        elif (program, verb) == ("docker", "run"):
            parse_config(arguments[arguments.index("turboquant-server") + 1 :])
        else:
            assert (program, verb) == ("serve", "run")
            module, name = arguments[0].split(":")
            tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
            assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            DeployConfig(**dict(argument.split("=") for argument in arguments[1:]))  # type: ignore[arg-type]


def show_files(block: Block, url: str) -> None:
    for line in block.text.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def draw(block: Block, url: str) -> None:
    """A picture; the files in it exist."""
    for name in re.findall(r"\w+/\w+\.py", block.text):
        assert (ROOT / block.file.parent / name).exists(), name


CHECKS: dict[tuple[str, str], Callable[[Block, str], None]] = {
    ("README.md", "scripts/serve"): name_scripts_and_flags,
    ("README.md", f"curl {ADDRESS}/v1/chat/completions \\"): ask_with_curl,
    ("README.md", "from openai import OpenAI"): ask_with_the_sdk,
    ("README.md", "scripts/serve --model"): name_scripts_and_flags,
    ("README.md", "pip install . "): install_and_deploy,
    ("README.md", "turboquant-server --model"): name_flags,
    ("README.md", "kv-cache-memory"): configure_models,
    ("README.md", f"curl {ADDRESS}/v1/models/unload"): unload_without_a_key,
    ("README.md", "pip install '.[ray]'"): install_and_deploy,
    ("README.md", "from pathlib import Path"): generate_with_the_cache,
    ("README.md", 'model = "NAME"'): configure_codex,
    ("README.md", "export ANTHROPIC_BASE_URL"): ask_with_anthropics_sdk,
    ("README.md", ".venv/bin/python scripts/"): name_scripts_and_flags,
    ("README.md", "scripts/test"): name_scripts_and_flags,
    ("README.md", "turboquant_core/  "): show_files,
    ("turboquant_core/README.md", "import torch"): use_the_core,
    ("turboquant_core/README.md", "[ first 4 tokens"): draw,
    ("turboquant_core/README.md", "prompt      cut at"): draw,
    ("turboquant_server/README.md", "event loop"): draw,
}


def key_of(block: Block) -> tuple[str, str] | None:
    """The longest that fits."""
    fitting = [key for key in CHECKS if str(block.file) == key[0] and block.text.startswith(key[1])]
    return max(fitting, key=lambda key: len(key[1]), default=None)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.file}: {block.text.splitlines()[0]}")
def test_a_block_does_what_it_says(
    block: Block, demo_server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(block)
    assert key is not None, f"say in CHECKS how this block of {block.file} is to be tested:\n{block.text}"
    monkeypatch.chdir(ROOT)
    CHECKS[key](block, demo_server_url)


def test_each_check_has_a_block() -> None:
    assert {key_of(block) for block in BLOCKS} == set(CHECKS)


def test_scripts_and_flags_that_the_text_names_exist() -> None:
    texts = [FENCE.sub("", (ROOT / file).read_text()) for file in FILES]
    spans = [span for text in texts for span in re.findall(r"`([^`]+)`|^    (\S.*)$", text, re.MULTILINE)]
    commands = [
        shlex.split("".join(span).removeprefix("python ")) for span in spans if "scripts/" in "".join(span)
    ]
    assert len(commands) >= 10
    for command in commands:
        check_script(*command)
