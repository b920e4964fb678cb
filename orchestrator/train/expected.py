"""What this run is expected to take, by the formula or by what a finished run measured (`run.calibrate`)."""

from orchestrator.config import Config
from orchestrator.errors import BadRequest
from orchestrator.plan.forecast import Machine, calibrate, forecast
from orchestrator.plan.workload import Calibration
from orchestrator.train import storage
from orchestrator.train.finish import read_summary
from orchestrator.train.metrics import MANY_COUNTS_EVERY, METRICS, read_lines
from orchestrator.train.run_dir import CONFIG, read_config

COUNTED_STEPS = 20
"""Of a run's end, whose routing is taken."""


def expected(config: Config, machine: Machine) -> dict:
    """`predicted` of summary.json; {"how": why not} where a figure is not known."""
    try:
        learnt = read_calibration(config.run.calibrate)
        if learnt.run and bool(learnt.cores) != (machine.device == "cpu"):
            raise BadRequest(f"run.calibrate={learnt.run} ran on another kind of device")
        if learnt.hardware not in ("", "auto", config.hardware.name):
            raise BadRequest(f"run.calibrate={learnt.run} ran on {learnt.hardware}")
        return forecast(config, machine, learnt)
    except ValueError as error:
        return {"how": f"not predicted: {error}"}


def read_calibration(run: str | None, key: str = "run.calibrate", *, routing: bool = True) -> Calibration:
    """From a finished run's own summary and config; `BadRequest` where it kept none. Its routing, too, which may be
    long to read: a check leaves it out."""
    if not run:
        return Calibration()
    summary = read_summary(run)
    measured = (summary or {}).get("measured", {})
    if measured.get("forward_backward_s") is None or not measured.get("machine"):
        raise BadRequest(f"{key}={run}: holds no finished run that measured its parts; name the directory of "
                         "one, as in runs/tiny-20260101-120000")
    config = read_config(storage.join(run, CONFIG))
    return calibrate(config, Machine(**measured["machine"]), measured, run, counted(run) if routing else ())


def counted(run: str) -> tuple[tuple[float, ...], ...]:
    """Tokens per expert of each layer in a run's last steps; none if it counted none."""
    rows = read_lines(run, METRICS, last=COUNTED_STEPS * MANY_COUNTS_EVERY)
    steps = [row["moe/tokens_per_expert"] for row in rows if row.get("moe/tokens_per_expert")][-COUNTED_STEPS:]
    return tuple(tuple(layer) for step in steps for layer in step if sum(layer))
