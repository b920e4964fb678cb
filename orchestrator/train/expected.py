"""What this run is expected to take, by the formula or by what a finished run measured (`run.calibrate`)."""

import json
from dataclasses import replace

from orchestrator.config import Config
from orchestrator.errors import BadRequest
from orchestrator.plan.bill import Terms
from orchestrator.plan.estimate import estimate
from orchestrator.plan.forecast import Machine, calibrate, forecast, memory_of, routing_of, workload_of
from orchestrator.plan.money import bill_of
from orchestrator.plan.planner import to_dict
from orchestrator.plan.request import Request
from orchestrator.plan.search import Candidate, Plan
from orchestrator.plan.workload import Calibration
from orchestrator.train import storage
from orchestrator.train.data import samples_before
from orchestrator.train.finish import read_summary
from orchestrator.train.metrics import MANY_COUNTS_EVERY, METRICS, read_lines
from orchestrator.train.run_dir import CONFIG, read_config

PLAN = "plan.json"
COUNTED_STEPS = 20
"""Of a run's end, whose routing is taken."""


def expected(config: Config, machine: Machine) -> tuple[dict, Calibration]:
    """`predicted` of summary.json, {"how": why not} where a figure is not known; and what a run taught it."""
    try:
        learnt = _learnt(config, machine)
        return forecast(config, machine, learnt), learnt
    except ValueError as error:
        return {"how": f"not predicted: {error}"}, Calibration()


def _learnt(config: Config, machine: Machine) -> Calibration:
    learnt = read_calibration(config.run.calibrate)
    if learnt.run:
        check_device(learnt, "run.calibrate", config.hardware.name, machine.device)
    return learnt


def keep_plan(config: Config, machine: Machine, learnt: Calibration) -> None:
    """Write the run's plan.json: a plan as `sparing plan out=` has it, of this run's own layout alone, for all of its
    steps. `ValueError` where `expected` has no figures. learnt: by the same."""
    train = config.train
    work = workload_of(config, machine, learnt)
    terms = Terms(validate_every=train.validate_every, validate_sequences=train.validate_sequences,
                  batch_start=train.batch_start, ramp_steps=train.batch_ramp_steps)
    request = Request(config.model, work.hardware, work.devices, samples_before(train.steps, train) * train.seq_len,
                      train.seq_len, train.batch_size, work.dtype, assumptions=work.assumptions, stack=work.stack,
                      routing=routing_of(learnt, config.model), calibration=work.calibration, terms=terms)
    found = replace(estimate(work), memory_gib=memory_of(config, machine, work))
    candidate = Candidate(work, found)
    data = to_dict(Plan(request, [candidate], [], 1))
    del data["best"]["train"], data["best"]["train_not"], data["best"]["train_step_s"]  # how to run what is running
    data["bill"] = bill_of(request, candidate, terms)
    storage.write_bytes(storage.join(config.run.dir, PLAN), (json.dumps(data, indent=2) + "\n").encode())


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


def check_device(learnt: Calibration, key: str, hardware: str, device: str) -> None:
    """`BadRequest` where what a run measured says nothing of this hardware."""
    if bool(learnt.cores) != (device == "cpu"):
        where = "on a CPU" if learnt.cores else "on GPUs"
    elif learnt.hardware not in ("", "auto", hardware):
        where = f"on {learnt.hardware}"
    else:
        return
    raise BadRequest(f"{key}={learnt.run}: was measured {where} and says nothing of hardware={hardware}; name a run on "
                     "such devices, or leave it out")


def counted(run: str) -> tuple[tuple[float, ...], ...]:
    """Tokens per expert of each layer in a run's last steps; none if it counted none."""
    rows = read_lines(run, METRICS, last=COUNTED_STEPS * MANY_COUNTS_EVERY)
    steps = [row["moe/tokens_per_expert"] for row in rows if row.get("moe/tokens_per_expert")][-COUNTED_STEPS:]
    return tuple(tuple(layer) for step in steps for layer in step if sum(layer))
