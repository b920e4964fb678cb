"""Whether a step's loss is a spike: far above the recent losses, by their median and median absolute deviation.

Pure functions of numbers that every rank has alike; what follows from a spike is decided in loop.py.
"""

import math
from statistics import median


class RollBack(Exception):
    """A bad step, seen by all ranks alike, from which they go back to the newest state that was kept."""


NORMAL = 1.4826
"""Standard deviations per median absolute deviation of a normal distribution (Rousseeuw & Croux 1993, eq. 1.2)."""

MIN_SPREAD = 1e-3
"""Least spread, as a share of the median: a flat stretch does not make every ripple a spike."""


def is_spike(loss: float, recent: list[float], *, sigmas: float, window: int) -> bool:
    """Whether `loss` is more than `sigmas` robust standard deviations above the median of `recent`.

    sigmas: 0 is never. window: nothing is judged before so many losses were seen. One-sided: a fall is no spike.
    """
    if not sigmas or len(recent) < window or not math.isfinite(loss):
        return False
    middle = median(recent)
    spread = max(NORMAL * median(abs(value - middle) for value in recent), MIN_SPREAD * abs(middle))
    return loss > middle + sigmas * spread


def remember(loss: float, recent: list[float], *, window: int) -> list[float]:
    """The window after `loss`. A non-finite one never enters; a finite spike does, and cannot move a median far."""
    return [*recent, loss][-window:] if math.isfinite(loss) else recent
