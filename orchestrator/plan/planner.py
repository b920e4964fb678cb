"""Which layouts fit, how long a step takes and what the run costs: a search, its prices, and plan.json.

Everything here is predicted by `estimate`. The bill is *steady*: step time times steps, nothing for start-up, failures
or validation, as in DeepSeek's published one.
"""

import math
from dataclasses import asdict

from orchestrator.config import TrainConfig
from orchestrator.plan.cost import MFU_CONVENTION, mfu, mfu_conventions, model_flops
from orchestrator.plan.estimate import estimate
from orchestrator.plan.request import Request, layout_of
from orchestrator.plan.runs import as_trained, cannot_grow, cannot_run, overrides_of, steps_for
from orchestrator.plan.search import Candidate, Plan

V3_BATCH, V3_SEQ_LEN = 15360, 4096
MAX_REFUSED = 40
"""Of each kind in plan.json."""


def price(candidate: Candidate, request: Request) -> dict:
    """One candidate as it stands in plan.json; all of it predicted."""
    work, found = candidate.work, candidate.found
    step_tokens = work.batch_size * work.seq_len
    tokens_per_s = step_tokens / found.step_time_s
    flops_per_s = model_flops(work.model, tokens_per_s, work.seq_len)
    hours = request.tokens / tokens_per_s / 3600
    usd, terms = work.hardware.usd_per_h, request.terms
    reason = cannot_run(work) or cannot_grow(work, terms.batch_start)
    steps = steps_for(request.tokens, TrainConfig(batch_size=work.batch_size, seq_len=work.seq_len,
                                                  batch_start=terms.batch_start, batch_ramp_steps=terms.ramp_steps))
    return {
        "layout": layout_of(work), "step_time_s": found.step_time_s, "parts_s": found.parts_s,
        "tokens_per_s": tokens_per_s, "tflops_per_gpu": flops_per_s / work.devices / 1e12,
        "mfu": mfu(flops_per_s, devices=work.devices, peak_flops_per_s=work.hardware.bf16_tflops * 1e12),
        "bubble_fraction": found.bubble_fraction, "imbalance": work.imbalance, "memory_gib": found.memory_gib,
        "days": hours / 24, "gpu_hours": hours * work.devices,
        "gpu_hours_per_trillion_tokens": hours * work.devices / request.tokens * 1e12,
        "usd_total": None if usd is None else hours * work.devices * usd,
        "train": None if reason else overrides_of(work, steps=steps, others=request.run_words,
                                                  validate=terms.validate_sequences,
                                                  per_machine=request.per_machine),
        "train_not": reason, "train_step_s": None if reason else trained(candidate).found.step_time_s,
    }


def trained(candidate: Candidate) -> Candidate:
    """The same by this program's own stack, whatever the plan is priced with."""
    work = as_trained(candidate.work)
    return candidate if work.stack == candidate.work.stack else Candidate(work, estimate(work))


def to_dict(plan: Plan) -> dict:
    """plan.json without the money; `mfu_conventions` is the best layout's rate as the MFUs in print."""
    request = plan.request
    priced = [price(candidate, request) for candidate in plan.candidates[:50]]
    best = priced[0] if priced else None
    conventions = best and mfu_conventions(request.model, best["tokens_per_s"] / request.devices, request.seq_len,
                                           request.hardware)
    hardware = {key: value for key, value in asdict(request.hardware).items() if value not in (None, "")}
    return {
        "predicted": True, "model": request.model.name, "hardware": hardware, "devices": request.devices,
        "tokens": request.tokens, "seq_len": request.seq_len, "batch_size": request.batch_size,
        "dtype": request.computes_in, "stack": request.stack.name, "routing": request.routing.name,
        "assumptions": asdict(request.assumptions), "considered": plan.considered, "best": best, "candidates": priced,
        "mfu_convention": MFU_CONVENTION, "mfu_conventions": conventions,
        "refused": [asdict(item) for items in plan.kinds_refused().values() for item in items[:MAX_REFUSED]],
    }


def default_batch(devices: int, seq_len: int) -> int:
    """Sequences a step: 8 a device, so that every power of two divides it, up to V3's 15,360; more sequences would
    make ever more devices useful on paper, and not in training. Of sequences above V3's 4,096 tokens so many fewer, as
    in its context extension (section 4.3), but one a device where that is no more tokens than V3's."""
    longer = 2 ** max(0, math.ceil(math.log2(seq_len / V3_SEQ_LEN)))
    return max(1, min(max(8 * devices // longer, devices), V3_BATCH // longer))
