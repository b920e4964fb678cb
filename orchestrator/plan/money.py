"""The money in plan.json: both bills of a layout, its dense equivalents, and what others published.

Dense models go through the same search and the same clock as the mixture. All of it is predicted but `published`,
whose lines say themselves what they are.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace

from model import count
from model.config import ModelConfig
from orchestrator.plan.bill import Terms, make_bill
from orchestrator.plan.confidence import band, made
from orchestrator.plan.cost import dense_equivalents, model_flops
from orchestrator.plan.dense import equal_loss, measured_multiplier
from orchestrator.plan.estimate import estimate
from orchestrator.plan.planner import price
from orchestrator.plan.published import published
from orchestrator.plan.request import Request
from orchestrator.plan.runs import validated
from orchestrator.plan.search import Candidate, search
from orchestrator.plan.workload import Workload, illegal

DENSE_SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv")
RANGES = {"pue": (1, 1e15), "server_factor": (1, 1e15), "power_share": (0, 1)}
"""Least and most of terms; of the others from 0 on."""
ITSELF = "this model is dense"
TWINS = {"equal_active": count.dense_equal_active, "equal_total": count.dense_equal_total}


def money(request: Request, best: Candidate, terms: Terms, compared: dict | None = None) -> dict:
    """`bill`, `dense` and `published` of plan.json. compared: the result of `sparing compare`, if there is one."""
    own = bill_of(request, best, terms)
    return {"bill": own, "dense": dense_of(request, price(best, request), own, compared),
            "published": published()["budgets"]}


def bill_of(request: Request, best: Candidate, terms: Terms) -> dict:
    """Of the whole run under this layout; `ValueError` as of `make_bill`."""
    hardware, work = request.hardware, best.work
    step_s = best.found.step_time_s
    rate = model_flops(request.model, request.batch_size * request.seq_len, request.seq_len) / step_s

    def extension_s(sequences: int, seq_len: int) -> float:
        return model_flops(request.model, sequences * seq_len, seq_len) / rate

    found = make_bill(
        devices=request.devices, tokens=request.tokens, batch_tokens=request.batch_size * request.seq_len,
        batch_size=request.batch_size, replicas=work.dp, step_time_s=step_s, terms=terms,
        usd_per_h=hardware.usd_per_h, watts=hardware.watts, step_at=_step_at(work, step_s), extension_s=extension_s)
    priced = {key: getattr(hardware, key) for key in ("usd_per_h", "market", "source", "date")}
    low, high = band(work)
    return {"price": priced, "made": made(work), "band": [low, high],
            "band_usd": None if hardware.usd_per_h is None else [found["steady"]["usd"] * edge for edge in (low, high)],
            **found}


def terms_for(request: Request, work: Workload) -> Terms:
    """Those asked for, with a validation as the printed command for `train` has it."""
    return replace(request.terms, validate_sequences=validated(request.terms.validate_sequences, work))


def _step_at(work: Workload, step_s: float) -> Callable[[int], float]:
    """Seconds of a step with fewer sequences: a straight line through this step and the shortest legal one, since a
    pipeline's steady part grows with its microbatches and the rest stays. No step is shorter than that one."""
    shortest = _shortest(work)
    if shortest.batch_size == work.batch_size:
        return lambda sequences: step_s
    least_s = estimate(shortest).step_time_s
    slope = (step_s - least_s) / (work.batch_size - shortest.batch_size)
    return lambda sequences: max(least_s, step_s - slope * (work.batch_size - sequences))


def _shortest(work: Workload) -> Workload:
    """The same layout with the fewest microbatches that its schedule takes; if it has no more, of one sequence each."""
    per_microbatch = work.batch_size // work.microbatches
    for number in range(1, work.microbatches):
        fewer = replace(work, microbatches=number, batch_size=per_microbatch * number)
        if illegal(fewer) is None:
            return fewer
    return replace(work, batch_size=work.dp * work.microbatches)


def dense_of(request: Request, best: dict, bill: dict, compared: dict | None) -> dict:
    """Steady device-hours and dollars of dense models: equal active and equal total parameters through the same search,
    equal loss as the range of named scaling laws and as what `compare` measured.

    A twin that fits in no layout keeps the mixture's own MFU, and says so (`how`): an upper bound. A dense model is its
    own twin.
    """
    hardware, model = request.hardware, request.model
    at_own = dense_equivalents(model, request.tokens, seq_len=request.seq_len, mfu=best["mfu"],
                               peak_flops_per_s=hardware.bf16_tflops * 1e12, usd_per_h=hardware.usd_per_h,
                               devices=request.devices)
    how = "the mixture's MFU" if model.n_routed_experts else ITSELF
    found = {name: at_own[name] | {"mfu": best["mfu"], "how": how} for name in at_own}
    if model.n_routed_experts:
        for name, twin in TWINS.items():
            found[name] |= simulated_twin(request, twin(model))
        found["equal_loss"] = equal_loss_of(request, found, compared)
    for line in (found["equal_active"], found["equal_total"]):
        line["over_pre_training"] = line["device_hours"] / bill["steady"]["terms"][0]["gpu_hours"]
    return found


def simulated_twin(request: Request, twin: ModelConfig) -> dict:
    """The best layout of the dense twin on the same devices; if none fits, why. What was pinned is the mixture's."""
    plan = search(replace(request, model=twin, schedules=DENSE_SCHEDULES, keep=1, pinned=()))
    if not plan.candidates:
        needs = [item.reason for item in plan.refused if item.reason.startswith("needs ")]
        return {"refused": f"no layout of it fits: {min(needs, key=_gib, default='none is legal')}"}
    row = price(plan.candidates[0], plan.request)
    return {"device_hours": row["gpu_hours"], "hours": row["days"] * 24, "usd": row["usd_total"], "mfu": row["mfu"],
            "how": "simulated", "layout": row["layout"], "step_time_s": row["step_time_s"]}


def _gib(reason: str) -> float:
    """Of a refusal that begins `needs 316 GiB`."""
    return float(reason.split()[1].replace(",", ""))


def equal_loss_of(request: Request, twins: dict, compared: dict | None) -> dict:
    """FLOPs times a multiplier, at the MFU that a dense model of so many FLOPs has by its twins.

    twins: `equal_active` and `equal_total` of plan.json's `dense`.
    """
    model, hardware = request.model, request.hardware
    flops = model_flops(model, request.tokens, request.seq_len)
    laws = equal_loss(flops=flops, routed=model.n_routed_experts, activated=model.n_activated_experts, dim=model.dim,
                      expert_dim=model.moe_inter_dim)

    def priced(multiplier: float) -> dict:
        mfu = mfu_between(twins, flops * multiplier)
        hours = flops * multiplier / (mfu * hardware.bf16_tflops * 1e12) / 3600
        usd = None if hardware.usd_per_h is None else hours * hardware.usd_per_h
        return {"multiplier": multiplier, "flops": flops * multiplier, "device_hours": hours, "usd": usd, "mfu": mfu}

    measured, spread = None, measured_multiplier(compared or {})
    if spread is not None:
        seeds = spread.get("seeds")
        by = {None: "", 1: ", by 1 seed, which has no range"}.get(seeds, f", by {seeds} seeds")
        measured = {key: priced(spread[key]) for key in ("low", "median", "high")} | {
            "seeds": seeds, "note": f"measured by `compare` over equal active at its own size{by}; applied here as an "
                                    "extrapolation"}
    return {"low": priced(laws["low"]), "high": priced(laws["high"]), "inside_fits": laws["inside_fits"],
            "laws": [law | priced(law["multiplier"]) for law in laws["laws"]], "measured": measured,
            "how": "multiplier x this run's FLOPs, at an MFU between the twins' by log FLOPs: " + ", ".join(
                f"{twins[name]['mfu']:.1%} at {twins[name]['flops'] / flops:.3g}x ({twins[name]['how']})"
                for name in TWINS)}


def mfu_between(twins: dict, flops: float) -> float:
    """Linear in the logarithm of the FLOPs between the twins, theirs beyond them: larger products fill a device better,
    and a model between the two must not cost more than the larger."""
    low, high = (twins[name] for name in TWINS)
    if high["flops"] <= low["flops"]:
        return low["mfu"]
    share = math.log(flops / low["flops"]) / math.log(high["flops"] / low["flops"])
    return low["mfu"] + min(1.0, max(0.0, share)) * (high["mfu"] - low["mfu"])


def terms_of(values: dict[str, str], base: Terms) -> Terms:
    """`Terms` with what was given as text; `ValueError` with key, value, rule and remedy."""
    changed = {}
    for key, text in values.items():
        if key == "extension":
            changed[key] = _phases(text)
            continue
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        least, most = RANGES.get(key, (0, 1e15))
        if not least <= value <= most:
            rule = f"from {least} to {most}" if key in RANGES and most < 1e15 else f"of at least {least}"
            raise ValueError(f"{key}={text}: must be a number {rule}; use {key}={asdict(Terms())[key]:g}")
        changed[key] = value
    return replace(base, **changed)


def _phases(text: str) -> tuple[tuple[int, int, int], ...]:
    try:
        phases = tuple(tuple(int(part) for part in phase.split("x")) for phase in text.split("+"))
    except ValueError:
        phases = ((),)
    if any(len(phase) != 3 or min(phase) < 1 for phase in phases):
        raise ValueError(f"extension={text}: must be phases of STEPSxSEQUENCESxTOKENS joined by +; use "
                         "extension=1000x1920x32768+1000x480x131072")
    return phases
