"""A soak: clients ask a server random things for long and behave badly, and nothing may come of it.

    python scripts/soak.py --minutes 30 --clients 32
    python scripts/soak.py --minutes 5 --url http://127.0.0.1:8000

Without --url a server of the bundled model is started, with a small cache and little room in its queue, so
that requests wait, give their cache back and run out of time; it is stopped for five seconds now and then.
Of a server at --url, whose log and memory are not at hand, only what HTTP tells is judged; nobody else should
use it, and its context must have 3,000 tokens. The last line is one JSON object; the exit status is 1 if a
claim does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from aligned_table import format_table
from conditions import conditions
from server_process import ServerProcess, started_server
from soak_requests import CHAT, VisitMaker, tool_request
from soak_run import GAUGES, Soak, wait_for_rest

DEMO = Path(__file__).resolve().parents[1] / "turboquant_server" / "demo"
FLAGS = (
    *("--kv-cache-memory", "42MiB", "--max-num-seqs", "16", "--max-num-queued-requests", "32"),
    *("--request-timeout", "40", "--served-model-name", "turboquant-demo"),
)
# The bundled model's, with tools in Hermes' format; without tools it writes the same.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer with <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WARM_UP_SECONDS = 300.0
MAX_GROWTH = 0.05
COUNTERS = (
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "generation_tokens_total",
    "num_preemptions_total",
)
SHOWN_PROBLEMS = 10


@dataclass
class Claim:
    """What must be true, and what was measured; whether it holds is None where that cannot be told."""

    claim: str
    measured: str
    holds: bool | None


async def soak(
    args: argparse.Namespace, url: str, server: ServerProcess | None
) -> tuple[Soak, list[Claim], Counter[str]]:
    """Run the soak and judge it; the server's metrics come last."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as http:
        has_tools = (await http.post(CHAT, json={**tool_request(), "max_tokens": 1})).status_code == 200
        run = Soak(VisitMaker(args.seed, has_tools), server)
        run.known = await run.ask_probes(http)
    _, num_open = await wait_for_rest(url, server)
    await run.run(url, 60 * args.minutes, args.clients, args.seed)
    metrics, num_open_after = await wait_for_rest(url, server, num_open)
    async with httpx.AsyncClient(base_url=url, timeout=None) as http:
        num_changed = sum(a != b for a, b in zip(run.known, await run.ask_probes(http), strict=True))

    count = run.outcomes
    num_wrong = sum(n for (_, kind), n in count.items() if kind == "wrong")
    num_wrong_probes, num_probes = count["probe", "wrong"], count["probe", "answered"]
    num_refused, num_bad = count["bad", "refused"], count["bad", "refused"] + count["bad", "wrong"]
    held = [f"{name} {metrics[name]:g}" for name in GAUGES if metrics[name]]
    claims = [
        Claim("no 500, and answers have their end", f"{num_wrong} of {count.total():,} wrong", not num_wrong),
        Claim("bad requests get a 4xx", f"{num_refused:,} of {num_bad:,}", num_refused == num_bad > 0),
        Claim(
            "known answers come, under load and after it",
            f"{num_probes:,} right, {num_wrong_probes} wrong; {num_changed} wrong after it",
            num_probes > 0 and not num_wrong_probes and not num_changed,
        ),
        Claim("at rest nothing is held", ", ".join(held) or "no request, no block, no slot", not held),
    ]
    if server:
        claims += [
            Claim(
                "no file or socket stays open",
                f"{num_open}, then {num_open_after}",
                num_open_after <= num_open,
            ),
            judge_memory(run.memory),
        ]
    return run, claims, metrics


def judge_memory(memory: Sequence[int]) -> Claim:
    """Compare the first tenth after the warm-up with the last tenth."""
    after = memory[int(WARM_UP_SECONDS) :]
    claim = f"memory within {MAX_GROWTH:.0%} after {WARM_UP_SECONDS / 60:g} minutes"
    if len(after) < WARM_UP_SECONDS:
        return Claim(claim, f"{memory[-1] / 2**20:,.0f} MiB; too short to tell", None)
    tenth = len(after) // 10
    first, last = statistics.median(after[:tenth]), statistics.median(after[-tenth:])
    numbers = [f"{number / 2**20:,.0f}" for number in (first, last, max(after))]
    return Claim(
        claim, "{}, then {} MiB; at most {}".format(*numbers), abs(last - first) <= MAX_GROWTH * first
    )


def judge_end(server: ServerProcess) -> list[Claim]:
    """End the server and look at its log."""
    status = server.stop()
    log = server.log.read_text(errors="replace").splitlines()
    errors = [line for line in log if " ERROR " in line or line.startswith("Traceback")]
    return [
        Claim(
            "no error in the log", " ".join([f"{len(errors)} in {len(log)} lines", *errors[:1]]), not errors
        ),
        Claim("SIGTERM ends it", f"status {status}", status == 0),
    ]


def save_model(folder: Path) -> Path:
    """Save the bundled model with a chat template that takes tools, and return its folder."""
    path = folder / "model"
    shutil.copytree(DEMO, path, ignore=shutil.ignore_patterns("held_out*"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run a soak, print tables and a line of JSON, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: 30)")
    parser.add_argument("--clients", type=int, default=32, help="at a time (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--url", help="of a running server, without /v1 (default: one is started)")
    args = parser.parse_args(argv)
    with ExitStack() as stack:
        server = None
        if args.url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            flags = ("--model", str(save_model(folder)), *FLAGS)
            server = stack.enter_context(started_server(folder, {}, flags))
        url = server.url if server else args.url.rstrip("/")
        try:
            run, claims, metrics = asyncio.run(soak(args, url, server))
        except httpx.TransportError as error:
            log = server.log.read_text(errors="replace")[-2000:] if server else ""
            message = f"{url} does not answer: {str(error) or type(error).__name__}\n{log}"
            raise SystemExit(message.strip()) from error
        if server:
            claims += judge_end(server)

    kinds = sorted({visit for visit, _ in run.outcomes})
    ends = ("answered", "left", "refused", "limited", "wrong")
    rows = [(kind, *(f"{run.outcomes[kind, end]:,}" for end in ends)) for kind in kinds]
    print(*format_table([("requests", *ends), *rows]), "", sep="\n")
    words = {True: "holds", False: "DOES NOT HOLD", None: "not judged"}
    cells = [("claim", "measured", "verdict"), *((c.claim, c.measured, words[c.holds]) for c in claims)]
    print(*format_table(cells), sep="\n")
    print(*run.problems[:SHOWN_PROBLEMS], sep="\n")
    counts = {kind: {end: run.outcomes[kind, end] for end in ends} for kind in kinds}
    minutes = [round(number / 2**20) for number in run.memory[59::60]]
    about = {
        **conditions(on_gpu=False),
        **vars(args),
        **{name: metrics[name] for name in COUNTERS},
        "num_pauses": run.num_pauses,
        "memory_mib_each_minute": minutes,
    }
    print(json.dumps({**about, "requests": counts, "claims": [asdict(claim) for claim in claims]}))
    return 1 if any(claim.holds is False for claim in claims) else 0


if __name__ == "__main__":
    raise SystemExit(main())
