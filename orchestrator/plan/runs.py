"""Which planned layouts this program's own `train` runs, and as which command."""

import math
import re
from dataclasses import replace
from functools import lru_cache

import yaml

from model.config import ModelConfig, divisors
from orchestrator.config import Schedule, TrainConfig, conf_dir, from_dict
from orchestrator.plan.bill import steps_of
from orchestrator.plan.exchange import domains
from orchestrator.plan.forecast import OWN
from orchestrator.plan.keeping import own
from orchestrator.plan.layout import LOOPED_SCHEDULES, ramp_fault, suits_machines
from orchestrator.plan.memory import too_large
from orchestrator.plan.workload import Workload
from orchestrator.words import word


def not_run(work: Workload) -> str | None:
    """What `train` does not offer of this layout, or None; a plan may still price it. Memory aside."""
    for degree, name in ((work.tp, "tensor parallelism"), (work.cp, "context parallelism")):
        if degree > 1:
            return f"train has no {name}"
    if work.dp % work.ep:
        return "train's expert parallelism divides dp"
    if work.schedule not in Schedule.__members__:
        return f"train has no schedule {work.schedule}"
    if work.zero > 1:
        return f"train shards optimizer state alone, not as ZeRO stage {work.zero}"
    if work.dtype != "bf16" and not (conf_dir() / "precision" / f"{work.dtype}.yaml").exists():
        return f"train has no products in {work.dtype}"
    return None


def cannot_run(work: Workload) -> str | None:
    """The same, and whether it fits with what `train` keeps in memory."""
    kept = work if work.keeping.eager else replace(work, keeping=own(work.dtype))
    reason = not_run(work) or too_large(kept)
    return f"as train keeps it, it {reason}" if reason and reason.startswith("needs ") else reason


def as_trained(work: Workload) -> Workload:
    """The same as this program runs it: its own stack, and what it keeps in memory."""
    if work.keeping.eager:  # a CPU's plan is of nothing else
        return work
    stack = work.stack if work.stack.name == OWN.name else replace(OWN, copies=work.ep == 1)
    return replace(work, keeping=own(work.dtype), stack=stack)


def cannot_grow(work: Workload, batch_start: int) -> str | None:
    """Why `train` cannot begin this layout with so few sequences a step, or None; 0 is no ramp."""
    quantum = work.dp * work.microbatches
    fault = ramp_fault(batch_start, work.batch_size, quantum, f"dp x microbatches = {quantum}")
    return f"train.batch_start={batch_start}: {fault[0]}; {fault[1]}, or no ramp" if fault else None


def steps_for(tokens: float, train: TrainConfig) -> int:
    """The fewest steps of `train` that see so many tokens, its batch ramp included."""
    return steps_of(train, math.ceil(tokens / train.seq_len))[1]


def validated(asked: int, work: Workload) -> int:
    """Sequences of a validation as the layout takes them: so many, or the next more."""
    quantum = work.dp * work.microbatches
    return max(1, math.ceil(asked / quantum)) * quantum


def overrides_of(work: Workload, *, steps: int | None = None, others: tuple[str, ...] = (), validate: int = 0,
                 per_machine: int = 0) -> list[str]:
    """The same run as `sparing train` takes it. others: words of the plan's own command that hold for the run too.
    validate: sequences of a validation by the config. per_machine: ranks of a machine; 0: unknown."""
    keys = {"pp": work.pp, "dp": work.dp, "ep": work.ep, "schedule": work.schedule, "microbatches": work.microbatches,
            "recompute": work.recompute.name}
    if work.pp > 1 and Schedule[work.schedule] in LOOPED_SCHEDULES:
        keys["stages_per_rank"] = work.stages_per_rank
    if work.ep > 1 and not work.stack.copies:
        keys["ep_per_node"] = ep_per_node(work, per_machine)
    train = {"batch_size": work.batch_size, "seq_len": work.seq_len} | ({} if steps is None else {"steps": steps})
    if validated(validate, work) != validate:
        others = tuple(word for word in others if not word.startswith(f"{VALIDATED}="))
        train["validate_sequences"] = validated(validate, work)
    precision = [f"precision={work.dtype}"] * (work.hardware.device == "cuda")  # a CPU's is in the others, or auto
    return [*_model_words(work.model), *(f"layout.{key}={value}" for key, value in keys.items()), *precision,
            *(f"train.{key}={value}" for key, value in train.items()), *others]


def ep_per_node(work: Workload, per_machine: int) -> int:
    """Most ranks of an expert group that lie on one domain wherever the group begins, and that machines go into."""
    whole = domains(work, work.ep) == 1
    found = divisors(work.ep if whole else math.gcd(work.ep, work.hardware.scale_up_devices))
    return max(part for part in found if suits_machines(part, per_machine))


VALIDATED = "train.validate_sequences"


def _model_words(model: ModelConfig) -> list[str]:
    """A shipped model by name and what differs from it, another by all its keys."""
    shipped = _shipped(model.name)
    known = vars(shipped) if shipped else {}
    return [f"model={model.name}"] * (shipped is not None) + [
        f"model.{key}={word(value)}" for key, value in vars(model).items() if key not in known or known[key] != value]


@lru_cache
def _shipped(name: str) -> ModelConfig | None:
    """The model of conf/model, which nothing may change."""
    file = conf_dir() / "model" / f"{name}.yaml"
    if not re.fullmatch(r"\w+", name) or not file.exists():
        return None
    values = yaml.safe_load(file.read_text())
    values.pop("defaults", None)
    return from_dict(ModelConfig, values, "model.")
