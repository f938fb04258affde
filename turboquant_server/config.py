"""What a server can be told: command-line flags, then TURBOQUANT_* variables, then the defaults below."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "TURBOQUANT_"
SUPPORTED_BITS = (2, 3, 4, 8)

Text = Annotated[str, Field(min_length=1)]


class ServerConfig(BaseSettings):
    """Hold every setting of one server.

    Each field is the flag ``--name`` and the variable ``TURBOQUANT_NAME``; an argument given here wins over
    the variable. The descriptions are the text of ``--help``.

    Raises:
        pydantic.ValidationError: A value is of the wrong type or out of its range.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    model: Text | None = Field(
        None,
        description="Hugging Face model id or directory (default: the small demo model that comes along)",
    )
    bits: int = Field(4, description="bits per stored number of the compressed KV cache: 2, 3, 4 or 8")
    kv_bits: Annotated[tuple[int, int] | None, NoDecode] = Field(
        None, description="bits of keys and of values apart, such as 4,3 (default: --bits for both)"
    )
    kv_budget_bits: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="average bits per number, norms and means included, such as 3.5; each layer gets the "
        "bits that it needs (default: --bits for all)",
    )
    quantize: Literal["none", "int8", "int4"] = Field(
        "none", description="quantize the model's weights with bitsandbytes: none, int8 or int4"
    )
    device: Text | None = Field(
        None, description="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="type of the model's weights: auto, bfloat16, float16 or float32"
    )
    revision: Text | None = Field(
        None, description="branch, tag or commit of the model on the Hugging Face Hub"
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="most tokens of prompt and answer together (default: what the model was made for)",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    served_model_name: Annotated[tuple[Text, ...], NoDecode] = Field(
        (), description="one or more names that clients use for the model (default: --model as given)"
    )
    host: Text = Field("127.0.0.1", description="address to listen on; 0.0.0.0 means all")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int) -> int:
        if bits not in SUPPORTED_BITS:
            raise PydanticCustomError("unsupported_bits", "Input should be 2, 3, 4 or 8")
        return bits

    @field_validator("kv_bits", mode="before")
    @classmethod
    def _split_bits(cls, bits: Any) -> Any:
        if bits is None:
            return None
        parts = bits.split(",") if isinstance(bits, str) else bits
        if (
            not isinstance(parts, (list, tuple))
            or len(parts) != 2
            or any(str(part).strip() not in map(str, SUPPORTED_BITS) for part in parts)
        ):
            raise PydanticCustomError(
                "unsupported_bits", "Input should be two of 2, 3, 4 and 8 with a comma between them"
            )
        return tuple(int(part) for part in parts)

    @field_validator("served_model_name", mode="before")
    @classmethod
    def _split_names(cls, names: Any) -> Any:
        """Take the names apart where they come as one string, from the environment."""
        return tuple(names.split()) if isinstance(names, str) else names

    @model_validator(mode="after")
    def _check_one_choice_of_bits(self) -> ServerConfig:
        names = [name for name in ("bits", "kv_bits", "kv_budget_bits") if name in self.model_fields_set]
        chosen = [name for name in names if getattr(self, name) is not None]
        if len(chosen) > 1:
            flags = " and ".join("--" + name.replace("_", "-") for name in chosen)
            raise PydanticCustomError("two_choices", "choose one of {flags}", {"flags": flags})
        return self
