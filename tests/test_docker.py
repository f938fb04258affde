"""docker/: its paths, settings, ports and metrics are those of the code; --long builds and runs the image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from dockerfile import expand, parse_dockerfile
from prometheus_client.parser import text_string_to_metric_families

from turboquant_server.api.door import METRICS
from turboquant_server.cache_usage import CacheUsage
from turboquant_server.config import ServerConfig
from turboquant_server.draining_server import CUT_OFF_SECONDS
from turboquant_server.metrics import EngineState, Metrics
from turboquant_server.metrics_text import render_metrics
from turboquant_server.swap_space import SwapUsage

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docker"
README = (ROOT / "README.md").read_text()
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
INSTRUCTIONS = parse_dockerfile(DOCKERFILE)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu/"


class Loader(yaml.SafeLoader):
    """YAML with Compose's mark for what an override takes away."""


Loader.add_constructor("!reset", lambda loader, node: None)


def load(name: str) -> Any:
    return yaml.load((FOLDER / name).read_text(), Loader)


COMPOSE = load("compose.yaml")
SERVICES = COMPOSE["services"]
BOARD = json.loads((FOLDER / "grafana/dashboards/turboquant.json").read_text())


def values(name: str) -> list[str]:
    """Return what the Dockerfile says with each instruction of a name."""
    return [value for key, value in INSTRUCTIONS if key == name]


def image_variables() -> dict[str, str]:
    """Return what the last stage sets."""
    variables = {"PATH": "/bin"}
    for instruction in INSTRUCTIONS:
        if instruction.name == "FROM":
            variables = {"PATH": "/bin"}
        elif instruction.name == "ENV":
            variables |= instruction.assignments(variables)
    return variables


def mounts(service: str) -> dict[str, str]:
    """Return what lies where in a service's container."""
    pairs = (volume.split(":") for volume in SERVICES[service]["volumes"])
    return {target: source for source, target, *_ in pairs}


def test_a_dockerfile_is_taken_apart_as_docker_does() -> None:
    text = '# a\nFROM a:${B} AS c\nRUN one \\\n# between\n    && two\nENV A=1 B="2 3" \\\n    C=$A/x\n'
    base, run, env = parse_dockerfile(text)
    assert run == ("RUN", "one  && two")
    assert expand(base.value, {"B": "9"}) == "a:9 AS c"
    assert env.assignments({"A": "0"}) == {"A": "1", "B": "2 3", "C": "0/x"}


def test_the_dockerfile_copies_what_exists_and_no_more_is_sent() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [value.split()[:-1] for value in values("COPY") if not value.startswith("--from")]
    copied = [source for sources in copies for source in sources]
    assert copied and set(copied) == kept
    assert all((ROOT / source).exists() for source in copied)


def test_the_container_has_a_supported_python() -> None:
    [version] = re.findall(r"^ARG BASE=python:3\.(\d+)-slim", DOCKERFILE, re.MULTILINE)
    assert 10 <= int(version) <= 13
    assert all(value.startswith("${BASE}") for value in values("FROM"))


def test_variables_for_the_server_are_its_settings() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    found = {name for path in files for name in re.findall(r"\bTURBOQUANT_(\w+)", path.read_text())}
    assert found >= {"HOST", "MODEL", "BITS", "API_KEY"}
    for name in found:
        assert name.lower() in ServerConfig.model_fields, name


def test_the_container_listens_for_other_machines_and_is_not_root() -> None:
    assert image_variables()["TURBOQUANT_HOST"] == "0.0.0.0"
    assert values("EXPOSE") == [str(ServerConfig.model_fields["port"].default)]
    assert values("USER")[-1].split(":")[0] not in ("0", "root")


def test_what_is_downloaded_or_compiled_lies_in_the_volume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    [volume] = values("VOLUME")
    caches = {name: path for name, path in image_variables().items() if path.startswith(volume)}
    # Our kernels' place is the second, as tests/core/test_cuda_kernels.py shows.
    assert caches.keys() == {"HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    for name, path in caches.items():
        monkeypatch.setenv(name, path.replace(volume, str(tmp_path), 1))
    for used in (cache_dir(), triton.knobs.cache.dir):
        assert Path(used).parent == tmp_path


def test_the_documented_build_arguments_exist() -> None:
    known = {name for value in values("ARG") for name in re.findall(r"^\w+", value)}
    cpu = load("compose.cpu.yaml")["services"]["server"]["build"]["args"]
    given = re.findall(r"--build-arg (\w+)", README + DOCKERFILE)
    assert given and {*given, *cpu} <= known
    assert f"{cpu['DEVICE']})" in " ".join(values("RUN"))


def test_a_container_is_killed_only_after_the_server_would_have_ended() -> None:
    longest = ServerConfig.model_fields["shutdown_timeout"].default + 2 * CUT_OFF_SECONDS
    graces = [SERVICES["server"]["stop_grace_period"].removesuffix("s")]
    graces += re.findall(r"--stop-timeout (\d+)", README) + re.findall(r"--stop-timeout (\d+)", DOCKERFILE)
    assert len(graces) == 3 and all(int(grace) > longest for grace in graces)
    assert values("STOPSIGNAL") == ["SIGTERM"]


def test_the_profiles_are_those_that_the_readme_names() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert [name for name, of in profiles.items() if not of] == ["server"]
    named = set(re.findall(r"--profile (\w+)", README))
    assert named == {profile for of in profiles.values() for profile in of}
    for file in re.findall(r"docker/[\w.]+\.yaml", README):
        assert (ROOT / file).exists(), file


def test_what_compose_mounts_is_there() -> None:
    for name in SERVICES:
        for source in mounts(name).values():
            exists = (FOLDER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
            assert exists, source
    assert values("VOLUME")[0] in mounts("server")
    build = SERVICES["server"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).samefile(FOLDER / "Dockerfile")


def test_only_this_machine_reaches_the_published_ports_and_none_is_taken_twice() -> None:
    published = [port.split(":") for service in SERVICES.values() for port in service.get("ports", [])]
    assert {host for host, _, _ in published} == {"127.0.0.1"}
    assert len({port for _, port, _ in published}) == len(published)
    assert SERVICES["server"]["ports"] == [f"127.0.0.1:8000:{values('EXPOSE')[0]}"]


def test_the_services_find_each_other() -> None:
    [source] = load("grafana/datasources/prometheus.yaml")["datasources"]
    [job] = load("prometheus.yaml")["scrape_configs"]
    server = f"server:{values('EXPOSE')[0]}"
    assert SERVICES["open-webui"]["environment"]["OPENAI_API_BASE_URL"] == f"http://{server}/v1"
    assert job["static_configs"] == [{"targets": [server]}]
    assert job.get("metrics_path", "/metrics") == METRICS
    assert source["url"] == "http://prometheus:9090" and "prometheus" in SERVICES
    assert source["jsonData"]["timeInterval"] == load("prometheus.yaml")["global"]["scrape_interval"]


def test_prometheus_has_the_key_that_the_server_asks_for() -> None:
    [job] = load("prometheus.yaml")["scrape_configs"]
    [key] = SERVICES["prometheus"]["configs"]
    assert job["authorization"]["credentials_file"] == key["target"]
    assert COMPOSE["configs"][key["source"]]["content"] == "${TURBOQUANT_API_KEY:-none}"


def test_grafana_finds_its_board() -> None:
    [provider] = load("grafana/dashboards/turboquant.yaml")["providers"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert provider["options"]["path"] == str(home.parent)
    assert (FOLDER / mounts("grafana")[str(home.parent)] / home.name).exists()
    assert "/etc/grafana/provisioning/datasources" in mounts("grafana")


def queries() -> Iterator[promql_parser.Expr]:
    """Yield every part of every expression on the board, parsed."""
    found: list[promql_parser.Expr] = []
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            expression = promql_parser.parse(target["expr"].replace("$__rate_interval", "1m"))
            promql_parser.walk(expression, found.append)
    assert found
    yield from found


def served_labels() -> dict[str, dict[str, set[str]]]:
    """Return the labels of each metric in /metrics, and their values."""
    usage = CacheUsage(held_bytes=1, bf16_bytes=4, num_tokens=2, num_exact_tokens=1, share=0.5)
    swap = SwapUsage(num_hit_tokens=1, num_blocks_out=1, num_blocks_in=1, share=0.5)
    state = EngineState(
        1, 1, 1, usage, swap, num_capacity_tokens=8, num_bf16_capacity_tokens=2, cache_config={}
    )
    text = render_metrics(Metrics("a").collect(state), with_aliases=False).decode()
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault(sample.name, {}).setdefault(label, set()).add(value)
    return found


def test_the_board_asks_for_metrics_and_labels_that_are_served() -> None:
    served = served_labels()
    labels = {label for of in served.values() for label in of}
    for part in queries():
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier:
            assert set(part.modifier.labels) <= labels
        if not isinstance(part, promql_parser.VectorSelector):
            continue
        assert part.name in served, part.name
        for matcher in part.matchers.matchers:
            values = served[part.name][matcher.name]
            assert matcher.value == "$model" or set(matcher.value.split("|")) <= values, part.prettify()


def test_the_board_shows_memory_speed_and_requests() -> None:
    shown = {part.name for part in queries() if isinstance(part, promql_parser.VectorSelector)}
    wanted = [
        *("kv_bytes_compressed", "kv_bytes_bf16_equivalent", "kv_bits_per_value", "kv_cache_usage_perc"),
        *("generation_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_bucket"),
        *("inter_token_latency_seconds_bucket", "num_requests_running", "num_requests_waiting"),
        *("num_preemptions_total", "prefix_cache_hits_total", "request_success_total"),
    ]
    assert shown >= {f"turboquant:{name}" for name in wanted}


def test_the_panels_of_the_board_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert max(x for x, _ in cells) < 24 and not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("debootstrap") or os.geteuid() != 0, reason="needs debootstrap and root")
def test_the_image_builds_starts_answers_and_drains(tmp_path: Path) -> None:
    arguments = ["BASE=python:3.11-slim-bookworm", "DEVICE=cpu"]
    try:
        urllib.request.urlopen(f"{TORCH_CPU_INDEX}torch/", timeout=5).close()
    except OSError:  # then as in scripts/environment.sh
        arguments += ["TORCH=torch==2.13.0", "TORCH_INDEX_URL=https://pypi.org/simple"]
    command = [sys.executable, ROOT / "scripts/replay_dockerfile.py", tmp_path]
    given = [word for argument in arguments for word in ("--build-arg", argument)]
    try:
        result = subprocess.run([*command, *given], capture_output=True, text=True)
    finally:
        shutil.rmtree(tmp_path)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    assert "answered: 271828" in result.stdout
