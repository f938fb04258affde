"""What a response of /metrics holds, sample by sample."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from turboquant_server.metrics import PREFIX


class Scrape:
    """The samples of one response, by name and labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = {
            (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __getitem__(self, name: str) -> float:
        """Return the sum of the samples of a name, without or with one of its labels: ``name{value}``."""
        name, _, label = name.rstrip("}").partition("{")
        found = [
            value
            for (key, labels), value in self.samples.items()
            if key == name and (not label or label in dict(labels).values())
        ]
        assert found, name
        return sum(found)
