"""Flags beat variables, variables beat the file, the file beats defaults; what nobody knows is named."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turboquant_server.config import ServerConfig
from turboquant_server.config_file import ALIASES, ConfigFileError
from turboquant_server.flags import parse_config, warn_of_unknown_variables

pytestmark = pytest.mark.usefixtures("no_variables")

# Of each setting some values as Python has them; as text they are what a flag and a variable say.
VALUES: Mapping[str, list[Any]] = {
    "bits": [2, 3, 8],
    "port": [1, 8000, 65535],
    "max_model_len": [100, 4096],
    "vram_limit": [1, 10 * 2**30],
    "gpu_memory_utilization": [0.5, 1.0],
    "request_timeout": [0.5, 60.0],
    "model": ["some/model", "x"],
    "host": ["::1", "0.0.0.0"],
    "dtype": ["float16", "bfloat16"],
    "enforce_eager": [True, False],
    "enable_prefix_caching": [True, False],
    "public_metrics": [True, False],
    "served_model_name": [("a",), ("a", "b")],
    "api_key": [("k",), ("k", "l-m", "ü")],
    "allowed_origins": [("*",), ("https://a", "https://b")],
}
SOURCES = ("flag", "variable", "file")


@st.composite
def given_settings(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Return for each source some settings with values."""
    names = st.lists(st.sampled_from(sorted(VALUES)), unique=True)
    return {source: {name: draw(st.sampled_from(VALUES[name])) for name in draw(names)} for source in SOURCES}


def write(path: Path, content: str) -> str:
    path.write_text(content, "utf-8")
    return str(path)


def flags_of(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", *value]
    return [f"--{flag}", str(value)]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=given_settings(), dashes=st.booleans(), config_by_flag=st.booleans())
def test_what_is_nearest_to_the_user_wins(
    tmp_path: Path, chosen: dict[str, dict[str, Any]], dashes: bool, config_by_flag: bool
) -> None:
    keys = {name.replace("_", "-") if dashes else name: value for name, value in chosen["file"].items()}
    path = write(tmp_path / "c.yaml", json.dumps(keys))  # JSON is YAML
    argv = [word for name, value in chosen["flag"].items() for word in flags_of(name, value)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in chosen["variable"].items():
            text = " ".join(value) if isinstance(value, tuple) else str(value)
            patch.setenv(f"TURBOQUANT_{name.upper()}", text)
        if config_by_flag:
            argv += ["--config", path]
        else:
            patch.setenv("TURBOQUANT_CONFIG", path)
        config = parse_config(argv)
    for name, field in ServerConfig.model_fields.items():
        given_by = [chosen[source][name] for source in SOURCES if name in chosen[source]]
        expected = path if name == "config" else given_by[0] if given_by else field.default
        assert getattr(config, name) == expected, name


def test_values_are_written_as_yaml_or_as_a_flag_has_them(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.yaml",
        """
        # a comment
        max-model-len: 32k
        kv_bits: [4, 3]
        kv-cache-memory-bytes: 10GiB
        max-num-queued-reqs: 7
        served-model-name: a b
        api-key: k,l
        port:
        vllm-metrics: yes
        """,
    )
    config = parse_config(["--config", path])
    assert (config.max_model_len, config.kv_bits, config.kv_cache_memory) == (32768, (4, 3), 10 * 2**30)
    assert (config.max_num_queued_requests, config.served_model_name) == (7, ("a", "b"))
    assert (config.api_key, config.port, config.vllm_metrics) == (("k", "l"), 8000, True)


def test_vllms_names_are_flags_too() -> None:
    config = parse_config(["--kv-cache-memory-bytes", "8GiB", "--max_num_queued_reqs", "5"])
    assert (config.kv_cache_memory, config.max_num_queued_requests) == (8 * 2**30, 5)
    assert set(ALIASES.values()) <= set(ServerConfig.model_fields)


@pytest.mark.parametrize("content", ["", "# nothing\n", "{}", "null"])
def test_an_empty_file_sets_nothing(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "c.yaml", content)
    assert parse_config(["--config", path]) == ServerConfig(config=path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("modle: x", "unknown key 'modle'; did you mean model?"),
        ("max-modellen: 1", "unknown key 'max-modellen'; did you mean max_model_len?"),
        ("frobnicate: 1", "unknown key 'frobnicate' ("),
        ("config: other.yaml", "unknown key 'config'"),
        ("1: 2", "unknown key '1'"),
        ("max-model-len: 1\nmax_model_len: 2", "'max_model_len' is there twice"),
        ("kv-cache-memory: 1\nkv-cache-memory-bytes: 2", "'kv_cache_memory' is there twice"),
        ("port: http", "c.yaml: port: input should be a valid integer"),
        ("max-model-len: 1", "c.yaml: max-model-len: input should be greater than or equal to 2, got 1"),
        ("model: [a]", "c.yaml: model: input should be a valid string"),
        ("bits: 4\nkv-bits: 4,3", "choose one of --bits and --kv-bits"),
        ("idle-unload: true", "c.yaml: idle-unload: cannot be true"),
        ("port: 1\nport: 2", "is not valid YAML at line 1 (a key is there twice)"),
        ("models: [{name: a, model: x, bits: 4, bits: 2}]", "(a key is there twice)"),
        ("- a\n- b", "must hold flags with values"),
        ("text", "must hold flags with values"),
        ("a: [", "is not valid YAML at line 1"),
        ("port: 1\n\tb", "is not valid YAML at line 2"),
        ("a: !!python/object:os.system x", "is not valid YAML at line 1"),
    ],
)
def test_a_wrong_file_ends_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    path = write(tmp_path / "c.yaml", content)
    with pytest.raises(SystemExit) as caught:
        parse_config(["--config", path])
    output = capsys.readouterr()
    assert (caught.value.code, output.out) == (2, "")
    assert output.err.startswith("turboquant-server: error: ") and output.err.count("\n") == 1
    assert words in output.err


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing.yaml", "No such file"), (".", "Is a directory"), ("latin.yaml", "is not valid YAML")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "latin.yaml").write_bytes("model: ü".encode("latin-1"))
    with pytest.raises(ConfigFileError, match=words) as caught:
        ServerConfig(config=str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    "content", ["api-key: 12345678", "api-key: [{a: 12345678}]", "api-key: [[12345678]]"]
)
def test_a_wrong_key_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--config", write(tmp_path / "c.yaml", content)])
    error = capsys.readouterr().err
    assert "api-key" in error and "1234" not in error
    assert "tuple" not in error


def test_what_follows_a_misspelt_flag_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--api-keys", "12345678"], ["--api-keys=12345678"]):
        with pytest.raises(SystemExit):
            parse_config(argv)
        error = capsys.readouterr().err
        assert "--api-keys; did you mean --api-key?" in error and "1234" not in error


@pytest.mark.parametrize("argv", [["--api-key", ""], ["--api-key="], ["--api-key", " , "], ["--api-key"]])
def test_a_key_that_is_empty_does_not_open_the_door(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(argv)
    assert "--api-key" in capsys.readouterr().err


def test_keys_may_be_given_in_every_way() -> None:
    argv = ["--api-key", "a", "--api-key", "b,c", "--api_key", "d", "e"]
    assert parse_config(argv).api_key == ("a", "b", "c", "d", "e")


def test_an_unknown_variable_is_named_with_the_closest_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_unknown_variables(
            {
                "TURBOQUANT_MAX_MODEL_LENGTH": "5",
                "TURBOQUANT_SERVICE_HOST": "10.0.0.1",
                "turboquant_bits": "4",
                "TURBOQUANT_API_KEY": "k",
                "OTHER": "1",
            }
        )
    first, second = caplog.messages
    assert first == (
        "ignoring the unknown variable TURBOQUANT_MAX_MODEL_LENGTH; did you mean TURBOQUANT_MAX_MODEL_LEN?"
    )
    assert second.startswith("ignoring the unknown variable TURBOQUANT_SERVICE_HOST")
    assert "10.0.0.1" not in second
    warn_of_unknown_variables({name: value for name, value in os.environ.items() if "TURBO" not in name})
    assert len(caplog.messages) == 2
