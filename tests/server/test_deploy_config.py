"""deploy_config.py: name=value, as Ray Serve passes them on, to the settings of replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from turboquant_server.config import ServerConfig
from turboquant_server.deploy_config import DeployConfig

pytestmark = pytest.mark.usefixtures("no_variables")


def parse(**arguments: Any) -> DeployConfig:
    """Do as Serve does with the argument of a builder."""
    return DeployConfig.model_validate(arguments)


def test_texts_of_a_command_line_become_settings() -> None:
    config = parse(
        model="a/b", bits="3", kv_cache_memory="1GiB", api_key="x y", num_replicas="2", max_replicas="4"
    )
    assert (config.num_replicas, config.max_replicas) == (2, 4)
    assert config.server_settings() == {
        "model": "a/b",
        "bits": 3,
        "kv_cache_memory": 2**30,
        "api_key": ("x", "y"),
    }


def test_variables_and_the_file_are_read_where_the_application_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings.yaml").write_text("max-model-len: 2k\nnum-replicas: 3\n")
    monkeypatch.setenv("TURBOQUANT_BITS", "2")
    config = parse(config=str(tmp_path / "settings.yaml"))
    assert config.num_replicas == 3
    assert config.server_settings() == {"bits": 2, "max_model_len": 2048}


def test_each_replica_gets_the_same_configuration() -> None:
    config = parse(kv_bits="4,3", served_model_name="a b", num_replicas=2)
    replica = ServerConfig(**config.server_settings())
    assert replica.model_dump() == {name: getattr(config, name) for name in ServerConfig.model_fields}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bitz": "4"}, "bitz"),
        ({"bits": "5"}, "2, 3, 4 or 8"),
        ({"num_replicas": "0"}, "num_replicas"),
        ({"num_replicas": "3", "max_replicas": "2"}, "max_replicas must not be less"),
        ({"port": "9000"}, "port is not for replicas"),
        ({"host": "0.0.0.0"}, "host is not for replicas"),
        ({"ssl_certfile": "a", "ssl_keyfile": "b"}, "ssl_certfile is not for replicas"),
    ],
)
def test_what_replicas_cannot_have_is_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"models": "a=x"}, {"idle_unload": "1m"}, {"max_loaded_models": 2}, {"admin_key": "k"}],
    ids=str,
)
def test_replicas_keep_their_one_model(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(arguments))} is not for replicas"):
        parse(**arguments)
