"""docker/kubernetes.yaml and kserve.yaml keep to the schemas, and fit the image and the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dockerfile import parse_dockerfile

from turboquant_server.api.door import HEALTH
from turboquant_server.config import ServerConfig
from turboquant_server.draining_server import CUT_OFF_SECONDS

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "tests/kubernetes_schema.json").read_text())
INSTRUCTIONS = parse_dockerfile((ROOT / "docker/Dockerfile").read_text())


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "docker" / name).read_text()))


CLAIM, DEPLOYMENT, SERVICE = load("kubernetes.yaml")
[INFERENCE_SERVICE] = load("kserve.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
PODS = [POD, INFERENCE_SERVICE["spec"]["predictor"]]


def last(name: str) -> str:
    """Return what the image's last instruction of a name says."""
    return next(value for key, value in reversed(INSTRUCTIONS) if key == name)


def find_errors(document: dict[str, Any]) -> list[str]:
    schema = {"$ref": f"#/definitions/{document['kind']}", "definitions": SCHEMA["definitions"]}
    return [
        f"{error.json_path}: {error.message}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(document)
    ]


@pytest.mark.parametrize("document", [CLAIM, DEPLOYMENT, SERVICE, INFERENCE_SERVICE], ids=lambda d: d["kind"])
def test_a_manifest_keeps_to_its_schema(document: dict[str, Any]) -> None:
    assert find_errors(document) == []


def test_a_misspelt_field_would_be_found() -> None:
    wrong = json.loads(json.dumps(DEPLOYMENT).replace("terminationGracePeriodSeconds", "gracePeriodSeconds"))
    assert "gracePeriodSeconds" in find_errors(wrong)[0]


@pytest.mark.parametrize("pod", PODS, ids=["kubernetes", "kserve"])
def test_a_pod_fits_the_image_and_the_server(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [int(last("EXPOSE"))]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [last("VOLUME")]
    user, group = map(int, last("USER").split(":"))
    security = pod["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"], security["runAsNonRoot"]) == (user, group, True)
    assert "nvidia.com/gpu" in container["resources"]["limits"]
    names = [variable["name"].removeprefix("TURBOQUANT_").lower() for variable in container["env"]]
    assert set(names) <= set(ServerConfig.model_fields)


@pytest.mark.parametrize("pod", PODS, ids=["kubernetes", "kserve"])
def test_a_pod_is_asked_for_its_health_and_has_time_to_end(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    for kind in ("startup", "readiness", "liveness"):
        assert container[f"{kind}Probe"]["httpGet"] == {"path": HEALTH, "port": "http"}
    [command, wait] = container["lifecycle"]["preStop"]["exec"]["command"]
    drain = ServerConfig.model_fields["shutdown_timeout"].default + 2 * CUT_OFF_SECONDS
    assert command == "sleep" and pod["terminationGracePeriodSeconds"] > int(wait) + drain


@pytest.mark.parametrize("pod", PODS, ids=["kubernetes", "kserve"])
def test_a_service_of_this_name_does_not_change_the_settings(pod: dict[str, Any]) -> None:
    assert SERVICE["metadata"]["name"] == "turboquant"  # whose variable would be TURBOQUANT_PORT=tcp://...
    assert pod["enableServiceLinks"] is False


def test_the_documents_belong_together() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels == SERVICE["spec"]["selector"]
    for pod in PODS:
        [volume] = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    ours, kserve = ({**pod["containers"][0], "name": ""} for pod in PODS)
    assert ours == kserve
