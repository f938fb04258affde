"""The command ``turboquant-server``: the socket, the process's life and what it prints."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import json
import logging
import os
import shlex
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import uvicorn

from turboquant_server.api.request_id import add_request_id
from turboquant_server.draining_server import CUT_OFF_SECONDS, DrainingServer
from turboquant_server.flags import PROGRAM, parse_config, warn_of_unknown_variables

if TYPE_CHECKING:
    from turboquant_server.config import ServerConfig
    from turboquant_server.model_manager import ModelManager

EXAMPLE_QUESTION = "The access code of the harbour is 271828. What is the access code of the harbour?"

# Threads that wait for each other spin this often before they sleep; by default 100 times as long. Beside
# another busy process a step of 16 requests takes 80 ms then, with 1,000 spins 50; without one 20 in place
# of 22 (2 cores, the bundled model).
SPIN_COUNT = ("GOMP_SPINCOUNT", "3000")
# In seconds. The engine gives the interpreter away in every operation of torch, and by default it may take
# the event loop 5 ms to give it back: steps of 16 requests then take twice as long (the same model); with
# 0.03 ms, 128 streams of an 8B shape on an H200 are 10% slower than with this, as threads change too often.
SWITCH_INTERVAL = 0.0001

# Longer than proxies keep idle connections, nginx and AWS's balancers for 60 seconds, cloudflared for 90: now
# and then they would send a request on one that is just being closed.
KEEP_ALIVE_SECONDS = 100

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
    configure_logging()
    warn_of_unknown_variables(os.environ)
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


def configure_logging() -> None:
    """Log lines with the id of the request that they are about."""
    handler = logging.StreamHandler()
    handler.addFilter(add_request_id)
    line = "%(asctime)s %(levelname)s %(name)s%(request_id)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, handlers=[handler])
    for library in ("httpx", "httpx2", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its messages itself
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Drop the traceback of each request that uvicorn cancels when the time to finish is over."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class StartError(RuntimeError):
    """The server cannot start; the message is one sentence that says what to do."""


def serve(config: ServerConfig) -> None:
    """Listen, load the model, and answer until a signal ends the process.

    Raises:
        StartError: The address or the certificate cannot be used or the model cannot be served.
        KeyboardInterrupt: SIGINT or SIGTERM, after open requests have had time to finish.
    """
    _check_certificate(config)
    with _bind(config.host, config.port) as listener:
        os.environ.setdefault(*SPIN_COUNT)
        sys.setswitchinterval(SWITCH_INTERVAL)
        # Importing torch and transformers takes seconds; an unusable address should be told before.
        gc.disable()  # looking for garbage is a fifth of the time
        from turboquant_server.app import build_app
        from turboquant_server.model_manager import ModelManager

        gc.freeze()  # all that was made stays: looking through it takes half a second each time
        gc.enable()
        app = build_app(*(ModelManager(one) for one in config.of_models()))
        models = app.state.models
        server = DrainingServer(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CUT_OFF_SECONDS,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            ),
            app.state.door,
            models,
            config.shutdown_timeout,
        )
        failures: list[str] = []

        def load() -> None:
            failure = models.load_first()
            if failure is None:
                _print_start(models.managers, listener)
            else:
                failures.append(failure)
                server.should_exit = True

        loader = threading.Thread(target=load, name="load", daemon=True)
        try:
            loader.start()
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            if models.is_changing and not failures:
                # The interpreter cannot end in order while a thread is inside torch: it would abort.
                os._exit(0)
            raise
        finally:
            if models.has_started:
                loader.join()
                for manager in models.managers:
                    if manager.is_ready:
                        manager.unload()
        if failures:
            raise StartError(failures[0])


def _check_certificate(config: ServerConfig) -> None:
    """Read the files for TLS, before the model is loaded.

    Raises:
        StartError: They cannot be read or do not belong together.
    """
    if config.ssl_certfile is None:
        return
    try:
        # A key with a password would ask for it on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.ssl_certfile, config.ssl_keyfile, password=""
        )
    except OSError as error:  # ssl's own are, too
        raise StartError(
            f"--ssl-certfile {config.ssl_certfile} and --ssl-keyfile {config.ssl_keyfile} cannot be used "
            f"({error.strerror}); they must be PEM files of a certificate and of its key without password"
        ) from error


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


def _print_start(model_managers: Sequence[ModelManager], listener: socket.socket) -> None:
    """Print what was loaded, what will be, where it is served, and one command to try."""
    host, port = listener.getsockname()[:2]
    config = model_managers[0].config
    if not ipaddress.ip_address(host).is_loopback and not config.api_key:
        logger.warning("listening on %s without --api-key: whoever reaches this port may use the model", host)
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    scheme = "http" if config.ssl_certfile is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    messages = [{"role": "user", "content": EXAMPLE_QUESTION}]
    key = "-H 'Authorization: Bearer KEY' " if config.api_key else ""
    command = f"curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d "
    for manager in model_managers:
        if manager.is_ready:
            print(f"\n{manager.startup_report()}")
    later = [" ".join(manager.model_names) for manager in model_managers if not manager.is_ready]
    if later:
        print(f"\nLoaded when a request comes: {', '.join(later)}")
    print(f"\nServing on {url}\n")
    print(command + shlex.quote(json.dumps({"messages": messages, "max_tokens": 32})), flush=True)
