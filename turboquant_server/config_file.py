"""The YAML file of --config, whose keys are the flags' names. Checks only these; values come later."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

# What vLLM calls them.
ALIASES = {
    "kv_cache_memory_bytes": "kv_cache_memory",
    "max_num_queued_reqs": "max_num_queued_requests",
}


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


class ConfigFileError(ValueError):
    """A file cannot be read as settings; the message is one sentence that names it."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Read YAML, and refuse a key that is there twice, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Look at a mapping as it is written: what `<<` brings in may be said otherwise beside it."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(keys) > len(set(keys)):
            raise yaml.MarkedYAMLError(problem="a key is there twice", problem_mark=node.start_mark)
        return node


class ConfigFileSource(PydanticBaseSettingsSource):
    """Read the file that the setting ``config`` names, if any source before this one has set it."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Nothing asks for single fields; ``__call__`` returns all."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Return the file's settings.

        Raises:
            ConfigFileError: It is not there, no YAML, or has a key that is no setting.
        """
        path = self.current_state.get("config")
        return read_config_file(path, self.settings_cls) if isinstance(path, str) else {}


def read_config_file(path: str, settings: type[BaseSettings]) -> dict[str, Any]:
    """Return the values of a YAML file by the names of their fields; null stands for nothing.

    Raises:
        ConfigFileError: It is not there, no YAML, or has a key that is no setting.
    """
    try:
        content = yaml.load(Path(path).read_text("utf-8"), _Loader)
    except OSError as error:
        raise ConfigFileError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        place = f" at line {mark.line + 1}" if mark is not None else ""
        problem = f" ({problem})" if problem else ""
        raise ConfigFileError(f"--config {path}: is not valid YAML{place}{problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigFileError(f"--config {path}: must hold flags with values, such as max-model-len: 32k")
    known = settings.model_fields.keys() - {"config"}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in known:
            raise ConfigFileError(f"--config {path}: unknown key '{key}'{did_you_mean(name, known)}")
        if name in values:
            raise ConfigFileError(f"--config {path}: '{name}' is there twice")
        annotation = settings.model_fields[name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):  # not a number 0 or 1
            raise ConfigFileError(f"--config {path}: {key}: cannot be {str(value).lower()}")
        values[name] = value
    return {name: value for name, value in values.items() if value is not None}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the closest known one, if any is close."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
