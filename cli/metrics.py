"""Two scrapes of a process' metrics, and what happened between them. Pure functions over Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sample:
    """How much one time series of a counter (or of a histogram's bucket) has grown."""

    labels: Labels
    growth: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of one answer of ``/metrics``, by metric and labels."""

    samples: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """:raises ValueError: it is not Prometheus' text format."""
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return cls(found)

    def since(self, before: Scrape, name: str) -> Iterator[Sample]:
        """The growth of every time series of the metric since an earlier scrape of the same process.

        A series that is smaller than before began anew (its process restarted): all of it is growth.
        """
        earlier = before.samples.get(name, {})
        for labels, value in self.samples.get(name, {}).items():
            start = earlier.get(labels, 0.0)
            yield Sample(dict(labels), value - start if value >= start else value)


def quantile(fraction: float, buckets: Mapping[float, float]) -> float | None:
    """The value below which ``fraction`` of a histogram's observations lie, linear within a bucket (as PromQL does it).

    :param buckets: cumulative counts by upper bound, ``inf`` among them.
    :returns: None without observations; the last finite bound for what lies beyond it.
    """
    bounds = sorted(buckets)
    if not bounds or not (total := buckets[bounds[-1]]):
        return None
    rank = fraction * total
    lower, below = 0.0, 0.0
    for bound in bounds:
        count = buckets[bound]
        if count >= rank and count > below:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, max(below, count)
    return lower


def grouped(samples: Iterator[Sample], key: Callable[[Labels], str | None]) -> dict[str, list[Sample]]:
    """Samples by a key of their labels; those without one (None) are left out."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        if (name := key(sample.labels)) is not None:
            found.setdefault(name, []).append(sample)
    return found
