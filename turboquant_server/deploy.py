"""Replicas of the server on Ray Serve: ``serve run turboquant_server.deploy:build num_replicas=2``.

Serve's own proxy chooses a replica before it has read the body of a request. So the application has two
deployments: Front reads the body, chooses by how the prompt begins, and passes the response on; each Server
is the application of app.py as it is, on a model of its own. Nothing else here knows of Ray.
"""

# Without `from __future__ import annotations`: Serve looks at the type of build's argument.

import asyncio
import logging
import random
import sys
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import RequestRouter
from starlette.types import Message, Scope

from turboquant_server.app import build_app, check_health
from turboquant_server.cli import SPIN_COUNT, SWITCH_INTERVAL, configure_logging
from turboquant_server.config import ServerConfig
from turboquant_server.deploy_config import DeployConfig
from turboquant_server.prompt_routing import order_replicas, prompt_beginning
from turboquant_server.relay import Relay, ReplicaLostError

logger = logging.getLogger(__name__)

# Far above what runs at a time: requests wait in the engine, whose door says when there are too many.
MAX_ONGOING_REQUESTS = 4096
# In seconds: until all replicas have said how they are, and from one look of Serve's at each to the next.
STATUS_TIMEOUT = 10
HEALTH_CHECK_PERIOD = 2


class PromptRouter(RequestRouter):  # type: ignore[misc]
    """Choose the replica that has read the beginning of a prompt; for what has none, the idler of two."""

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        """Return the replicas to be tried, rank by rank."""
        beginning = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            beginning = prompt_beginning(pending_request.args[1])
        if beginning is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {
            name: self.replica_queue_len_cache.get(replica.replica_id) or 0
            for name, replica in replicas.items()
        }
        return [[replicas[name]] for name in order_replicas(beginning, loads)]


class Server:
    """One replica: a model, and the application that serves it.

    Args:
        settings: Fields of its ServerConfig.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        # Here, because it imports torch, for which Front has no use.
        from turboquant_server.model_manager import ModelManager

        configure_logging()
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._model_manager = ModelManager(ServerConfig(**settings))
        self._model_manager.load()
        self._app = build_app(self._model_manager)
        logger.info("\n%s", self._model_manager.startup_report())

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Answer one request; ending early means that the client has left.

        Yields:
            The ASGI messages that have come since the last ones.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        request: list[Message] = [{"type": "http.request", "body": body}]

        async def receive() -> Message:
            if not request:
                await asyncio.Event().wait()  # if the client leaves, the task is cancelled
            return request.pop()

        working = asyncio.create_task(self._app(scope, receive, messages.put))
        working.add_done_callback(lambda task: messages.put_nowait(None))
        try:
            while not working.done() or not messages.empty():
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                yield [message for message in batch if message is not None]
            if error := working.exception():  # the client has been told
                logger.error("a request ended with an error", exc_info=error)
        finally:
            working.cancel()

    async def answer_at_once(self, scope: Scope) -> tuple[str, list[Message]]:
        """Return this replica's name and its whole answer to a request without a body."""
        messages = [message async for batch in self.answer(scope, b"") for message in batch]
        return serve.get_replica_context().replica_id.unique_id, messages

    def check_health(self) -> None:
        """Raise an error if this replica has to be replaced; Serve asks every few seconds."""
        check_health(self._model_manager)


@serve.ingress()
class Front:
    """Pass requests on to the replicas.

    Args:
        server: Serve's handle of them.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def __serve_build_asgi_app__(self) -> Relay:
        return Relay(self._answer, self._ask_all)

    async def _answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        answer = self._server.options(stream=True).answer.remote(scope, body)
        try:
            async for messages in answer:
                yield messages
        except (RayActorError, RayServeException) as error:
            raise ReplicaLostError(str(error)) from error
        finally:
            answer.cancel()

    async def _ask_all(self, scope: Scope) -> dict[str, list[Message]]:
        answers = self._server.broadcast("answer_at_once", scope)
        try:
            return dict(await answers.results_async(timeout_s=STATUS_TIMEOUT))
        except (RayActorError, RayServeException, TimeoutError) as error:
            raise ReplicaLostError(str(error)) from error


def build(config: DeployConfig) -> serve.Application:
    """Return the application that ``serve run`` and Serve's configuration files name.

    Args:
        config: From ``name=value`` on the command line or ``args`` in the file, TURBOQUANT_* variables and
            the file that ``config`` names.
    """
    scale: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": config.num_replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.target_ongoing_requests,
            }
        }
    options = {
        **scale,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        # A replica that is to end gets no more requests, and so long for those that it has.
        "graceful_shutdown_timeout_s": config.shutdown_timeout,
    }
    if config.device is None:
        uses_gpu = ray.cluster_resources().get("GPU", 0) > 0
    else:
        uses_gpu = config.device.startswith("cuda")
    server = serve.deployment(
        Server,
        **options,
        health_check_period_s=HEALTH_CHECK_PERIOD,
        request_router_config=RequestRouterConfig(request_router_class=PromptRouter),
        ray_actor_options={
            "num_gpus": uses_gpu * config.tensor_parallel_size,
            "runtime_env": {"env_vars": dict([SPIN_COUNT])},
        },
    )
    front = serve.deployment(Front, **options, ray_actor_options={"num_cpus": 0})
    return front.bind(server.bind(config.server_settings()))
