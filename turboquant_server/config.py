"""What a server can be told: flags, then TURBOQUANT_* variables, then a YAML file, then the defaults below.

Those of the KV cache are in cache_config.py, of the HTTP side in door_config.py, and of models that come and
go in life_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from turboquant_server.cache_config import CacheConfig
from turboquant_server.config_file import ConfigFileSource, flag
from turboquant_server.door_config import DoorConfig, Text
from turboquant_server.life_config import LifeConfig, split_models

ENV_PREFIX = "TURBOQUANT_"
BITS = ("bits", "kv_bits", "kv_budget_bits")
# Of these, one may be given.
CHOICES = (
    BITS,
    ("kv_cache_memory", "gpu_memory_utilization"),
    ("kv_cache_memory", "vram_limit"),
)


class ModelConfig(BaseModel):
    """Say what is served."""

    model: Text | None = Field(
        None,
        description="Hugging Face model id or directory (default: the small demo model that comes along)",
    )
    served_model_name: Annotated[tuple[Text, ...], NoDecode] = Field(
        (), description="one or more names that clients use for the model (default: --model as given)"
    )
    revision: Text | None = Field(
        None, description="branch, tag or commit of the model on the Hugging Face Hub"
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto",
        description="where weights come from: auto reads the checkpoint, dummy makes random ones and needs "
        "only a config.json, to try out memory and speed",
    )
    device: Text | None = Field(
        None, description="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="GPUs of this machine that share the model, each with a part of its heads"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="type of the model's weights: auto, bfloat16, float16 or float32"
    )
    quantize: Literal["none", "int8", "int4"] = Field(
        "none", description="quantize the model's weights with bitsandbytes: none, int8 or int4"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    tool_call_parser: Literal[
        "auto",
        "none",
        "deepseek_v3",
        "deepseek_v31",
        "hermes",
        "llama3_json",
        "mistral",
        "openai",
        "qwen3_coder",
    ] = Field(
        "auto",
        description="how the model writes tool calls: auto finds it in the chat template, none leaves them "
        "in the text; or deepseek_v3, deepseek_v31, hermes, llama3_json, mistral, openai or qwen3_coder",
    )
    reasoning_parser: Literal["auto", "none", "deepseek_r1", "mistral", "openai_gptoss", "qwen3"] = Field(
        "auto",
        description="how the model marks its reasoning: auto finds it in the chat template, none leaves it "
        "in the text; or deepseek_r1, mistral, openai_gptoss or qwen3",
    )

    @field_validator("served_model_name", mode="before")
    @classmethod
    def _split_names(cls, names: Any) -> Any:
        """Take the names apart where they come as one string, from the environment."""
        return tuple(names.split()) if isinstance(names, str) else names


class StepConfig(BaseModel):
    """Say how much is worked on at a time."""

    max_model_len: int | None = Field(
        None,
        ge=2,
        description="most tokens of prompt and answer together, such as 4096 or 32k (32768); auto is what "
        "the model was made for or what the cache's memory holds, whichever is less (default: auto)",
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="most requests that run at a time (default: what the memory allows, at most 256)",
    )
    max_num_batched_tokens: int = Field(
        2052,  # four parts of 512 and a prompt's first 4 tokens, which come with the first part
        ge=1024,  # the longest part of a prompt that has to be read in one step has 643
        description="most prompt tokens that one step reads, at least 1024; best a multiple of 512, and 4",
    )
    enforce_eager: bool = Field(
        False,
        description="neither compile the model nor run steps as CUDA graphs: a faster start, slower answers",
    )

    @field_validator("max_model_len", mode="before")
    @classmethod
    def _parse_length(cls, length: Any) -> Any:
        if not isinstance(length, str):
            return length
        if length.strip() == "auto":
            return None
        match = re.fullmatch(r"(\d+)(k?)", length.strip(), re.IGNORECASE)
        if match is None:
            raise PydanticCustomError(
                "no_length", "Input should be a number of tokens such as 4096 or 32k, or auto"
            )
        return int(match[1]) * (1024 if match[2] else 1)


class ModelSettings(ModelConfig, CacheConfig, StepConfig):
    """Hold what one of several models may be told."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="after")
    def _check_choices(self) -> ModelSettings:
        chosen = [self._chosen(names) for names in CHOICES]
        if self.kv_cache_dtype == "bf16":
            chosen.append([*self._chosen(BITS), "--kv-cache-dtype bf16"])
            if self.fidelity_sample_rate:
                chosen.append(["--fidelity-sample-rate", "--kv-cache-dtype bf16"])
        for flags in chosen:
            if len(flags) > 1:
                raise PydanticCustomError(
                    "two_choices", "choose one of {flags}", {"flags": " and ".join(flags)}
                )
        if self.swap_space and not self.enable_prefix_caching:
            raise PydanticCustomError(
                "needs_prefixes",
                "--swap-space holds prompts that begin alike and needs --enable-prefix-caching",
            )
        return self

    def _chosen(self, names: Sequence[str]) -> list[str]:
        """Return the flags of fields that were given a value, be it the default."""
        given = [name for name in names if name in self.model_fields_set]
        return [flag(name) for name in given if getattr(self, name) is not None]


# The flags of each stand together in --help.
GROUPS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "several models, idle models": LifeConfig,
    "KV cache": CacheConfig,
    "requests and steps": StepConfig,
    "HTTP": DoorConfig,
}


class ServerConfig(ModelSettings, LifeConfig, DoorConfig, BaseSettings):
    """Hold every setting of one server.

    Each field is the flag ``--name``, the variable ``TURBOQUANT_NAME`` and the key ``name`` of the file that
    ``config`` names; an argument given here wins over the variable, and that over the file. The descriptions
    are the text of ``--help``.

    Raises:
        pydantic.ValidationError: A value is of the wrong type or out of its range.
        ConfigFileError: The file cannot be read.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    config: Text | None = Field(
        None, description="YAML file with more settings, such as max-model-len: 32k; flags and variables win"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return where settings come from, what wins first."""
        return init_settings, env_settings, ConfigFileSource(settings_cls)

    @model_validator(mode="after")
    def _check_models(self) -> ServerConfig:
        configs = self.of_models()
        goes = self.models or self.idle_unload or self.admin_key
        if goes and any(one.tensor_parallel_size > 1 for one in configs):
            raise PydanticCustomError(
                "ranks_stay",
                "--tensor-parallel-size is for one model that stays; leave out --models, --idle-unload and "
                "--admin-key",
            )
        if "max_loaded_models" in self.model_fields_set and not self.models:
            raise PydanticCustomError("needs_models", "--max-loaded-models is for several --models")
        return self

    def of_models(self) -> list[ServerConfig]:
        """Return the configuration of each model: what its entry of ``models`` says, else what is said here.

        Raises:
            PydanticCustomError: An entry says something wrong.
        """
        return split_models(self, ModelSettings) if self.models else [self]
