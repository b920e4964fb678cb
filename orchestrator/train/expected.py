"""What this run is expected to take, by the formula or by what a finished run measured (`run.calibrate`)."""

import os
from typing import TYPE_CHECKING

import yaml

from orchestrator.config import Config, from_dict
from orchestrator.errors import BadRequest
from orchestrator.plan.forecast import Machine, calibrate, forecast
from orchestrator.plan.workload import Calibration
from orchestrator.train import storage
from orchestrator.train.finish import read_summary

if TYPE_CHECKING:
    from orchestrator.parallel.mesh import Mesh


def expected(config: Config, mesh: "Mesh", peak_flops_per_s: float) -> dict:
    """`predicted` of summary.json; {"how": why not} where a figure is not known."""
    machine = Machine(mesh.device.type, peak_flops_per_s, mesh.info.local_world_size, os.cpu_count() or 1)
    try:
        return forecast(config, machine, read_calibration(config.run.calibrate))
    except (ValueError, BadRequest) as error:
        return {"how": f"not predicted: {error}"}


def read_calibration(run: str | None, key: str = "run.calibrate") -> Calibration:
    """From a finished run's own summary and config; `BadRequest` where it kept none."""
    if not run:
        return Calibration()
    summary = read_summary(run)
    measured = (summary or {}).get("measured", {})
    if measured.get("forward_backward_s") is None or not measured.get("machine"):
        raise BadRequest(f"{key}={run}: holds no finished run that measured its parts; name the directory of "
                         "one, as in runs/tiny-20260101-120000")
    config = from_dict(Config, yaml.safe_load(storage.read_bytes(storage.join(run, "config.yaml"))))
    return calibrate(config, Machine(**measured["machine"]), measured, run)
