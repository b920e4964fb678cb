"""What a whole run costs: two bills that are never added up.

*Steady* is step time times steps, as in DeepSeek's published bill: the V3 report's 180K GPU-hours per trillion tokens
are its steady step time and contain no failure. *Expected* adds start-up, validation, checkpoints, failures and
preemptions; expected over steady is the *production factor*. Every term carries its equation and its source. All of it
is predicted.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from orchestrator.config import TrainConfig
from orchestrator.plan.interval import expected_losses, optimal_interval
from orchestrator.plan.layout import ramp_fault, ramp_parts

LLAMA_3 = "Llama 3 report: 419 unexpected interruptions of 2,048 nodes in 54 days"
NODE = 8
"""Devices of the nodes that failures are counted by, LLAMA_3's; not those of a link domain, which may be a rack."""


@dataclass(frozen=True)
class Terms:
    """What a bill is computed from besides the step. An assumption is marked as one in the bill's sources."""

    failures: float = 3.8
    """Per 1,000 node-days (LLAMA_3); a node is 8 devices."""
    preemptions: float = 0.0
    """Per 1,000 node-days; a spot market has some, and no rate was found in print."""
    recovery_s: float = 600.0
    """From a failure to the first new step: detect, restart, load."""
    checkpoint_stall_s: float = 30.0
    """Time that ranks stand still for one checkpoint."""
    start_up_s: float = 600.0
    """From placement to the first step, once."""
    validate_every: int = 0
    """Steps between validations; 0 is none."""
    validate_sequences: int = 0
    """Sequences of one validation; 0 is as many as a step has."""
    batch_start: int = 0
    ramp_steps: int = 0
    """The batch grows from `batch_start` in multiples of it over so many steps, as `train` has it, or until the tokens
    are used up; 0 is no ramp."""
    extension: tuple[tuple[int, int, int], ...] = ()
    """Context extension: phases of (steps, sequences, tokens per sequence)."""
    other_gpu_hours: float = 0.0
    """Post-training and whatever else is known in GPU-hours alone."""
    server_factor: float = 1.8
    """Power of a server over the data-sheet power of its devices; Epoch AI has 1.82 for H100, 2.03 for A100."""
    power_share: float = 0.75
    """Of that, what a training run draws on average (Epoch AI)."""
    pue: float = 1.1
    """Power of the building over that of its servers; 1.1 at a hyperscaler, 1.25 elsewhere (Epoch AI)."""


@dataclass(frozen=True)
class Term:
    name: str
    gpu_hours: float
    equation: str
    source: str


def make_bill(*, devices: int, tokens: float, batch_tokens: int, step_time_s: float, terms: Terms,
              usd_per_h: float | None, watts: float | None = None,
              step_at: Callable[[int], float] | None = None,
              extension_s: Callable[[int, int], float] | None = None, batch_size: int = 1, replicas: int = 1) -> dict:
    """Both bills, JSON.

    step_at: seconds of a step of so many sequences (for the ramp). extension_s: seconds of a step of (sequences, tokens
    per sequence). Raises ValueError if less than a step is asked for, if the ramp falls or cuts sequences, or if
    failures leave no time to work.
    """
    if tokens < batch_tokens:
        raise ValueError(f"tokens={tokens:.4g}: must be at least one step, {batch_tokens:,} tokens; raise tokens, or "
                         "lower train.batch_size or train.seq_len")
    fault = ramp_fault(terms.batch_start, batch_size, replicas, f"the layout's dp={replicas}")
    if fault:
        raise ValueError(f"train.batch_start={terms.batch_start}: {fault[0]}; {fault[1]}")
    nodes = math.ceil(devices / NODE)
    train = TrainConfig(batch_size=batch_size, batch_start=terms.batch_start, batch_ramp_steps=terms.ramp_steps)
    ramp, steps = steps_of(train, math.ceil(tokens / (batch_tokens // batch_size)))
    steady = _steady(devices, tokens / batch_tokens, step_time_s, terms, ramp if step_at else [], step_at, extension_s,
                     batch_size)
    base = sum(term.gpu_hours for term in steady)
    rate = (terms.failures + terms.preemptions) / 1000 * nodes / 86400
    mtbf = 1 / rate if rate else math.inf
    if terms.recovery_s + terms.checkpoint_stall_s > 20 * mtbf:
        raise ValueError(f"failures={terms.failures:g}: leave no time to work on {nodes:,} nodes; lower failures, "
                         "recovery_s or gpus")
    every, lost = _losses(terms, mtbf)
    added = [Term("start_up", terms.start_up_s * devices / 3600, "start-up time x devices", "assumption: start_up_s")]
    if terms.validate_every:
        full_steps = math.ceil(steps / terms.validate_every) * (terms.validate_sequences or batch_size) / batch_size
        added.append(Term("validation", full_steps * step_time_s / 3 * devices / 3600, "forward, a third of a step, of "
                          "validate_sequences every validate_every steps and at the end", "train.validate_every"))
    worked = base + sum(term.gpu_hours for term in added)
    gross = worked / (1 - sum(lost.values()))
    rated = f"failures={terms.failures:g} per 1,000 node-days ({LLAMA_3})" if terms.failures == Terms.failures else (
        f"failures={terms.failures:g} per 1,000 node-days")
    rated += f", preemptions={terms.preemptions:g}" if terms.preemptions else ""
    why = {"checkpoint": ("a stall every interval of Young and Daly", "assumption: checkpoint_stall_s"),
           "lost_work": ("work since the last checkpoint at a failure, exact mean (Daly 2006)", rated),
           "restart": ("a recovery every failure", "assumption: recovery_s, as often as lost_work")}
    added += [Term(name, gross * share, *why[name]) for name, share in lost.items()]
    expected = base + sum(term.gpu_hours for term in added)
    power = None if watts is None else devices * watts * terms.server_factor * terms.power_share * terms.pue / 1e3
    return {
        "steady": _total(steady, base, usd_per_h, devices),
        "expected": _total([*steady, *added], expected, usd_per_h, devices),
        "production_factor": expected / base, "goodput": base / expected,
        "mtbf_h": None if math.isinf(mtbf) else mtbf / 3600,
        "checkpoint_every_s": every,
        "power_kw": power, "energy_kwh": None if power is None else power * expected / devices,
        "energy_equation": "devices x data-sheet watts x server_factor x power_share x pue x hours (Epoch AI's method)",
        "terms": asdict(terms),
    }


def _losses(terms: Terms, mtbf: float) -> tuple[float | None, dict[str, float]]:
    """Seconds between checkpoints, and shares of the wall time lost; none without failures."""
    if math.isinf(mtbf):
        return None, dict.fromkeys(("checkpoint", "lost_work", "restart"), 0.0)
    every = max(1.0, optimal_interval(terms.checkpoint_stall_s, mtbf))
    return every, expected_losses(every, terms.checkpoint_stall_s, mtbf, terms.recovery_s)


def _steady(devices: int, full_steps: float, step_time_s: float, terms: Terms, ramp: list[tuple[float, int]],
            step_at: Callable[[int], float] | None, extension_s: Callable[[int, int], float] | None,
            batch_size: int) -> list[Term]:
    per_step = devices / 3600
    found = [Term("pre_training", full_steps * step_time_s * per_step, "steps x step time x devices", "simulated step")]
    if ramp:
        extra = sum(steps * (step_at(batch) - step_time_s * batch / batch_size) for steps, batch in ramp)
        found.append(Term("batch_ramp", extra * per_step, "over the ramp, step time beyond its share of a "
                          "full step", "simulated steps with fewer microbatches"))
    for steps, sequences, seq_len in terms.extension if extension_s else ():
        found.append(Term(f"context_{seq_len}", steps * extension_s(sequences, seq_len) * per_step,
                          "steps x step time x devices", "FLOPs at this length over the pre-training FLOP/s"))
    if terms.other_gpu_hours:
        found.append(Term("other", terms.other_gpu_hours, "as given", "other_gpu_hours"))
    return found


def steps_of(train: TrainConfig, sequences: int) -> tuple[list[tuple[float, int]], int]:
    """Steps, and sequences of each, of the ramp's parts that so many sequences last for, of the last step its share;
    and the fewest steps of `train` that see them all."""
    found, done = [], 0
    for steps, batch in ramp_parts(train):
        if steps * batch >= sequences:
            return [*found, (sequences / batch, batch)], done + math.ceil(sequences / batch)
        found.append((steps, batch))
        done, sequences = done + steps, sequences - steps * batch
    return found, done + math.ceil(sequences / train.batch_size)


def _total(found: list[Term], gpu_hours: float, usd_per_h: float | None, devices: int) -> dict:
    def usd(hours: float) -> float | None:
        return None if usd_per_h is None else hours * usd_per_h

    return {"gpu_hours": gpu_hours, "days": gpu_hours / devices / 24, "usd": usd(gpu_hours),
            "terms": [asdict(term) | {"usd": usd(term.gpu_hours)} for term in found]}
