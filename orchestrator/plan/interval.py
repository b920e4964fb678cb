"""How often to save: the interval that loses least to saves and to work done again, and what it then loses. Pure.

All times in seconds. Failures come at random, at a constant rate (exponential gaps), which is what the formula assumes.
"""

import math


def mean_time_between_failures(devices: int, hours_per_device: float, *, faults: int = 0, wall_s: float = 0.0) -> float:
    """Of a job on `devices`: by the rate that is configured or, from two faults on, by this job's own if it is higher.
    """
    rate = devices / (hours_per_device * 3600)
    if faults >= 2 and wall_s > 0:
        rate = max(rate, faults / wall_s)
    return 1 / rate


def optimal_interval(save_s: float, mtbf_s: float) -> float:
    """Seconds of training between saves that cost `save_s` each (Daly 2006, eq. 37; Young 1974 is its first term)."""
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def expected_losses(interval_s: float, save_s: float, mtbf_s: float, restart_s: float = 0.0) -> dict[str, float]:
    """Shares of the wall time lost to saves, to work done again and to restarts, by the same model's exact mean.

    A segment of interval and save takes mtbf * exp(restart/mtbf) * (exp((interval + save)/mtbf) - 1) on average
    (Daly 2006); what is neither kept work, save nor restart was done in vain.
    """
    failures = math.expm1((interval_s + save_s) / mtbf_s)
    restarts = failures * mtbf_s * math.expm1(restart_s / mtbf_s)
    whole = failures * mtbf_s + restarts
    return {"checkpoint": save_s / whole, "lost_work": max(0.0, whole - interval_s - save_s - restarts) / whole,
            "restart": restarts / whole}
