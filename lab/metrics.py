"""What a Prometheus endpoint says, as samples with labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


class Metrics:
    """One scrape. Labels given to the methods have to match; others may have any value."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples = [
            Sample(sample.name, dict(sample.labels), float(sample.value))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def samples(self, name: str, **labels: str) -> Iterator[Sample]:
        for sample in self._samples:
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items()):
                yield sample

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples that match; 0 if there is none."""
        return sum(sample.value for sample in self.samples(name, **labels))

    def names(self) -> set[str]:
        return {sample.name for sample in self._samples}
