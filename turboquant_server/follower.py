"""A rank that serves nobody: it holds its part of the model and takes the steps that the first one takes.

``python -m turboquant_server.follower`` is for `Followers` alone, which writes to its standard input.
"""

from __future__ import annotations

import signal

# They go to all processes of a terminal or a service. The first rank finishes what is under way, and needs
# the others for it.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)

import contextlib  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import pickle  # noqa: E402
import queue  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from multiprocessing.connection import Connection  # noqa: E402

from turboquant_server.engine.followers import END_SECONDS  # noqa: E402
from turboquant_server.engine.messages import load  # noqa: E402
from turboquant_server.engine.ranks import Ranks  # noqa: E402
from turboquant_server.model_manager import ModelLoadError, ModelManager  # noqa: E402
from turboquant_server.tensor_parallel import rank_device  # noqa: E402

logger = logging.getLogger(__name__)


def main() -> None:
    """Follow until the first rank says that it ends, or is no more."""
    pipe = Connection(sys.stdin.fileno(), writable=False)
    rank, size, port, config = pickle.loads(pipe.recv_bytes())
    # What all ranks have to say, the first one says.
    line = f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s"
    logging.basicConfig(level=logging.ERROR, format=line)
    steps: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, steps), name="read", daemon=True).start()
    ranks = Ranks(rank, size, rank_device(config.device, rank), port)
    model_manager = ModelManager(config, ranks)
    try:
        model_manager.load()
    except Exception as error:
        # It is the first rank's error, too, and that one tells it; unless it goes on and waits for this one.
        with contextlib.suppress(queue.Empty):
            steps.get(timeout=END_SECONDS)
            os._exit(0)
        logger.critical("%s", error, exc_info=not isinstance(error, ModelLoadError))
        os._exit(1)
    model_manager.engine.follow(load(data, model_manager.grammars.compile) for data in iter(steps.get, None))
    model_manager.unload()
    ranks.leave()
    os._exit(0)  # the interpreter would take seconds to end in order


def _read(pipe: Connection, steps: queue.SimpleQueue[bytes | None]) -> None:
    """Read steps as they come, so that the first rank never waits, and notice its end in the midst of one."""
    try:
        while data := pipe.recv_bytes():
            steps.put(data)
    except (EOFError, OSError):
        os._exit(1)
    steps.put(None)
    timer = threading.Timer(END_SECONDS, os._exit, [1])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
