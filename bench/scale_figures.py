"""What becomes of the times that `bench.scale` takes. Pure: no process, no clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

WINDOW = 5.0  # seconds of requests that a percentile of "now" is taken of
STEP = 0.1  # seconds between two looks at it


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all do not exceed (nearest rank), so that what never came may count as infinite."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def windows(samples: Sequence[tuple[float, float]], begin: float, end: float, step: float) -> list[tuple[float, float | None]]:
    """(time, P95 of the requests sent in the WINDOW before it or None where there were none), every `step` seconds.

    `samples`: (when it was sent, seconds to its first token; infinite where none came)."""
    ordered = sorted(samples)
    found: list[tuple[float, float | None]] = []
    for i in range(round((end - begin) / step) + 1):
        now = begin + i * step
        inside = [seconds for sent, seconds in ordered if now - WINDOW < sent <= now]
        found.append((now, percentile(inside, 95) if inside else None))
    return found


def restored(samples: Sequence[tuple[float, float]], jump: float, end: float, promise: float) -> float | None:
    """Seconds from `jump` until the P95 of the last WINDOW is within the promise and stays so until `end`; None: it never is."""
    looks = windows(samples, jump, end, STEP)
    bad = [i for i, (_, seconds) in enumerate(looks) if seconds is not None and seconds > promise]
    if not bad:
        return 0.0
    return None if bad[-1] == len(looks) - 1 else looks[bad[-1] + 1][0] - jump


def zipf(count: int, exponent: float = 1.0) -> list[float]:
    """How likely each of `count` is, the most popular first."""
    weights = [1 / rank**exponent for rank in range(1, count + 1)]
    return [weight / sum(weights) for weight in weights]


def lru_hits(asked: Sequence[int], holds: int) -> float:
    """The part of `asked` that is there already where the `holds` last used ones are kept, from nothing: what one client that
    asks for one after another would see."""
    there: list[int] = []
    hits = 0
    for one in asked:
        if one in there:
            hits += 1
            there.remove(one)
        there = [*there, one][-holds:]
    return hits / len(asked)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through (x, y) points by least squares; 0 where all have one x."""
    mean_x, mean_y = statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)
    across = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / across if across else 0.0


def finite(value: Any) -> Any:
    """The same for JSON: no infinities, floats with as many digits as mean something."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def seconds(values: dict[str, float] | None) -> str:
    """A spread for a table."""
    if values is None:
        return ""
    if values["n"] == 1:
        return f"{values['median']:.3f}"
    return f"{values['median']:.3f} ({values['min']:.3f}–{values['max']:.3f})"


def reached(value: float, bar: float) -> str:
    return f"{'reached' if value <= bar else 'missed'} (≤ {bar:g})"
