"""How a prediction was made, and the band that it carries: what eight of ten published runs of its kind lay within.

`measured` is calibrated on a run of this model; `calibrated` on one of another model, or has the device's shares and
the stack's scalar fitted to published runs of this stack on this device; `formula` has them from others' runs;
`extrapolated` lacks the device's: no published run with a layout exists for it.
"""

from functools import lru_cache

import yaml

from orchestrator.config import conf_dir
from orchestrator.plan.workload import Workload


def made(work: Workload) -> str:
    if work.calibration.run:
        return "measured" if work.calibration.model == work.model.name else "calibrated"
    if work.hardware.gemm_share is None:
        return "extrapolated"
    return "calibrated" if work.hardware.name in work.stack.fitted_on else "formula"


def band(work: Workload) -> tuple[float, float]:
    """P10 and P90 of published over predicted time, so that both times a prediction are its band. From residuals of
    the fitted rows (benchmarks/fit_planner.py): with the stack's scalar, without it, and without the device's shares
    too; dense and mixture of experts apart. No published rows say how far a run's own calibration carries: it has the
    band of the stack's."""
    how = "calibrated" if work.calibration.run else made(work)
    low, high = _bands()[f"{how}_{'moe' if work.model.n_routed_experts else 'dense'}"]
    return low, high


@lru_cache
def _bands() -> dict[str, tuple[float, float]]:
    return yaml.safe_load((conf_dir() / "bands.yaml").read_text())
