"""The wheel, built here and run from its own files alone, outside the checkout."""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import turboquant_server

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
PACKAGES = ("turboquant_core", "turboquant_server")
DATA_FILES = (
    "sample_text.txt",
    "page/docs.html",
    "page/index.html",
    "demo/README.md",
    "demo/chat_template.jinja",
    "demo/config.json",
    "demo/generation_config.json",
    "demo/model.safetensors",
    "demo/tokenizer.json",
    "demo/tokenizer_config.json",
)


def metadata(wheel_dir: Path) -> email.message.Message:
    [file] = wheel_dir.glob("*.dist-info/METADATA")
    return email.parser.Parser().parsestr(file.read_text())


def test_the_wheel_holds_both_packages_their_types_and_their_data(wheel_dir: Path) -> None:
    assert {path.name for path in wheel_dir.iterdir() if path.suffix != ".dist-info"} == set(PACKAGES)
    for package in PACKAGES:
        assert (wheel_dir / package / "py.typed").exists()
    for name in DATA_FILES:
        packed, source = (base / "turboquant_server" / name for base in (wheel_dir, ROOT))
        assert packed.read_bytes() == source.read_bytes(), name
    assert not list(wheel_dir.rglob("*.png"))  # of the READMEs


def test_the_wheel_says_what_it_is(wheel_dir: Path) -> None:
    fields = metadata(wheel_dir)
    assert (fields["Name"], fields["Version"]) == ("turboquant-server", turboquant_server.__version__)
    assert (fields["License-Expression"], fields["Requires-Python"]) == ("Apache-2.0", "<3.14,>=3.10")
    assert set(fields.get_all("Provides-Extra") or ()) == {"cuda", "dev", "ray"}
    [entry_points] = wheel_dir.glob("*.dist-info/entry_points.txt")
    assert "turboquant-server = turboquant_server.cli:main" in entry_points.read_text()
    assert 'ENTRYPOINT ["turboquant-server"]' in DOCKERFILE
    assert list(wheel_dir.glob("*.dist-info/licenses/LICENSE"))


def test_the_container_is_healthy_when_the_server_is(demo_server_url: str) -> None:
    [command] = re.findall(r"^HEALTHCHECK .+\\\n\s+CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    _, *arguments = json.loads(command)
    port = demo_server_url.rpartition(":")[2]
    for checked, healthy in ((port, True), ("1", False)):
        environment = {**os.environ, "TURBOQUANT_PORT": checked}
        result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True)
        assert (result.returncode == 0) is healthy
