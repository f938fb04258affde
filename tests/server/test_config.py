"""Flags beat variables, variables beat defaults, and no wrong value gets through."""

from __future__ import annotations

import os
from typing import Any

import pytest
from pydantic import ValidationError

from turboquant_core import config as core_config
from turboquant_server import config as server_config
from turboquant_server.config import ServerConfig


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("TURBOQUANT_"):
            monkeypatch.delenv(name)


def test_the_defaults_serve_the_demo_model_to_this_machine_only() -> None:
    config = ServerConfig()
    assert config.model is None
    assert (config.host, config.port, config.bits) == ("127.0.0.1", 8000, 4)
    assert (config.quantize, config.dtype, config.device, config.revision) == ("none", "auto", None, None)
    assert (config.max_model_len, config.served_model_name) == (None, ())
    assert config.trust_remote_code is False


def test_a_variable_beats_the_default_and_an_argument_beats_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TURBOQUANT_PORT", "9000")
    monkeypatch.setenv("TURBOQUANT_BITS", "3")
    config = ServerConfig(bits=2)
    assert (config.port, config.bits) == (9000, 2)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MODEL", "some/model", "some/model"),
        ("MAX_MODEL_LEN", "4096", 4096),
        ("TRUST_REMOTE_CODE", "true", True),
        ("TRUST_REMOTE_CODE", "0", False),
        ("SERVED_MODEL_NAME", "a", ("a",)),
        ("SERVED_MODEL_NAME", " a  b ", ("a", "b")),
        ("QUANTIZE", "int4", "int4"),
        ("BITS", "", 4),
    ],
)
def test_variables_are_read_as_their_field_says(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"TURBOQUANT_{name}", text)
    assert getattr(ServerConfig(), name.lower()) == value


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 5},
        {"bits": "four"},
        {"port": -1},
        {"port": 65536},
        {"quantize": "int3"},
        {"dtype": "float8"},
        {"max_model_len": 0},
        {"model": ""},
        {"host": ""},
        {"served_model_name": ("a", "")},
        {"colour": "red"},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_its_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ServerConfig(**arguments)
    assert caught.value.error_count() == 1
    assert caught.value.errors()[0]["loc"][0] == next(iter(arguments))


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError):
        ServerConfig().port = 1  # type: ignore[misc]


def test_the_bits_are_those_of_the_cache() -> None:
    assert server_config.SUPPORTED_BITS == core_config.SUPPORTED_BITS
