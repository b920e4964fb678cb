"""Which layouts fit, how long a step takes and what the run costs: every legal layout priced, the others with a reason.

Everything here is predicted by `estimate`. The bill is *steady*: step time times steps, nothing for start-up, failures
or validation, as in DeepSeek's published one.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from model.config import ModelConfig, divisors
from orchestrator.config import HardwareConfig, Recompute, Schedule
from orchestrator.plan.cost import dense_equivalents, mfu, model_flops
from orchestrator.plan.estimate import Estimate, estimate
from orchestrator.plan.layout import SPLIT_BACKWARD, stages_per_rank
from orchestrator.plan.memory import too_large
from orchestrator.plan.workload import Assumptions, Calibration, Workload

SCHEDULES = [schedule.name for schedule in Schedule if schedule is not Schedule.gpipe] + ["dualpipe"]
SPLIT = [schedule.name for schedule in SPLIT_BACKWARD]
MAX_REFUSED = 200


@dataclass(frozen=True)
class Request:
    """What is to be planned."""

    model: ModelConfig
    hardware: HardwareConfig
    devices: int
    tokens: float
    seq_len: int
    batch_size: int
    """Sequences per step."""
    dtype: str = "bf16"
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    assumptions: Assumptions = Assumptions()
    calibration: Calibration = Calibration()


@dataclass(frozen=True)
class Candidate:
    work: Workload
    found: Estimate


@dataclass(frozen=True)
class Refused:
    layout: dict
    reason: str


@dataclass(frozen=True)
class Plan:
    request: Request
    candidates: list[Candidate]
    """That fit, fastest first."""
    refused: list[Refused]
    considered: int


def make_plan(request: Request) -> Plan:
    """Enumerate, refuse or price, rank."""
    candidates, refused, considered = [], [], 0
    for work in layouts(request):
        considered += 1
        reason = illegal(work)
        if reason is None:
            reason = too_large(work)
        if reason is None:
            candidates.append(Candidate(work, estimate(work)))
            continue
        refused.append(Refused(layout_of(work), reason))
    candidates.sort(key=lambda candidate: (candidate.found.step_time_s, candidate.found.memory_gib["total"]))
    return Plan(request, candidates, refused, considered)


def layouts(request: Request) -> Iterator[Workload]:
    """Degrees, schedule, microbatch of 1 to 8 sequences, recompute; powers of two are not asked for, divisors are."""
    model = request.model
    experts = model.n_routed_experts or 1
    for pp in divisors(request.devices):
        if pp > model.n_layers or pp > 64:
            continue
        dp = request.devices // pp
        for ep in (ep for ep in divisors(dp) if experts % ep == 0 and (ep == 1 or model.n_routed_experts)):
            for schedule in (request.schedules if pp > 1 else ("1f1b",)):
                for sequences in (1, 2, 4, 8):
                    if request.batch_size % (dp * sequences):
                        continue
                    for recompute in (Recompute.none, Recompute.full):
                        yield Workload(model, request.hardware, request.seq_len, request.batch_size, pp, dp, ep,
                                       schedule, request.batch_size // (dp * sequences), recompute=recompute,
                                       dtype=request.dtype, assumptions=request.assumptions,
                                       calibration=request.calibration)


def illegal(work: Workload) -> str | None:
    """Why the schedule cannot run this, or why it is not worth pricing; None if it can."""
    pp, micro = work.pp, work.microbatches
    if pp == 1:
        return None
    if work.schedule == "dualpipe":
        stages = pp
        if pp % 2 or micro % 2 or micro < 2 * pp:
            return f"dualpipe wants even ranks and an even number of at least {2 * pp} microbatches, not {micro}"
    else:
        schedule = Schedule[work.schedule]
        stages = pp * stages_per_rank(schedule, work.stages_per_rank)
        least = stages if schedule in (Schedule["1f1b"], Schedule.zbv, Schedule.dualpipev) else pp
        if micro < least:
            return f"{work.schedule} wants at least {least} microbatches, not {micro}"
        if schedule.name.startswith("interleaved") and micro % max(1, micro // pp):
            return f"{work.schedule} wants microbatches in equal rounds of {pp} ranks, not {micro}"
    if work.schedule in SPLIT and work.recompute is Recompute.full:
        return f"{work.schedule} wants no recompute: its split backward cannot go with it"
    if stages > work.model.n_layers:
        return f"{stages} stages for {work.model.n_layers} layers"
    return None


def layout_of(work: Workload) -> dict:
    return {"pp": work.pp, "dp": work.dp, "ep": work.ep, "schedule": work.schedule, "microbatches": work.microbatches,
            "recompute": work.recompute.name}


def overrides_of(work: Workload) -> list[str]:
    """The same run as `sparing train` takes it."""
    return [f"model={work.model.name}", *(f"layout.{key}={value}" for key, value in layout_of(work).items()),
            f"train.batch_size={work.batch_size}", f"train.seq_len={work.seq_len}",
            f"train.validate_sequences={work.dp * work.microbatches}"]


def price(candidate: Candidate, request: Request) -> dict:
    """One candidate as it stands in plan.json; all of it predicted."""
    work, found = candidate.work, candidate.found
    step_tokens = work.batch_size * work.seq_len
    tokens_per_s = step_tokens / found.step_time_s
    flops_per_s = model_flops(work.model, tokens_per_s, work.seq_len)
    hours = request.tokens / tokens_per_s / 3600
    usd = work.hardware.usd_per_h
    return {
        "layout": layout_of(work), "step_time_s": found.step_time_s, "parts_s": found.parts_s,
        "tokens_per_s": tokens_per_s, "tflops_per_gpu": flops_per_s / work.devices / 1e12,
        "mfu": mfu(flops_per_s, devices=work.devices, peak_flops_per_s=work.hardware.bf16_tflops * 1e12),
        "bubble_fraction": found.bubble_fraction, "memory_gib": found.memory_gib, "days": hours / 24,
        "gpu_hours": hours * work.devices,
        "gpu_hours_per_trillion_tokens": hours * work.devices / request.tokens * 1e12,
        "usd_total": None if usd is None else hours * work.devices * usd,
        "train": overrides_of(work) if work.schedule != "dualpipe" else None,
    }


def to_json(plan: Plan) -> str:
    """plan.json."""
    request = plan.request
    priced = [price(candidate, request) for candidate in plan.candidates[:50]]
    best = priced[0] if priced else None
    dense = dense_equivalents(request.model, request.tokens, seq_len=request.seq_len, mfu=best["mfu"] if best else None,
                              peak_flops_per_s=request.hardware.bf16_tflops * 1e12,
                              usd_per_h=request.hardware.usd_per_h, devices=request.devices)
    hardware = {key: value for key, value in asdict(request.hardware).items() if value not in (None, "")}
    return json.dumps({
        "predicted": True, "model": request.model.name, "hardware": hardware, "devices": request.devices,
        "tokens": request.tokens, "seq_len": request.seq_len, "batch_size": request.batch_size, "dtype": request.dtype,
        "assumptions": asdict(request.assumptions), "considered": plan.considered, "best": best, "candidates": priced,
        "refused": [asdict(item) for item in plan.refused[:MAX_REFUSED]],
        "dense": {"at": "the best layout's own MFU", **dense},
    }, indent=2) + "\n"


def default_batch(devices: int) -> int:
    """Sequences a step: 7.5 a device, as in V3's run on 2,048, made a multiple of the devices' halves."""
    return max(1, devices * 15 // 2)
