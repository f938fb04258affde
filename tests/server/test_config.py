"""Variables beat defaults, arguments beat variables, and no wrong value gets through.

More than 300 lines, most of them rows of values.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from turboquant_core import config as core_config
from turboquant_server import cache_config, config
from turboquant_server.config import ServerConfig

pytestmark = pytest.mark.usefixtures("no_variables")


def test_the_defaults_serve_the_demo_model_to_this_machine_only() -> None:
    config = ServerConfig()
    assert config.model is None
    assert (config.host, config.port, config.bits) == ("127.0.0.1", 8000, 4)
    assert (config.kv_cache_dtype, config.kv_bits, config.kv_budget_bits) == ("turboquant", None, None)
    assert (config.quantize, config.dtype, config.device, config.revision) == ("none", "auto", None, None)
    assert config.load_format == "auto"
    assert (config.max_model_len, config.served_model_name) == (None, ())
    assert (config.gpu_memory_utilization, config.vram_limit, config.kv_cache_memory) == (None, None, None)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (None, 2052)
    assert config.enable_prefix_caching is True
    assert (config.config, config.api_key, config.public_metrics, config.allowed_origins) == (
        None,
        (),
        False,
        (),
    )
    assert (config.ssl_certfile, config.ssl_keyfile, config.vllm_metrics) == (None, None, False)
    assert (config.max_num_queued_requests, config.request_timeout) == (None, None)
    assert (config.sse_keep_alive_interval, config.shutdown_timeout, config.step_timeout) == (15, 30, 120)
    assert config.enforce_eager is False
    assert config.ui is True
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
        ("MAX_MODEL_LEN", " 32k ", 32768),
        ("MAX_MODEL_LEN", "auto", None),
        ("GPU_MEMORY_UTILIZATION", "0.5", 0.5),
        ("GPU_MEMORY_UTILIZATION", "1", 1.0),
        ("VRAM_LIMIT", "10GiB", 10 * 2**30),
        ("VRAM_LIMIT", "", None),
        ("KV_CACHE_MEMORY", " 1000 ", 1000),
        ("MAX_NUM_SEQS", "1", 1),
        ("MAX_NUM_BATCHED_TOKENS", "1024", 1024),
        ("ENABLE_PREFIX_CACHING", "false", False),
        ("API_KEY", "a", ("a",)),
        ("API_KEY", " a,b  c", ("a", "b", "c")),
        ("API_KEY", '["a, b", "c"]', ("a, b", "c")),
        ("API_KEY", "", ()),
        ("API_KEY", "schlüssel", ("schlüssel",)),
        ("ALLOWED_ORIGINS", "*", ("*",)),
        ("ALLOWED_ORIGINS", '["https://a", "http://b:1"]', ("https://a", "http://b:1")),
        ("REQUEST_TIMEOUT", "1.5", 1.5),
        ("SHUTDOWN_TIMEOUT", "0", 0),
        ("TRUST_REMOTE_CODE", "true", True),
        ("TRUST_REMOTE_CODE", "0", False),
        ("SERVED_MODEL_NAME", "a", ("a",)),
        ("SERVED_MODEL_NAME", " a  b ", ("a", "b")),
        ("QUANTIZE", "int4", "int4"),
        ("BITS", "", 4),
        ("KV_CACHE_DTYPE", "bf16", "bf16"),
        ("LOAD_FORMAT", "dummy", "dummy"),
        ("KV_BITS", "4,3", (4, 3)),
        ("KV_BITS", " 8 , 2 ", (8, 2)),
        ("KV_BITS", "", None),
        ("KV_BUDGET_BITS", "3.5", 3.5),
        ("KV_BUDGET_BITS", "4", 4.0),
        ("KV_BUDGET_BITS", "", None),
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
        {"kv_bits": "4"},
        {"kv_bits": "4,"},
        {"kv_bits": ",3"},
        {"kv_bits": "4,3,2"},
        {"kv_bits": "4,5"},
        {"kv_bits": "1,4"},
        {"kv_bits": "4;3"},
        {"kv_bits": "4,three"},
        {"kv_bits": ""},
        {"kv_bits": (4,)},
        {"kv_bits": (4, 16)},
        {"kv_bits": (4, None)},
        {"kv_budget_bits": 0},
        {"kv_budget_bits": -3.5},
        {"kv_budget_bits": "nan"},
        {"kv_budget_bits": "few"},
        {"port": -1},
        {"port": 65536},
        {"quantize": "int3"},
        {"kv_cache_dtype": "bfloat16"},
        {"load_format": "none"},
        {"dtype": "float8"},
        {"max_model_len": 0},
        {"max_model_len": "1"},
        {"max_model_len": "k"},
        {"max_model_len": "32m"},
        {"max_model_len": "1.5k"},
        {"max_model_len": "-2k"},
        {"max_model_len": ""},
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": 1.01},
        {"gpu_memory_utilization": "nan"},
        {"gpu_memory_utilization": "90%"},
        {"vram_limit": 0},
        {"vram_limit": "0GiB"},
        {"vram_limit": "-1GiB"},
        {"vram_limit": "10G"},
        {"vram_limit": "1.5GiB"},
        {"vram_limit": "10 GiB"},
        {"vram_limit": "10B"},
        {"vram_limit": "GiB"},
        {"kv_cache_memory": "much"},
        {"kv_cache_memory": "10iB"},
        {"kv_cache_memory": ""},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 515},
        {"model": ""},
        {"host": ""},
        {"served_model_name": ("a", "")},
        {"api_key": ""},
        {"api_key": " , "},
        {"api_key": ("",)},
        {"api_key": 5},
        {"api_key": '["a"'},
        {"api_key": "[1]"},
        {"api_key": '[""]'},
        {"allowed_origins": ""},
        {"max_num_queued_requests": 0},
        {"request_timeout": 0},
        {"request_timeout": "nan"},
        {"sse_keep_alive_interval": -1},
        {"sse_keep_alive_interval": "inf"},
        {"shutdown_timeout": -1},
        {"step_timeout": 0},
        {"colour": "red"},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_its_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ServerConfig(**arguments)
    assert caught.value.error_count() == 1
    assert caught.value.errors()[0]["loc"][0] == next(iter(arguments))


@pytest.mark.parametrize("bits", ["4,3", "4, 3", (4, 3), [4, 3]], ids=str)
def test_bits_of_keys_and_values_come_as_text_or_as_a_pair(bits: Any) -> None:
    assert ServerConfig(kv_bits=bits).kv_bits == (4, 3)


@pytest.mark.parametrize(("number", "budget"), [("3.5", 3.5), (3.5, 3.5), ("4", 4.0), (16, 16.0)])
def test_a_budget_is_any_positive_number(number: Any, budget: float) -> None:
    assert ServerConfig(kv_budget_bits=number).kv_budget_bits == budget


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("4096", 4096),
        (4096, 4096),
        ("32k", 32768),
        ("128K", 131072),
        ("1k", 1024),
        ("auto", None),
        (None, None),
    ],
)
def test_a_length_is_a_number_or_thousands_of_two_or_auto(text: Any, length: int | None) -> None:
    assert ServerConfig(max_model_len=text).max_model_len == length


@pytest.mark.parametrize("name", ["vram_limit", "kv_cache_memory", "swap_space"])
@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("10737418240", 10 * 2**30),
        ("3KiB", 3 * 2**10),
        ("512MiB", 512 * 2**20),
        ("10GiB", 10 * 2**30),
        ("2TiB", 2 * 2**40),
        ("3KB", 3000),
        ("512MB", 512 * 10**6),
        ("10GB", 10**10),
        ("2TB", 2 * 10**12),
        ("10gib", 10 * 2**30),
        (None, None),
    ],
)
def test_a_size_is_a_number_of_bytes_or_of_a_unit(name: str, text: Any, size: int | None) -> None:
    assert getattr(ServerConfig(**{name: text}), name) == size


CHOICES = (
    {"bits": "4", "kv_bits": "4,3", "kv_budget_bits": "3.5"},
    {"kv_cache_memory": "1GiB", "gpu_memory_utilization": "0.9"},
    {"kv_cache_memory": "1GiB", "vram_limit": "10GB"},
)
PAIRS = [
    pytest.param(choices, *pair, id="-".join(pair))
    for choices in CHOICES
    for pair in itertools.permutations(choices, 2)
]


@pytest.mark.parametrize(("choices", "by_argument", "by_variable"), PAIRS)
def test_only_one_way_to_choose_bits_or_memory_is_taken(
    monkeypatch: pytest.MonkeyPatch, choices: dict[str, str], by_argument: str, by_variable: str
) -> None:
    both = {by_argument: choices[by_argument], by_variable: choices[by_variable]}
    flags = " and ".join("--" + name.replace("_", "-") for name in choices if name in both)
    with pytest.raises(ValidationError) as by_arguments:
        ServerConfig(**both)
    monkeypatch.setenv(f"TURBOQUANT_{by_variable.upper()}", choices[by_variable])
    with pytest.raises(ValidationError) as by_either:
        ServerConfig(**{by_argument: choices[by_argument]})
    monkeypatch.setenv(f"TURBOQUANT_{by_argument.upper()}", choices[by_argument])
    with pytest.raises(ValidationError) as by_variables:
        ServerConfig()
    for caught in (by_arguments, by_either, by_variables):
        (finding,) = caught.value.errors()
        assert finding["msg"] == f"choose one of {flags}"


def test_a_choice_is_one_even_where_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_BITS", "4")
    with pytest.raises(ValidationError, match="choose one of --bits and --kv-bits"):
        ServerConfig(kv_bits="4,4")


@pytest.mark.parametrize(("name", "text"), CHOICES[0].items())
def test_bits_are_for_a_compressed_cache(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    assert ServerConfig(kv_cache_dtype="turboquant", **{name: text}).kv_cache_dtype == "turboquant"
    with pytest.raises(ValidationError) as by_arguments:
        ServerConfig(kv_cache_dtype="bf16", **{name: text})
    monkeypatch.setenv(f"TURBOQUANT_{name.upper()}", text)
    with pytest.raises(ValidationError) as by_either:
        ServerConfig(kv_cache_dtype="bf16")
    for caught in (by_arguments, by_either):
        (finding,) = caught.value.errors()
        assert finding["msg"] == f"choose one of {flag} and --kv-cache-dtype bf16"


def test_a_cache_of_16_bits_needs_no_bits() -> None:
    config = ServerConfig(kv_cache_dtype="bf16", kv_bits=None, kv_budget_bits=None)
    assert config.kv_cache_dtype == "bf16"


def test_nothing_is_no_choice() -> None:
    assert ServerConfig(bits=3, kv_bits=None, kv_budget_bits=None).bits == 3
    assert ServerConfig(kv_cache_memory=1, vram_limit=None, gpu_memory_utilization=None).kv_cache_memory == 1


def test_a_share_and_a_limit_of_memory_go_together() -> None:
    config = ServerConfig(gpu_memory_utilization=0.5, vram_limit="10GiB")
    assert (config.gpu_memory_utilization, config.vram_limit) == (0.5, 10 * 2**30)


@pytest.mark.parametrize("bits", [4, 4.0])
def test_one_number_is_no_pair_of_bits(bits: Any) -> None:
    with pytest.raises(ValidationError, match="two of 2, 3, 4 and 8"):
        ServerConfig(kv_bits=bits)


def test_an_empty_variable_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_BITS", "")
    assert ServerConfig(kv_bits="4,3").kv_bits == (4, 3)


@pytest.mark.parametrize("given", ["ssl_certfile", "ssl_keyfile"])
def test_a_certificate_and_its_key_go_together(given: str) -> None:
    with pytest.raises(ValidationError, match="give both --ssl-certfile and --ssl-keyfile, or none"):
        ServerConfig(**{given: "a.pem"})
    assert ServerConfig(ssl_certfile="a.pem", ssl_keyfile="b.pem").ssl_keyfile == "b.pem"


def test_a_key_is_not_shown_with_the_other_settings() -> None:
    config = ServerConfig(api_key="secret-key")
    assert "secret" not in repr(config) and "secret" not in str(config)


def test_every_setting_but_the_file_is_in_one_group() -> None:
    names = [name for group in config.GROUPS.values() for name in group.model_fields]
    assert sorted([*names, "config"]) == sorted(ServerConfig.model_fields)


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError):
        ServerConfig().port = 1  # type: ignore[misc]


def test_the_bits_are_those_of_the_cache() -> None:
    assert cache_config.SUPPORTED_BITS == core_config.SUPPORTED_BITS
