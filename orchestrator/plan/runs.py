"""Which planned layouts this program's own `train` runs, and as which command."""

from dataclasses import replace

from model.config import ModelConfig
from orchestrator.config import Recompute, Schedule, conf_dir
from orchestrator.plan.keeping import SPARING
from orchestrator.plan.layout import LOOPED_SCHEDULES
from orchestrator.plan.memory import too_large
from orchestrator.plan.workload import Workload


def not_run(work: Workload) -> str | None:
    """What `train` does not offer of this layout, or None; a plan may still price it. Memory aside."""
    for degree, name in ((work.tp, "tensor parallelism"), (work.cp, "context parallelism")):
        if degree > 1:
            return f"train has no {name}"
    if work.dp % work.ep:
        return "train's expert parallelism divides dp"
    if work.schedule not in Schedule.__members__:
        return f"train has no schedule {work.schedule}"
    if work.recompute is Recompute.selective:
        return "train has no selective recompute"
    if work.zero > 1:
        return f"train shards optimizer state alone, not as ZeRO stage {work.zero}"
    if work.dtype != "bf16" and not (conf_dir() / "precision" / f"{work.dtype}.yaml").exists():
        return f"train has no products in {work.dtype}"
    return None


def cannot_run(work: Workload) -> str | None:
    """The same, and whether it fits with what `train` keeps in memory."""
    keeping = replace(SPARING, moments=4) if work.dtype == "fp8" else SPARING  # as conf/precision/fp8.yaml has it
    reason = not_run(work) or too_large(replace(work, keeping=keeping))
    return f"as train keeps it, it {reason}" if reason and reason.startswith("needs ") else reason


def overrides_of(work: Workload) -> list[str]:
    """The same run as `sparing train` takes it."""
    keys = {"pp": work.pp, "dp": work.dp, "ep": work.ep, "schedule": work.schedule, "microbatches": work.microbatches,
            "recompute": work.recompute.name}
    if work.pp > 1 and Schedule[work.schedule] in LOOPED_SCHEDULES:
        keys["stages_per_rank"] = work.stages_per_rank
    return [*_model_words(work.model), *(f"layout.{key}={value}" for key, value in keys.items()),
            f"precision={work.dtype}", f"train.batch_size={work.batch_size}", f"train.seq_len={work.seq_len}",
            f"train.validate_sequences={work.dp * work.microbatches}"]


def _model_words(model: ModelConfig) -> list[str]:
    """A shipped model by name, another by all its keys."""
    if (conf_dir() / "model" / f"{model.name}.yaml").exists():
        return [f"model={model.name}"]
    return [f"model.{key}={getattr(value, 'name', value)}" for key, value in vars(model).items()]
