"""Medians with intervals, percentiles, and numbers with no more digits than their noise supports."""

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


def rounded(value: float, uncertainty: float) -> str:
    """`value` down to the first uncertain digit, with one significant digit at least and three at most."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    first = -math.floor(math.log10(abs(value)))
    places = first + 2
    if uncertainty > 0:
        places = max(first, min(places, -math.floor(math.log10(uncertainty))))
    return f"{round(value, places):.{max(places, 0)}f}"


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values; `share` in 0..1."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what `values` are drawn from with 95% confidence.

    By order statistics: the k-th smallest and the k-th largest, with the largest k for which a fair coin falls
    outside at most 5% of the time. Below six values that is all of them, with less confidence.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2:
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - CONFIDENCE:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]
