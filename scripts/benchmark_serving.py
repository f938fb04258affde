"""How fast any OpenAI-compatible server answers: a closed loop of requests, a table, and JSON.

    python scripts/benchmark_serving.py --base-url http://127.0.0.1:8000/v1 --concurrency 1,4,16

In a closed loop there are always so many requests under way; the next one starts when one ends. Prompts are
random words, about as many as give the wished tokens by the server's own count. Every row has prompts of its
own, of the same lengths, so that none finds another's in the server's cache. How a request is timed is in
`serving_client.py`, what is made of the times in `serving_table.py`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving_client import ENDPOINTS, Answer, ServerClient, ServerError
from serving_table import notes, summarize, table
from tqdm import tqdm

# Short and common: a token each in most vocabularies, behind a space.
SOME_TEXT = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car
"""
WORDS = SOME_TEXT.split()

Ask = Callable[[str, int], Awaitable[Answer]]


@dataclass
class Load:
    """What one row's requests gave so far."""

    concurrency: int
    answers: list[Answer] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    duration: float = 0.0

    async def run(self, ask: Ask, requests: Iterable[tuple[str, int]], bar: tqdm[Any]) -> None:
        """Send requests, so many at once, until there are no more or the task is cancelled."""
        remaining = iter(requests)

        async def send_one_after_another() -> None:
            for request in remaining:
                try:
                    self.answers.append(await ask(*request))
                except ServerError as error:
                    self.failures[str(error)] += 1
                bar.update()

        started = time.perf_counter()
        try:
            await asyncio.gather(*(send_one_after_another() for _ in range(self.concurrency)))
        finally:
            self.duration = time.perf_counter() - started


@dataclass(frozen=True)
class PromptMaker:
    """Make prompts with about a wished number of tokens.

    Attributes:
        tokens_per_word: Mean over `WORDS`.
        extra_tokens: What the server puts around the words: a start, a chat's template.
    """

    tokens_per_word: float = 1.0
    extra_tokens: float = 0.0

    @classmethod
    async def calibrate(cls, ask: Ask) -> PromptMaker | None:
        """Ask the server how many tokens all the words have; None if it does not tell.

        Raises:
            ServerError: The server does not answer.
        """
        # In another order the second time: some servers count only what they do not find in their cache.
        once = (await ask(" ".join(WORDS), 1)).prompt_tokens
        twice = (await ask(" ".join(2 * WORDS[::-1]), 1)).prompt_tokens
        if once is None or twice is None or twice <= once:
            return None
        return cls((twice - once) / len(WORDS), 2 * once - twice)

    def prompts(self, generator: random.Random, lengths: Sequence[int], shared_tokens: int) -> list[str]:
        """Return a prompt for each number of tokens; so many tokens at their start are the same."""
        shared = generator.choices(WORDS, k=round(shared_tokens / self.tokens_per_word))
        counts = [round((length - self.extra_tokens) / self.tokens_per_word) for length in lengths]
        return [
            " ".join(shared + generator.choices(WORDS, k=max(1, count - len(shared)))) for count in counts
        ]


async def measure(args: argparse.Namespace, loads: list[Load]) -> None:
    """Append a load for each concurrency as it begins, so that the caller has what an interrupt leaves.

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
                return await server.ask(args.endpoint, prompt, max_tokens, **fields)

            maker = await PromptMaker.calibrate(ask)
            if maker is None:
                print("The server does not tell the tokens of a prompt: one per word is assumed.")
                maker = PromptMaker()
            generator = random.Random(args.seed)
            input_lengths = [generator.randint(*args.input_tokens) for _ in range(args.num_requests)]
            output_lengths = [generator.randint(*args.output_tokens) for _ in range(args.num_requests)]
            for row, concurrency in enumerate(args.concurrency):
                generator = random.Random(f"{args.seed} {row} {concurrency}")
                lengths = args.warmup * [args.input_tokens[1]] + input_lengths
                prompts = maker.prompts(generator, lengths, args.shared_prefix_tokens)
                for prompt in prompts[: args.warmup]:
                    await ask(prompt, args.output_tokens[1])
                loads.append(Load(concurrency))
                requests = zip(prompts[args.warmup :], output_lengths, strict=True)
                with tqdm(
                    total=args.num_requests,
                    desc=f"concurrency {concurrency}",
                    unit="request",
                    leave=False,
                    disable=not sys.stderr.isatty(),
                ) as bar:
                    await loads[-1].run(ask, requests, bar)
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


def _range(text: str) -> tuple[int, int]:
    """Return the ends of ``LOW:HIGH``, or of a single number."""
    low, _, high = text.partition(":")
    ends = _count(low), _count(high or low)
    if ends[0] > ends[1]:
        raise argparse.ArgumentTypeError(f"{low} is more than {high}")
    return ends


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how fast an OpenAI-compatible server answers.")
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000/v1", metavar="URL", help="default: %(default)s")
    add("--model", metavar="NAME", help="default: the first that the server lists")
    add("--api-key", metavar="KEY", help="sent as a bearer token")
    add("--endpoint", choices=list(ENDPOINTS), default="completions", help="default: %(default)s")
    add(
        "--num-requests",
        type=_count,
        default=64,
        metavar="N",
        help="of each row, several times its concurrency (default: %(default)s)",
    )
    add(
        "--concurrency",
        type=_counts,
        default="16",
        metavar="N[,N...]",
        help="requests at once, one row each (default: %(default)s)",
    )
    for name, default in {"input": "256", "output": "128"}.items():
        add(
            f"--{name}-tokens",
            type=_range,
            default=default,
            metavar="N[:N]",
            help="of a request; from LOW:HIGH each is as likely (default: %(default)s)",
        )
    add(
        "--shared-prefix-tokens",
        type=_count_from_0,
        default=0,
        metavar="N",
        help="so many of --input-tokens are the same in all prompts of a row and its warm-up (default: 0)",
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the prompts; a server that has seen them may have them cached (default: 0)",
    )
    add(
        "--warmup",
        type=_count_from_0,
        default=1,
        metavar="N",
        help="requests before each row that are not measured (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    if max(parsed.concurrency) > parsed.num_requests:
        parser.error(f"argument --concurrency: more than the {parsed.num_requests} of --num-requests")
    if parsed.shared_prefix_tokens >= parsed.input_tokens[0]:
        parser.error("argument --shared-prefix-tokens: not less than --input-tokens")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    loads: list[Load] = []
    end: str | int = 0
    try:
        asyncio.run(measure(args, loads))
    except ServerError as error:
        end = f"benchmark_serving.py: {error}"
    except asyncio.CancelledError:
        print("Interrupted: the last row has only the requests that were complete.", file=sys.stderr)
        end = 128 + signal.SIGINT
    rows = [
        summarize(load.concurrency, load.answers, load.failures, load.duration)
        for load in loads
        if load.answers or load.failures
    ]
    if rows:
        print(table(rows))
        print(*notes(rows), sep="\n")
        settings = {name: value for name, value in vars(args).items() if name != "api_key"}
        print(json.dumps({**settings, "interrupted": end == 128 + signal.SIGINT, "rows": rows}))
    if rows and not any(load.answers for load in loads):
        end = end or "benchmark_serving.py: every request failed"
    sys.exit(end)


if __name__ == "__main__":
    main()
