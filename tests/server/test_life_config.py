"""Several models and how long they stay: from flags, variables and a file to a configuration of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turboquant_server.config import ServerConfig
from turboquant_server.flags import parse_config

pytestmark = pytest.mark.usefixtures("no_variables")


def named(config: ServerConfig) -> list[tuple[str | None, tuple[str, ...]]]:
    return [(one.model, one.served_model_name) for one in config.of_models()]


def test_models_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [("org/x", ("a",)), ("/y=z", ("b",))]
    assert named(parse_config(["--models", "a=org/x", "b=/y=z"])) == expected
    monkeypatch.setenv("TURBOQUANT_MODELS", "a=org/x b=/y=z")
    assert named(ServerConfig()) == expected
    assert named(ServerConfig(models=())) == [(None, ())]


def test_an_entry_of_the_file_wins_for_its_model(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    entries = "- {name: a b, model: x, bits: 2}\n- {name: c, model: y, max_model_len: 2k}\n"
    path.write_text(f"bits: 3\nmax-model-len: 1k\nmodels:\n{entries}")
    one, other = parse_config(["--config", str(path), "--port", "9"]).of_models()
    assert (one.served_model_name, one.bits, one.max_model_len, one.port) == (("a", "b"), 2, 1024, 9)
    assert (other.model, other.bits, other.max_model_len) == ("y", 3, 2048)
    assert one.models == other.models == ()
    assert one.of_models() == [one]


def test_an_entry_of_the_file_may_say_otherwise_than_one_that_it_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("models:\n- &a {name: a, model: x, bits: 2}\n- {<<: *a, name: b, max_model_len: 2k}\n")
    one, other = parse_config(["--config", str(path)]).of_models()
    assert (one.served_model_name, one.bits, one.max_model_len) == (("a",), 2, None)
    assert (other.served_model_name, other.model, other.bits, other.max_model_len) == (("b",), "x", 2, 2048)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("90s", 90), ("10m", 600), (" 1 H", 3600), (5, 5)]
)
def test_durations_have_units(text: Any, seconds: float) -> None:
    assert ServerConfig(idle_unload=text).idle_unload == seconds


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--idle-unload", "0"], "--idle-unload: input should be greater than 0"),
        (["--idle-unload=-1"], "such as 90s, 10m or 1h, got '-1'"),
        (["--idle-unload", "5 days"], "such as 90s, 10m or 1h"),
        (["--max-loaded-models", "0"], "--max-loaded-models"),
        (["--max-loaded-models", "2"], "--max-loaded-models is for several --models"),
        (["--models", "x"], "with their names"),
        (["--models", "=x"], "with their names"),
        (["--models", "a=x", "a=y"], "a name of its own"),
        (["--models", "a=x", "--model", "y"], "choose one of --model and --models"),
        (["--models", "a=x", "--served-model-name", "y"], "choose one of --served-model-name and --models"),
        (["--models", "a=x", "--max-loaded-models", "2"], "needs --kv-cache-memory"),
        (["--models", "a=x", "--tensor-parallel-size", "2"], "for one model that stays"),
        (["--idle-unload", "9", "--tensor-parallel-size", "2"], "for one model that stays"),
        (["--admin-key", "k", "--tensor-parallel-size", "2"], "for one model that stays"),
    ],
)
def test_what_does_not_fit_is_told(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: a, model: x, bits: 5}", "--models, a: bits: input should be 2, 3, 4 or 8, got 5"),
        ("{name: a, model: x, bitz: 4}", "--models, a: unknown key 'bitz'; did you mean bits?"),
        ("{name: a, model: x, port: 1}", "--models, a: unknown key 'port'"),
        ("{name: a, model: x, bits: 4, kv-bits: '4,3'}", "--models, a: choose one of --bits and --kv-bits"),
        ("{name: 5, model: x}", "--models, 5: served-model-name: "),
        ("{model: a}", "with their names"),
        ("{name: a, bits: 3}", "with their names"),
        ("[]", "with their names"),
    ],
)
def test_what_is_wrong_with_an_entry_is_told(
    entry: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"models: [{entry}]")
    with pytest.raises(SystemExit):
        parse_config(["--config", str(tmp_path / "c.yaml")])
    assert words in capsys.readouterr().err


def test_an_admin_key_is_no_part_of_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert "secret" not in repr(ServerConfig(admin_key="secret"))
    with pytest.raises(SystemExit):
        parse_config(["--admin-key", "[secret"])
    assert "secret" not in capsys.readouterr().err
