"""What /metrics tells of the comparison with uncompressed predictions. Counts nothing itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric, SummaryMetricFamily

if TYPE_CHECKING:
    from turboquant_server.engine.fidelity import FidelityState

FIDELITY_NAMES = (
    *("fidelity_kld", "fidelity_top1_agreement", "fidelity_requests", "fidelity_skipped"),
    *("fidelity_alarm", "fidelity_kld_limit", "fidelity_top1_agreement_limit"),
)


def fidelity_gauges(state: FidelityState) -> list[tuple[str, str, float | None]]:
    """Return name, meaning and value of those metrics that are gauges."""
    gauges: list[tuple[str, str, float | None]] = [
        ("fidelity_alarm", "1 while the newest predictions are outside the range.", state.is_alarming)
    ]
    if state.range is not None:
        gauges += [
            ("fidelity_kld_limit", "Where the range measured at load ends.", state.range.max_kld),
            ("fidelity_top1_agreement_limit", "Likewise.", state.range.min_agreement),
        ]
    return gauges


def describe_fidelity(
    state: FidelityState, prefix: str, names: Sequence[str], labels: Sequence[str]
) -> Iterator[Metric]:
    """Yield those that are no gauges.

    Args:
        state: What has been found.
        prefix: Of their names.
        names: Of labels that all of them have.
        labels: Their values.
    """
    total = state.total
    sums = [
        ("fidelity_kld", "KL divergence of compared predictions, in nats, at least.", total.total_kld),
        ("fidelity_top1_agreement", "Predictions with the same likeliest token.", total.num_agreeing),
    ]
    for name, text, value in sums:
        summary = SummaryMetricFamily(prefix + name, text, labels=names)
        summary.add_metric(labels, total.num_tokens, value)
        yield summary
    requests = CounterMetricFamily(f"{prefix}fidelity_requests", "Compared answers.", labels=names)
    requests.add_metric(labels, state.num_answers)
    yield requests
    skipped = CounterMetricFamily(
        f"{prefix}fidelity_skipped", "Chosen answers, not compared.", labels=(*names, "reason")
    )
    for reason, count in state.num_skipped.items():
        skipped.add_metric((*labels, reason), count)
    yield skipped
