"""Families of metrics, as they are told: renamed, merged, written. Counts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class Families(Collector):
    """Metrics as they are."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        """Return them."""
        return self._families


def renamed(metric: Metric, prefix: str, new_prefix: str) -> Metric:
    """Return a metric with another prefix, without the times at which its series were made."""
    result = Metric(new_prefix + metric.name.removeprefix(prefix), metric.documentation, metric.type)
    result.samples = [
        sample._replace(name=new_prefix + sample.name.removeprefix(prefix))
        for sample in metric.samples
        if not sample.name.endswith("_created")
    ]
    return result


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """Return what several engines tell as one text, in which the label ``engine`` has their names.

    Args:
        texts: By the engine's name, what `Metrics.render` returned there.
    """
    merged: dict[str, Metric] = {}
    for engine, text in texts.items():
        for family in text_string_to_metric_families(text):
            same = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            same.samples += [
                sample._replace(labels={**sample.labels, "engine": engine}) for sample in family.samples
            ]
    return generate_latest(Families(list(merged.values())))
