"""When the next checkpoint is due: every so many steps, or (`checkpoint.every=auto`) at the optimal interval.

Rank 0's clock decides for all ranks: its answer rides in the step's reduction.
"""

import time
from statistics import fmean, median

from orchestrator.config import Config
from orchestrator.plan.interval import expected_losses, mean_time_between_failures, optimal_interval

KEPT = 20
"""Steps and saves that the observed figures are of."""


class Cadence:
    """Observes what a save costs: the time that ranks stood still, and by how much the steps beside it took longer."""

    def __init__(self, config: Config, *, devices: int, faults: int, wall_s: float, now: float | None = None):
        """faults, wall_s: of the whole run so far. now: time.monotonic()."""
        self.every, self.faults = config.checkpoint.every, faults
        self.mtbf_s = mean_time_between_failures(devices, config.cluster.mtbf_hours_per_device, faults=faults,
                                                 wall_s=wall_s)
        self.saved_at = time.monotonic() if now is None else now
        self.steps_s: list[float] = []
        self.costs_s: list[float] = []
        self.trained_s = 0.0
        self.saves = 0

    def due(self, step: int, now: float | None = None) -> bool:
        """Whether a checkpoint is due after `step`."""
        if self.every != "auto":
            return self.every > 0 and step % self.every == 0
        return (time.monotonic() if now is None else now) - self.saved_at >= self.interval_s()

    def step(self, seconds: float, *, saving: bool) -> None:
        """A step took so long, beside a save or not."""
        self.trained_s += seconds
        if saving and self.costs_s and self.steps_s:
            self.costs_s[-1] += max(0.0, seconds - median(self.steps_s))
        elif not saving:
            self.steps_s = [*self.steps_s[1 - KEPT :], seconds]

    def saved(self, stall_s: float, now: float | None = None) -> None:
        """A save has begun; the ranks stood still for so long."""
        self.saved_at, self.saves = time.monotonic() if now is None else now, self.saves + 1
        self.costs_s = [*self.costs_s[1 - KEPT :], stall_s]

    def save_cost_s(self) -> float:
        """Observed mean; before the first save that of a step, for want of anything better."""
        return fmean(self.costs_s or self.steps_s or [1.0])

    def interval_s(self) -> float:
        return optimal_interval(self.save_cost_s(), self.mtbf_s)

    def summary(self, restart_s: float | None) -> dict:
        """Observed figures, and what the optimum for them would lose. restart_s: mean time of a recovery, if any."""
        cost, optimum = self.save_cost_s(), self.interval_s()
        return {"every": self.every, "saves": self.saves, "save_cost_s": cost, "mtbf_s": self.mtbf_s,
                "faults": self.faults, "mean_interval_s": self.trained_s / self.saves if self.saves else None,
                "optimal_interval_s": optimum,
                "predicted_loss": expected_losses(optimum, cost, self.mtbf_s, restart_s or 0.0)}
