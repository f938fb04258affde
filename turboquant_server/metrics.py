"""Metrics: counts and times of requests under vLLM's names, for Prometheus. Knows no HTTP and no tensor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from turboquant_server.engine.observer import Observer
from turboquant_server.engine.request import RequestOutput, RequestTimeoutError
from turboquant_server.fidelity_metrics import describe_fidelity, fidelity_gauges

if TYPE_CHECKING:
    from turboquant_server.cache_usage import CacheUsage
    from turboquant_server.engine.engine import StepOutput
    from turboquant_server.engine.fidelity import FidelityState
    from turboquant_server.engine.sampling_params import SamplingParams
    from turboquant_server.swap_space import SwapUsage

PREFIX = "turboquant:"
LABELS = ("model_name", "engine")
OWN_NAMES = (
    *("kv_bytes_compressed", "kv_bytes_bf16_equivalent", "kv_bits_per_value", "kv_residual_tokens"),
    *("kv_held_tokens", "kv_capacity_tokens", "kv_bf16_capacity_tokens"),
    *("swap_usage_perc", "swap_hit_tokens", "swap_blocks_out", "swap_blocks_in"),
)
END_REASONS = ("stop", "length", "abort", "timeout", "error")
# vLLM's buckets, so that its dashboards show ours.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
    *(160, 640, 2560),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)
REQUEST_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
STEP_TOKENS = tuple(2**e for e in range(15) if e not in (1, 2))
CHOICES = (1, 2, 5, 10, 20)


@dataclass(frozen=True)
class EngineState:
    """What is read from a running engine when somebody asks for metrics."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    usage: CacheUsage
    swap: SwapUsage
    num_capacity_tokens: int
    num_bf16_capacity_tokens: int
    cache_config: dict[str, str]
    fidelity: FidelityState | None = None


@dataclass
class _Record:
    """A request that is worked on; times in seconds."""

    arrival: float
    num_unfinished: int
    start: float | None = None
    first_token: float | None = None
    last_tokens: dict[int, float] = field(default_factory=dict)  # by choice


class Metrics(Observer):
    """Count requests and tokens and measure times.

    Numbers change once a step, on the event loop; the engine's thread only notes when a request starts.

    Args:
        model_name: Value of the label of that name.
    """

    def __init__(self, model_name: str) -> None:
        self._labels = (model_name, "0")
        self._registry = CollectorRegistry()
        self._records: dict[str, _Record] = {}
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Those found in the cache.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Tokens of prompts looked up.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Those found in the cache.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        name = f"{PREFIX}request_success"
        ends = Counter(name, "Ended choices.", (*LABELS, "finished_reason"), registry=self._registry)
        self._ends = {reason: ends.labels(*self._labels, reason) for reason in END_REASONS}
        name = f"{PREFIX}admission_rejections"
        rejections = Counter(name, "Refused requests.", (*LABELS, "reason"), registry=self._registry)
        self._queue_full = rejections.labels(*self._labels, "queue_full")
        seconds = REQUEST_SECONDS
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival.", FIRST_TOKEN_SECONDS
        )
        self._token_latency = self._histogram(
            "inter_token_latency_seconds", "From token to token.", TOKEN_SECONDS
        )
        self._time_per_token = self._histogram(
            "request_time_per_output_token_seconds", "Its mean over an answer.", TOKEN_SECONDS
        )
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to end.", seconds)
        self._queue_time = self._histogram("request_queue_time_seconds", "From arrival to start.", seconds)
        self._inference_time = self._histogram(
            "request_inference_time_seconds", "From start to end.", seconds
        )
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds", "From start to first token.", seconds
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "From first to last token.", seconds
        )
        self._request_prompt = self._histogram("request_prompt_tokens", "Of a prompt.", REQUEST_TOKENS)
        self._request_generation = self._histogram(
            "request_generation_tokens", "Of an answer.", REQUEST_TOKENS
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "What requests ask for.", REQUEST_TOKENS
        )
        self._num_choices = self._histogram("request_params_n", "What requests ask for.", CHOICES)
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Generated by a step, and of prompts that it completed.", STEP_TOKENS
        )

    def arrived(self, request_id: str, sampling_params: SamplingParams) -> None:
        """Begin to measure a request."""
        self._records[request_id] = _Record(time.monotonic(), sampling_params.n)
        self._max_tokens.observe(sampling_params.max_tokens)
        self._num_choices.observe(sampling_params.n)

    def started(self, request_id: str, time: float) -> None:
        """Note when a request left the queue."""
        record = self._records.get(request_id)
        if record is not None:
            record.start = time

    def stepped(self, outputs: Sequence[StepOutput]) -> None:
        """Count what a step has generated."""
        now = time.monotonic()
        num_tokens = num_prompt_tokens = num_cached_tokens = 0
        for output in outputs:
            record = self._records.get(output.request_id)
            if record is None or not isinstance(output, RequestOutput) or not output.token_ids:
                continue  # among them those that tell how much of a prompt has been read
            num_tokens += len(output.token_ids)
            if record.first_token is None:
                num_prompt_tokens += output.num_prompt_tokens
                num_cached_tokens += output.num_cached_tokens
                self._count_first_token(record, output, now)
            last = record.last_tokens.get(output.choice_index)
            if last is not None:
                self._token_latency.observe(now - last)
            if output.finish_reason is None:
                record.last_tokens[output.choice_index] = now
            else:
                self._count_end(record, output, now)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._prefix_queries.inc(num_prompt_tokens)
        self._cached_tokens.inc(num_cached_tokens)
        self._prefix_hits.inc(num_cached_tokens)
        self._generation_tokens.inc(num_tokens)
        if num_tokens:
            self._step_tokens.observe(num_tokens + num_prompt_tokens)

    def left(self, request_id: str, failure: Exception | None) -> None:
        """Count the choices that did not come to their end, and forget the request."""
        record = self._records.pop(request_id)
        if isinstance(failure, RequestTimeoutError):
            reason = "timeout"
        else:
            reason = "abort" if failure is None else "error"
        self._ends[reason].inc(record.num_unfinished)

    def refused(self) -> None:
        """Count a request for which there was no room in the queue."""
        self._queue_full.inc()

    def collect(self, state: EngineState | None) -> list[Metric]:
        """Return all metrics.

        Args:
            state: Of the engine, while there is one.
        """
        return [*self._registry.collect(), *(self._describe(state) if state else ())]

    def _describe(self, state: EngineState) -> Iterator[Metric]:
        usage = state.usage
        gauges: list[tuple[str, str, float | None]] = [
            ("num_requests_running", "Choices that hold a cache.", state.num_running),
            ("num_requests_waiting", "Requests and choices that wait.", state.num_waiting),
            ("kv_cache_usage_perc", "Blocks that requests hold; 1 is all.", usage.share),
            ("kv_bytes_compressed", "Bytes of the cache that requests hold.", usage.held_bytes),
            ("kv_bytes_bf16_equivalent", "What the same would take in bfloat16.", usage.bf16_bytes),
            ("kv_bits_per_value", "Bits that a held number takes, all told.", usage.bits_per_value),
            ("kv_held_tokens", "Tokens of the cache that requests hold.", usage.num_tokens),
            ("kv_residual_tokens", "Held tokens that are not compressed.", usage.num_exact_tokens),
            ("kv_capacity_tokens", "Tokens that fit into the cache.", state.num_capacity_tokens),
            (
                "kv_bf16_capacity_tokens",
                "Those that would fit into its memory in bfloat16.",
                state.num_bf16_capacity_tokens,
            ),
            ("swap_usage_perc", "Blocks of the swap space that are taken; 1 is all.", state.swap.share),
        ]
        if state.fidelity is not None:
            gauges += fidelity_gauges(state.fidelity)
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
            if value is not None:
                gauge.add_metric(self._labels, value)
            yield gauge
        counts = [
            ("num_preemptions", "Requests that gave their cache back.", state.num_preemptions),
            ("swap_hit_tokens", "Tokens found in the swap space only.", state.swap.num_hit_tokens),
            ("swap_blocks_out", "Blocks copied to the swap space.", state.swap.num_blocks_out),
            ("swap_blocks_in", "Blocks copied back.", state.swap.num_blocks_in),
        ]
        for name, text, count in counts:
            counter = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
            counter.add_metric(self._labels, count)
            yield counter
        name = f"{PREFIX}cache_config_info"
        info = GaugeMetricFamily(name, "The cache.", labels=(*LABELS, *state.cache_config))
        info.add_metric((*self._labels, *state.cache_config.values()), 1)
        yield info
        if state.fidelity is not None:
            yield from describe_fidelity(state.fidelity, PREFIX, LABELS, self._labels)

    def _count_first_token(self, record: _Record, output: RequestOutput, now: float) -> None:
        record.first_token = now
        self._first_token.observe(now - record.arrival)
        self._request_prompt.observe(output.num_prompt_tokens)
        if record.start is not None:
            self._queue_time.observe(record.start - record.arrival)
            self._prefill_time.observe(now - record.start)

    def _count_end(self, record: _Record, output: RequestOutput, now: float) -> None:
        assert output.finish_reason is not None and record.first_token is not None
        record.num_unfinished -= 1
        self._ends[output.finish_reason.value].inc()
        self._latency.observe(now - record.arrival)
        self._request_generation.observe(output.num_output_tokens)
        decode_time = now - record.first_token
        self._decode_time.observe(decode_time)
        if output.num_output_tokens > 1:
            self._time_per_token.observe(decode_time / (output.num_output_tokens - 1))
        if record.start is not None:
            self._inference_time.observe(now - record.start)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, LABELS, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(PREFIX + name, text, LABELS, registry=self._registry, buckets=buckets)
        return histogram.labels(*self._labels)
