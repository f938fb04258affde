"""Metrics as Prometheus' text: of one model or several, of one server or several. Counts nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from turboquant_server.fidelity_metrics import FIDELITY_NAMES
from turboquant_server.metrics import OWN_NAMES, PREFIX

ALIAS_PREFIX = "vllm:"


def render_metrics(families: Iterable[Metric], *, with_aliases: bool) -> bytes:
    """Return metrics in Prometheus' text format 0.0.4, those of one name together.

    Args:
        families: Of all models, with labels that tell them apart.
        with_aliases: Repeat each metric that vLLM has under its name there.
    """
    merged: dict[str, Metric] = {}
    for family in families:
        _add(merged, family, family.samples)
    renamed = [_renamed(family, PREFIX) for family in merged.values()]
    if with_aliases:
        own = (*OWN_NAMES, *FIDELITY_NAMES)
        shared = (one for one in merged.values() if one.name.removeprefix(PREFIX) not in own)
        renamed += [_renamed(family, ALIAS_PREFIX) for family in shared]
    return generate_latest(_Families(renamed))


def merge_metrics(texts: Mapping[str, str]) -> bytes:
    """Return what several engines tell as one text, in which the label ``engine`` has their names.

    Args:
        texts: By the engine's name, what ``/metrics`` told there.
    """
    merged: dict[str, Metric] = {}
    for engine, text in texts.items():
        for family in text_string_to_metric_families(text):
            samples = [
                sample._replace(labels={**sample.labels, "engine": engine}) for sample in family.samples
            ]
            _add(merged, family, samples)
    return generate_latest(_Families(list(merged.values())))


def _add(merged: dict[str, Metric], family: Metric, samples: Iterable[Sample]) -> None:
    same = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
    same.samples += samples


class _Families(Collector):
    """Metrics as they are."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


def _renamed(metric: Metric, prefix: str) -> Metric:
    """Return a metric with another prefix, without the times at which its series were made."""
    renamed = Metric(prefix + metric.name.removeprefix(PREFIX), metric.documentation, metric.type)
    renamed.samples = [
        sample._replace(name=prefix + sample.name.removeprefix(PREFIX))
        for sample in metric.samples
        if not sample.name.endswith("_created")
    ]
    return renamed
