"""The command ``turboquant-server``: flags, the socket, the process's life and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn
from pydantic import ValidationError

from turboquant_server import __version__
from turboquant_server.config import ENV_PREFIX, ServerConfig

if TYPE_CHECKING:
    from turboquant_server.model_manager import ModelManager

PROGRAM = "turboquant-server"
DRAIN_SECONDS = 30
CUT_OFF_SECONDS = 5  # after those, for the last words of what has not finished
EXAMPLE_QUESTION = "The access code of the harbour is 271828. What is the access code of the harbour?"

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a model until SIGINT or SIGTERM.

    Args:
        argv: The arguments; the process's own by default.

    Returns:
        The exit status: 0 after a signal, 1 when the server could not start.

    Raises:
        SystemExit: ``--help``, ``--version`` (0) or a wrong flag or variable (2).
    """
    config = parse_config(sys.argv[1:] if argv is None else argv)
    _configure_logging()
    # Both signals end the process by KeyboardInterrupt; while uvicorn runs, it takes them and drains first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(config)
    except KeyboardInterrupt:
        return 0
    except StartError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _configure_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for library in ("httpx", "httpx2", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its messages itself
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Drop the traceback of each request that uvicorn cancels when the time to finish is over."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class StartError(RuntimeError):
    """The server cannot start; the message is one sentence that says what to do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one sentence, without the usage that would bury it."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {PROGRAM} --help)\n")


def parse_config(argv: Sequence[str]) -> ServerConfig:
    """Return the configuration that flags and TURBOQUANT_* variables make.

    Raises:
        SystemExit: ``--help``, ``--version`` (0) or a wrong flag or variable (2).
    """
    parser = _Parser(
        PROGRAM,
        description="Serve a Hugging Face model with OpenAI's API, each request on a compressed KV cache.",
        epilog=f"Each flag may also be set by a variable: --max-model-len by {ENV_PREFIX}MAX_MODEL_LEN.",
        argument_default=argparse.SUPPRESS,  # so that a variable counts where a flag is not given
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    for name, field in ServerConfig.model_fields.items():
        default = "" if field.default in (None, (), False) else f" (default: {field.default})"
        options: dict[str, Any] = {"help": f"{field.description}{default}"}
        if field.annotation is bool:
            options["action"] = "store_true"
        else:
            options["metavar"] = name.upper()
        if name == "served_model_name":
            options["nargs"] = "+"
        parser.add_argument(_flag(name), **options)
    arguments = vars(parser.parse_args([_with_dashes(argument) for argument in argv]))
    try:
        return ServerConfig(**arguments)
    except ValidationError as error:
        finding = error.errors()[0]
        if not finding["loc"]:  # about several fields
            parser.error(finding["msg"])
        name = str(finding["loc"][0])
        source = _flag(name) if name in arguments else f"{ENV_PREFIX}{name.upper()}"
        message = finding["msg"]
        parser.error(f"{source}: {message[:1].lower()}{message[1:]}, got {finding['input']!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_dashes(argument: str) -> str:
    """Read --max_model_len=1 as --max-model-len=1; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def serve(config: ServerConfig) -> None:
    """Listen, load the model, and answer until a signal ends the process.

    Raises:
        StartError: The address cannot be used or the model cannot be served.
        KeyboardInterrupt: SIGINT or SIGTERM, after open requests have had time to finish.
    """
    with _bind(config.host, config.port) as listener:
        # Threads that wait for each other spin this often before they sleep; by default 100 times as long.
        # Beside another busy process a step of 16 requests takes 80 ms then, with 1,000 spins 50; without
        # one 20 in place of 22 (2 cores, the bundled model).
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
        # The engine gives the interpreter away in every operation of torch, and by default it may take the
        # event loop 5 ms to give it back: steps of 16 requests then take twice as long (the same model).
        sys.setswitchinterval(0.0005)
        # Importing torch and transformers takes seconds; an unusable address should be told before.
        from turboquant_server.app import build_app
        from turboquant_server.model_manager import ModelLoadError, ModelManager

        model_manager = ModelManager(config)
        server = _Server(
            uvicorn.Config(
                build_app(model_manager),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=DRAIN_SECONDS + CUT_OFF_SECONDS,
            ),
            model_manager,
        )
        failures: list[str] = []

        def load() -> None:
            try:
                model_manager.load()
            except ModelLoadError as error:
                failures.append(str(error))
                server.should_exit = True
            except Exception as error:
                logger.exception("loading failed")
                failures.append(
                    f"loading the model failed with {type(error).__name__}; the log above has the details"
                )
                server.should_exit = True
            else:
                _print_start(model_manager, listener)

        loader = threading.Thread(target=load, name="load", daemon=True)
        try:
            loader.start()
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            if not model_manager.is_ready and not failures:
                # The interpreter cannot end in order while a thread is inside torch: it would abort.
                os._exit(0)
            raise
        finally:
            if model_manager.is_ready:
                loader.join()
                model_manager.unload()
        if failures:
            raise StartError(failures[0])


class _Server(uvicorn.Server):
    """Give open requests time to finish after a signal, and an error of their own when it is over."""

    def __init__(self, config: uvicorn.Config, model_manager: ModelManager) -> None:
        super().__init__(config)
        self._model_manager = model_manager

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        timer = threading.Timer(DRAIN_SECONDS, self._end_requests)
        timer.daemon = True
        timer.start()

    def _end_requests(self) -> None:
        if self._model_manager.is_ready:
            self._model_manager.engine.shutdown()


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        StartError: The address is taken, unknown or not allowed.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            message = (
                f"port {port} on {host} is in use; stop the program that uses it, or choose another --port"
            )
        else:
            reason = error.strerror if isinstance(error, OSError) else error
            message = f"cannot listen on {host}, port {port} ({reason}); choose another --host or --port"
        raise StartError(message) from error


def _print_start(model_manager: ModelManager, listener: socket.socket) -> None:
    """Print what was loaded, where it is served, and one command to try."""
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        logger.warning(
            "listening on %s without authentication: whoever reaches this port may use the model", host
        )
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    messages = [{"role": "user", "content": EXAMPLE_QUESTION}]
    command = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d "
    print(f"\n{model_manager.startup_report()}\n\nServing on {url}\n")
    print(command + shlex.quote(json.dumps({"messages": messages, "max_tokens": 32})), flush=True)
