"""The project as a whole: import directions, one version, README and Dockerfile that speak of what exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import turboquant_core
import turboquant_server
from turboquant_server.cli import parse_config
from turboquant_server.config import ServerConfig
from turboquant_server.flags import format_default

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
MAX_LINES = 300


def python_files(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files, f"no Python files in {folders}"
    return files


def imported_modules(file: Path) -> Iterator[str]:
    """Yield the absolute name of every module that a file imports, anywhere in it."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("turboquant_core", "turboquant_server"),
        ("turboquant_core", "fastapi"),
        ("turboquant_server/api", "torch"),
        ("turboquant_server/engine", "fastapi"),
        ("turboquant_server/engine", "turboquant_server.api"),
        ("turboquant_server/parsing", "fastapi"),
        ("turboquant_server/parsing", "torch"),
        ("turboquant_server/parsing", "turboquant_server.api"),
        ("turboquant_server/parsing", "turboquant_server.engine"),
    ],
)
def test_imports_point_one_way(folder: str, forbidden: str) -> None:
    for file in python_files(folder):
        for module in imported_modules(file):
            assert not f"{module}.".startswith(f"{forbidden}."), f"{file} imports {module}"


def test_the_application_and_what_is_before_replicas_import_no_torch() -> None:
    code = "import sys, turboquant_server.app, turboquant_server.relay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_server_uses_the_core_by_its_public_names() -> None:
    public = {"turboquant_core", *(f"turboquant_core.{name}" for name in turboquant_core.__all__)}
    for file in python_files("turboquant_server"):
        used = {module for module in imported_modules(file) if module.split(".")[0] == "turboquant_core"}
        assert used <= public, f"{file} imports {used - public}"


def test_a_long_file_says_why() -> None:
    for file in python_files("turboquant_core", "turboquant_server", "scripts", "tests"):
        lines = file.read_text().splitlines()
        excused = f"{MAX_LINES} lines" in " ".join(lines[:20])
        assert len(lines) <= MAX_LINES or excused, f"{file} has {len(lines)} lines and does not say why"


def test_the_version_stands_in_one_place() -> None:
    version = turboquant_server.__version__
    definition = re.compile(rf"""version\S*\s*[=:]\s*["']{re.escape(version)}["']""")
    files = [*python_files("turboquant_core", "turboquant_server"), ROOT / "pyproject.toml"]
    found = [file.parent.name for file in files if definition.search(file.read_text())]
    assert found == ["turboquant_server"]


def test_the_changelog_starts_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in headings if name != "Unreleased") == turboquant_server.__version__


def server_commands(text: str) -> list[list[str]]:
    """Return the arguments of every command in a text that starts the server, in a container or not."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:scripts/serve|turboquant-server)((?: +--.*)?)$", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match and "`" not in match[0]]


@pytest.mark.parametrize("text", [README, DOCKERFILE], ids=["README", "Dockerfile"])
def test_documented_commands_are_understood(text: str) -> None:
    commands = server_commands(text)
    assert any("--model" in command and "--bits" in command for command in commands)
    for command in commands:
        parse_config(command)


def test_the_readme_lists_every_flag_and_its_default() -> None:
    table = re.findall(r"^\| (`--[a-z-]+`(?:, `--[a-z-]+`)*) \| (.+?) \|", README, re.MULTILINE)
    rows = {flag: default for flags, default in table for flag in re.findall(r"--([a-z-]+)", flags)}
    fields = ServerConfig.model_fields
    assert set(rows) == {name.replace("_", "-") for name in fields}
    for name, field in fields.items():
        if field.default not in (None, (), False):
            assert rows[name.replace("_", "-")] == format_default(field), name


def test_links_in_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
