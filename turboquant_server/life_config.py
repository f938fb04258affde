"""The settings of models that come and go: which there are, how many are loaded, and for how long."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from turboquant_server.config_file import ALIASES, did_you_mean, flag

Config = TypeVar("Config", bound="LifeConfig")

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


class LifeConfig(BaseModel):
    """Say which models there are and when they are loaded."""

    models: Annotated[tuple[dict[str, Any], ...], NoDecode] = Field(
        (),
        description="several models in place of --model, such as small=org/model big=/a/directory; a request "
        "chooses by name and waits while its model is loaded; in the file each may have flags of its own, "
        "such as {name: small, model: org/model, bits: 3} (default: none)",
    )
    max_loaded_models: int = Field(
        1,
        ge=1,
        description="most of --models in memory at a time; of more than one each needs --kv-cache-memory",
    )
    idle_unload: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="unload a model that had no request for so long, such as 10m, 1h or 90 (seconds); the "
        "next request loads it again (default: never)",
    )

    @field_validator("models", mode="before")
    @classmethod
    def _read_models(cls, entries: Any) -> Any:
        """Make of each entry, a text or the file's keys, settings by the names of their fields."""
        entries = entries.split() if isinstance(entries, str) else entries
        if not isinstance(entries, (list, tuple)):
            raise PydanticCustomError("no_models", "Input should be a list of models")
        return tuple(_read_entry(entry) for entry in entries)

    @field_validator("idle_unload", mode="before")
    @classmethod
    def _parse_duration(cls, duration: Any) -> Any:
        if not isinstance(duration, str):
            return duration
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", duration.strip(), re.IGNORECASE)
        if match is None:
            raise PydanticCustomError(
                "no_duration", "Input should be a number of seconds, or with a unit such as 90s, 10m or 1h"
            )
        return float(match[1]) * UNITS[match[2].lower()]


def _read_entry(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        name, equals, model = entry.partition("=")
        if name and equals and model:
            return {"served_model_name": name, "model": model}
    elif isinstance(entry, dict):
        keys = {key: str(key).replace("-", "_") for key, value in entry.items() if value is not None}
        settings = {ALIASES.get(name, name): entry[key] for key, name in keys.items()}
        names = settings.pop("name", None) or settings.get("served_model_name")
        # Without a model, the bundled one would have a name that promises more.
        if names and settings.get("model"):
            return {**settings, "served_model_name": names}
    raise PydanticCustomError(
        "no_model",
        "Input should be models with their names, such as small=org/model or {name: small, model: org/model}",
    )


def split_models(config: Config, settings: type[BaseModel]) -> list[Config]:
    """Return the configuration of each of several models: what its entry says, else what all share.

    Args:
        config: Has the entries.
        settings: What an entry may say.

    Raises:
        PydanticCustomError: An entry says something wrong, or they do not fit together.
    """
    for name in ("model", "served_model_name"):
        if getattr(config, name):
            context = {"flag": flag(name)}
            raise PydanticCustomError("two_choices", "choose one of {flag} and --models", context)
    fields = settings.model_fields
    shared = {name: getattr(config, name) for name in config.model_fields_set & fields.keys()}
    shared.pop("model", None)
    ones = []
    for entry in config.models:
        try:
            ones.append(settings(**{**shared, **entry}))
        except ValidationError as error:
            reason = _describe(error, fields)
            context = {"name": str(entry["served_model_name"]), "reason": reason}
            raise PydanticCustomError("wrong_model", "--models, {name}: {reason}", context) from error
    dumps = [{name: getattr(one, name) for name in one.model_fields_set} for one in ones]
    names = [name for dump in dumps for name in dump["served_model_name"]]
    if len(names) > len(set(names)):
        raise PydanticCustomError("same_name", "--models: each model needs a name of its own")
    if config.max_loaded_models > 1 and any(dump.get("kv_cache_memory") is None for dump in dumps):
        raise PydanticCustomError(
            "no_size",
            "--max-loaded-models above 1 needs --kv-cache-memory, one for all models or for each its own, so "
            "that they fit beside each other",
        )
    return [config.model_copy(update={**dump, "models": ()}) for dump in dumps]


def _describe(error: ValidationError, known: Iterable[str]) -> str:
    finding = error.errors()[0]
    message: str = finding["msg"]
    if not finding["loc"]:
        return message
    name = str(finding["loc"][0])
    key = name.replace("_", "-")
    if finding["type"] == "extra_forbidden":
        return f"unknown key '{key}'{did_you_mean(name, known)}"
    return f"{key}: {message[:1].lower()}{message[1:]}, got {finding['input']!r}"
