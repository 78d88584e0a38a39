"""Medians, and ratios of paired rounds with their bounds. Pure functions; no clock, no I/O.

Rounds are interleaved: round *n* ran every path within the same minute, so a path is compared with another round by round,
and the bounds come from a bootstrap over those per-round ratios. A noisy minute then hits both sides of one ratio.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the per-round ratios, and the 95 % bootstrap bounds of that median."""

    value: float
    low: float
    high: float


def ratio(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 1) -> Ratio:
    """Compare two paths measured in the same rounds; ``ours[n]`` and ``theirs[n]`` are of round *n*.

    :raises ValueError: no rounds, rounds that do not pair up, or a reference of zero.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds against {len(theirs)}: they have to pair up")
    if any(reference <= 0 for reference in theirs):
        raise ValueError("a reference round measured nothing")
    ratios = [mine / reference for mine, reference in zip(ours, theirs, strict=True)]
    generator = random.Random(seed)
    medians = sorted(median(generator.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return Ratio(median(ratios), percentile(medians, 2.5), percentile(medians, 97.5))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` % of the values do not exceed (nearest rank).

    :raises ValueError: no values.
    """
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[min(len(ordered), max(1, rank)) - 1]
