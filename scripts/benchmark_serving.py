"""How fast any OpenAI-compatible server answers: a closed or open loop of requests, tables, and JSON.

    python scripts/benchmark_serving.py --base-url http://127.0.0.1:8000/v1 --concurrency 1,4,16
    python scripts/benchmark_serving.py --request-rate 2,8 --input-len 256:4096 --output-len 128

In a closed loop there are always so many requests under way; the next one starts when one ends. In an open
loop so many start per second, at random times (a Poisson process), however many are under way. Prompts are
random words, about as many as give the wished tokens by the server's own count. Every row has prompts of its
own, of the same lengths, so that none finds another's in the server's cache. How a request is timed is in
`serving_client.py`, when it starts in `serving_load.py`, what is made of the times in `serving_table.py`. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import random
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import uvloop
from serving_client import ENDPOINTS, Answer, ServerClient, ServerError
from serving_load import Load, arrival_times
from serving_prompts import PromptMaker
from serving_table import load_name, notes, summarize, table
from tqdm import tqdm


def progress(name: str, num_requests: int) -> tqdm[Any]:
    """Return a bar of requests, not shown where nobody sees it move."""
    return tqdm(total=num_requests, desc=name, unit="request", leave=False, disable=not sys.stderr.isatty())


async def measure(args: argparse.Namespace, loads: list[Load], about: dict[str, Any]) -> None:
    """Append a load for each row as it begins, so that the caller has what an interrupt leaves.

    Args:
        args: The command's.
        loads: Where the loads go.
        about: Where what the server tells of itself goes.

    Raises:
        ServerError: The server does not answer at all.
        asyncio.CancelledError: Somebody pressed Ctrl-C.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        async with ServerClient(args.base_url, args.api_key) as server:
            args.model = args.model or await server.first_model()

            async def ask(prompt: str, max_tokens: int) -> Answer:
                fields = {"model": args.model, "temperature": args.temperature}
                answer = await server.ask(args.endpoint, prompt, max_tokens, **fields)
                about.update(answer.origin)
                return answer

            maker = await PromptMaker.calibrate(ask)
            if maker is None:
                print("The server does not tell the tokens of a prompt: one per word is assumed.")
                maker = PromptMaker()
            if not server.takes_ignore_eos:
                print("The server does not take ignore_eos: answers end where the model ends them.")
            about |= {"version": await server.version(), "ignore_eos": server.takes_ignore_eos}
            generator = random.Random(args.seed)
            input_lengths = [generator.randint(*args.input_len) for _ in range(args.num_requests)]
            output_lengths = [generator.randint(*args.output_len) for _ in range(args.num_requests)]
            for row, size in enumerate(args.request_rate or args.concurrency):
                generator = random.Random(f"{args.seed} {row} {size}")
                lengths = args.num_warmups * [args.input_len[1]] + input_lengths
                prompts = maker.prompts(generator, lengths, args.shared_prefix_len)
                warm_up = Load(concurrency=args.num_warmups if args.request_rate else size)
                requests = [(prompt, args.output_len[1]) for prompt in prompts[: args.num_warmups]]
                with progress("warm-up", args.num_warmups) as bar:
                    await warm_up.run(ask, requests, bar)
                for failure in warm_up.failures:
                    raise ServerError(failure)
                if args.request_rate:
                    times = arrival_times(generator, size, args.num_requests)
                    load = Load(request_rate=size, start_times=times)
                else:
                    load = Load(concurrency=size)
                loads.append(load)
                requests = list(zip(prompts[args.num_warmups :], output_lengths, strict=True))
                with progress(load_name(load.concurrency, load.request_rate), args.num_requests) as bar:
                    await load.run(ask, requests, bar)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _count_from_0(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return int(text)


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return rates


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder or in one that does not exist")
    return path


def _range(text: str) -> tuple[int, int]:
    """Return the ends of ``LOW:HIGH``, or of a single number."""
    low, _, high = text.partition(":")
    ends = _count(low), _count(high or low)
    if ends[0] > ends[1]:
        raise argparse.ArgumentTypeError(f"{low} is more than {high}")
    return ends


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how fast an OpenAI-compatible server answers.")
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000/v1", metavar="URL", help="default: %(default)s")
    add("--model", metavar="NAME", help="default: the first that the server lists")
    add("--api-key", metavar="KEY", help="sent as a bearer token")
    add("--endpoint", choices=list(ENDPOINTS), default="completions", help="default: %(default)s")
    add(
        "--num-requests",
        "--num-prompts",
        type=_count,
        default=64,
        metavar="N",
        help="of each row, several times its concurrency (default: %(default)s)",
    )
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency",
        "--max-concurrency",
        type=_counts,
        default="16",
        metavar="N[,N...]",
        help="requests at once, one row each (default: %(default)s)",
    )
    loop.add_argument(
        "--request-rate",
        type=_rates,
        metavar="R[,R...]",
        help="requests that start per second, at random times however many are under way, one row each",
    )
    for name, default in {"input": "256", "output": "128"}.items():
        add(
            f"--{name}-len",
            f"--{name}-tokens",
            type=_range,
            default=default,
            metavar="N[:N]",
            help="tokens of a request; from LOW:HIGH each is as likely (default: %(default)s)",
        )
    add(
        "--shared-prefix-len",
        "--shared-prefix-tokens",
        type=_count_from_0,
        default=0,
        metavar="N",
        help="so many of --input-len are the same in all prompts of a row and its warm-up (default: 0)",
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of prompts and times; a server that has seen the prompts may have them cached (default: 0)",
    )
    add(
        "--num-warmups",
        "--warmup",
        type=_count_from_0,
        default=1,
        metavar="N",
        help="requests before each row that are not measured (default: %(default)s)",
    )
    add("--output-file", type=_file, metavar="FILE", help="for the JSON that is also the last line")
    parsed = parser.parse_args(arguments)
    if parsed.request_rate:
        parsed.concurrency = None
    elif max(parsed.concurrency) > parsed.num_requests:
        parser.error(f"argument --concurrency: more than the {parsed.num_requests} of --num-requests")
    if parsed.shared_prefix_len >= parsed.input_len[0]:
        parser.error("argument --shared-prefix-len: not less than --input-len")
    return parsed


def describe_run(args: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what was run, when and with what, without the API key."""
    shown = [argument.replace(args.api_key, "KEY") if args.api_key else argument for argument in arguments]
    versions = {"python": platform.python_version()}
    for package in ("httpx", "turboquant-server"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    settings = {name: value for name, value in vars(args).items() if name not in ("api_key", "output_file")}
    return {
        "command": shlex.join(["scripts/benchmark_serving.py", *shown]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        **settings,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    loads: list[Load] = []
    about: dict[str, Any] = {}
    end: str | int = 0
    try:
        uvloop.run(measure(args, loads, about))
    except ServerError as error:
        end = f"benchmark_serving.py: {error}"
    except asyncio.CancelledError:
        print("Interrupted: the last row has only the requests that were complete.", file=sys.stderr)
        end = 128 + signal.SIGINT
    rows = [
        summarize(load.concurrency, load.answers, load.failures, load.duration, load.request_rate)
        for load in loads
        if load.answers or load.failures
    ]
    if rows:
        print(table(rows))
        print(*notes(rows), sep="\n")
        interrupted = end == 128 + signal.SIGINT
        report = describe_run(args, arguments) | {"server": about, "interrupted": interrupted, "rows": rows}
        text = json.dumps(report)
        if args.output_file:
            args.output_file.write_text(text + "\n")
        print(text)
    if rows and not any(load.answers for load in loads):
        end = end or "benchmark_serving.py: every request failed"
    sys.exit(end)


if __name__ == "__main__":
    main()
