"""What replicas are told: all that a server is, but for where it listens, and how many there are."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from turboquant_server.config import ServerConfig
from turboquant_server.life_config import LifeConfig

# What Serve's proxy decides.
LISTENING = ("host", "port", "ssl_certfile", "ssl_keyfile")
# A replica keeps the model that it was started with.
LIFE = (*LifeConfig.model_fields, "admin_key")


class DeployConfig(ServerConfig):
    """Hold the settings of a server, but for where it listens, and how many of it there are."""

    num_replicas: int = Field(1, ge=1, description="replicas that always run")
    max_replicas: int | None = Field(
        None,
        ge=1,
        description="most replicas, started and ended as requests come (default: num_replicas)",
    )
    target_ongoing_requests: float = Field(
        16, gt=0, description="requests of a replica, waiting ones included, above which another one starts"
    )

    @model_validator(mode="after")
    def _check_models(self) -> DeployConfig:
        """Take the place of the check of a server that may have several."""
        for name in LIFE:
            if name in self.model_fields_set:
                message = "{name} is not for replicas: each keeps its one model"
                raise PydanticCustomError("not_here", message, {"name": name})
        return self

    @model_validator(mode="after")
    def _check_replicas(self) -> DeployConfig:
        for name in LISTENING:
            if name in self.model_fields_set and getattr(self, name) is not None:
                message = "{name} is not for replicas: Ray Serve listens (serve start --http-port)"
                raise PydanticCustomError("not_here", message, {"name": name})
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise PydanticCustomError("too_few", "max_replicas must not be less than num_replicas")
        return self

    def server_settings(self) -> dict[str, Any]:
        """Return what was given, variables and file included, as arguments of each replica's ServerConfig."""
        own = DeployConfig.model_fields.keys() - ServerConfig.model_fields.keys()
        return self.model_dump(exclude_unset=True, exclude={*own, "config"})
