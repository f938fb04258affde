"""The settings of the HTTP side: where the server listens, whom it lets in, and how long it waits."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

Text = Annotated[str, Field(min_length=1)]


class DoorConfig(BaseModel):
    """Say how clients reach the server."""

    host: Text = Field("127.0.0.1", description="address to listen on; 0.0.0.0 means all")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    api_key: Annotated[tuple[Text, ...], NoDecode] = Field(
        (),
        repr=False,
        description="one or more keys, of which clients must send one: all paths but /health and the pages "
        "ask for it; better given by the variable or the file, because others see a command line "
        "(default: none)",
    )
    admin_key: Annotated[tuple[Text, ...], NoDecode] = Field(
        (),
        repr=False,
        description="one or more keys that may load and unload models at POST /v1/models/load and "
        "/v1/models/unload, and do what --api-key may (default: none, and nobody may)",
    )
    public_metrics: bool = Field(False, description="serve /metrics without a key, too")
    ui: bool = Field(True, description="serve a page at /, to chat with the model and watch the server")
    allowed_origins: Annotated[tuple[Text, ...], NoDecode] = Field(
        (),
        description="origins of web pages that may call the server from a browser, such as "
        "https://chat.example.org, or * for all (default: none)",
    )
    ssl_certfile: Text | None = Field(
        None, description="PEM file with the certificate chain; with --ssl-keyfile, the server speaks HTTPS"
    )
    ssl_keyfile: Text | None = Field(None, description="PEM file with the certificate's private key")
    max_num_queued_requests: int | None = Field(
        None,
        ge=1,
        description="most requests that wait for their start; one that comes then is refused with 429 "
        "(default: no limit)",
    )
    request_timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="most seconds from a request's arrival to the end of its answer, without the loading of "
        "its model; then it ends with an error (default: no limit)",
    )
    sse_keep_alive_interval: float = Field(
        15,
        ge=0,
        allow_inf_nan=False,
        description="seconds from one comment in a stream to the next, which keep proxies from cutting it "
        "while no token comes; 0 sends none",
    )
    shutdown_timeout: int = Field(
        30,
        ge=0,
        description="seconds that open requests have to finish after SIGTERM or SIGINT; a second signal ends "
        "them at once",
    )
    step_timeout: int = Field(
        120,
        gt=0,
        description="seconds without the end of a step, while there is work, after which /health answers 503",
    )
    vllm_metrics: bool = Field(
        False, description="give metrics vLLM's names, too: vllm:... beside turboquant:..."
    )

    @field_validator("api_key", "admin_key", "allowed_origins", mode="before")
    @classmethod
    def _split_list(cls, items: Any) -> Any:
        """Take texts apart at commas and spaces, or as JSON, and refuse what would leave none.

        ``--api-key "$KEY"`` without such a variable must not open the door.
        """
        texts = [items] if isinstance(items, str) else items
        if not isinstance(texts, (list, tuple)):  # a number of the file, say
            raise PydanticCustomError("no_text", "Input should be text, in quotes if it looks like a number")
        if not all(isinstance(text, str) for text in texts):
            return items
        parts: list[Any] = []
        for text in texts:
            if text.strip().startswith("["):
                try:
                    parts += json.loads(text)
                except ValueError as error:
                    raise PydanticCustomError("no_list", "Input should be valid as a JSON list") from error
            else:
                parts += text.replace(",", " ").split()
        if texts and not parts:
            raise PydanticCustomError("empty", "Input should not be empty")
        return tuple(parts)

    @model_validator(mode="after")
    def _check_tls(self) -> DoorConfig:
        if (self.ssl_keyfile is None) is not (self.ssl_certfile is None):
            raise PydanticCustomError("half_tls", "give both --ssl-certfile and --ssl-keyfile, or none")
        return self
