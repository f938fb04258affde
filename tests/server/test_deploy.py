"""deploy.py on Ray Serve: two replicas under load, one of them killed, and one taken away in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI
from scrape import Scrape

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install '.[ray]'")

NUM_STREAMS = 32
SECONDS = 120
PROGRAM = Path(__file__).with_name("ray_cluster.py")


class Cluster:
    """A running cluster, and what there is in it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.url = url
        self._process = process

    def scale(self, num_replicas: int) -> None:
        """Ask for so many replicas and wait until they run."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(num_replicas, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line == f"replicas: {num_replicas}\n":
                return
        raise AssertionError("the cluster has ended")

    @property
    def server_pids(self) -> list[int]:
        """The processes of the replicas, found among the descendants of the program."""
        table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
        rows = [line.split(maxsplit=2) for line in table.stdout.splitlines()]
        parents = {int(pid): int(parent) for pid, parent, _ in rows}

        def is_ours(pid: int) -> bool:
            return pid == self._process.pid or (pid in parents and is_ours(parents[pid]))

        return [int(pid) for pid, _, command in rows if "default:Server" in command and is_ours(int(pid))]

    def scrape(self) -> Scrape:
        """Read the metrics of all replicas."""
        response = httpx.get(
            f"{self.url}/metrics", headers={"Authorization": "Bearer secret"}, timeout=SECONDS
        )
        assert response.status_code == 200, response.text
        return Scrape(response.text)

    def engines(self) -> set[str]:
        """Return the names of the replicas that answer."""
        return {dict(labels)["engine"] for _, labels in self.scrape().samples}

    def stream_all(self, meanwhile: Any = None) -> list[str]:
        """Stream many answers at once and return how each ended: ``finished`` or an error's code."""

        async def main() -> list[str]:
            client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=SECONDS)
            async with client:
                started = asyncio.Semaphore(0)
                tasks = [asyncio.create_task(_stream(client, i, started)) for i in range(NUM_STREAMS)]
                for _ in tasks:
                    await started.acquire()
                if meanwhile is not None:
                    await asyncio.to_thread(meanwhile)
                return await asyncio.gather(*tasks)

        return asyncio.run(main())


async def _stream(client: AsyncOpenAI, number: int, started: asyncio.Semaphore) -> str:
    num_chunks, reason = 0, None
    try:
        async for chunk in await client.chat.completions.create(
            model="turboquant-demo",
            messages=[{"role": "user", "content": f"{number}: tell me about the harbour."}],
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            if num_chunks == 5:
                started.release()
            num_chunks += 1
            reason = chunk.choices[0].finish_reason or reason
    except APIError as error:
        return str(error.code)
    assert num_chunks > 50, "tokens did not come one by one"
    return "finished" if reason == "length" else f"cut off after {num_chunks} chunks"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Run two replicas in a folder and a home of their own; the path of Ray's sockets has to be short."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TURBOQUANT_")}
    own = {"HOME": folder, "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, PROGRAM, str(port), folder],
        env=inherited | own | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        cluster = Cluster(process, f"http://127.0.0.1:{port}")
        cluster.scale(2)
        yield cluster
        process.communicate(timeout=SECONDS)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_deployment_has_the_replicas_and_the_time_to_end_that_were_asked_for() -> None:
    from turboquant_server.deploy import build
    from turboquant_server.deploy_config import DeployConfig

    config = DeployConfig(device="cuda", num_replicas=2, max_replicas=5, shutdown_timeout=77)
    front = build(config)._bound_deployment
    server = front.init_args[0]._bound_deployment
    for deployment in (front, server):
        options = deployment._deployment_config
        assert (options.autoscaling_config.min_replicas, options.autoscaling_config.max_replicas) == (2, 5)
        assert options.graceful_shutdown_timeout_s == 77
    assert server.ray_actor_options["num_gpus"] == 1
    assert front.ray_actor_options.get("num_gpus", 0) == 0
    on_cpu = build(DeployConfig(device="cpu"))._bound_deployment
    assert on_cpu.num_replicas == 1
    assert on_cpu.init_args[0]._bound_deployment.ray_actor_options["num_gpus"] == 0


@pytest.mark.long
def test_the_door_is_the_servers_own(cluster: Cluster) -> None:
    with httpx.Client(base_url=cluster.url, timeout=SECONDS) as client:
        assert client.get("/health").json() == {"status": "ok"}
        refused = client.get("/v1/models", headers={"X-Request-Id": "mine"})
        assert (refused.status_code, refused.headers.get_list("x-request-id")) == (401, ["mine"])
        assert client.get("/metrics").status_code == 401
        wrong = client.post("/v1/completions", json={"prompt": ""}, headers={"x-api-key": "secret"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.long
def test_prompts_that_begin_alike_find_each_other(cluster: Cluster) -> None:
    document = "The harbour has a crane. " * 100
    cached = []
    with httpx.Client(base_url=cluster.url, timeout=SECONDS, headers={"x-api-key": "secret"}) as client:
        for question in range(6):
            body = {"prompt": f"{document}{question}?", "max_tokens": 1}
            usage = client.post("/v1/completions", json=body).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0 and all(count > 0 for count in cached[1:])


@pytest.mark.long
def test_a_client_that_leaves_ends_its_request(cluster: Cluster) -> None:
    request = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=cluster.url, timeout=SECONDS, headers={"x-api-key": "secret"}) as client,
        client.stream("POST", "/v1/completions", json=request) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        wait_for(lambda: cluster.scrape()["num_requests_running"] == 1)
    wait_for(lambda: cluster.scrape()["num_requests_running"] == 0)
    assert cluster.scrape()["request_success_total{abort}"] == 1


@pytest.mark.long
def test_a_killed_replica_costs_its_own_requests_only_and_comes_back(cluster: Cluster) -> None:
    before = cluster.engines()
    assert len(before) == len(cluster.server_pids) == 2
    ends = Counter(cluster.stream_all(lambda: os.kill(cluster.server_pids[0], signal.SIGKILL)))
    assert ends["finished"] > 0 and ends["replica_lost"] > 0
    assert ends["finished"] + ends["replica_lost"] == NUM_STREAMS, ends

    def is_back() -> bool:
        with contextlib.suppress(AssertionError):
            return len(cluster.engines()) == 2
        return False

    wait_for(is_back)
    assert len(cluster.engines() & before) == 1
    assert cluster.stream_all() == ["finished"] * NUM_STREAMS


@pytest.mark.long
def test_a_replica_that_is_taken_away_finishes_its_streams(cluster: Cluster) -> None:
    ends = cluster.stream_all(lambda: cluster.scale(1))
    assert ends == ["finished"] * NUM_STREAMS
    wait_for(lambda: len(cluster.server_pids) == 1)
    assert len(cluster.engines()) == 1
