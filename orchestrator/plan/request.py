"""What is asked of a plan, and how one of its layouts is named. Nothing is searched or priced here."""

from dataclasses import dataclass

from model.config import Attention, ModelConfig
from orchestrator.config import HardwareConfig, Schedule
from orchestrator.plan.bill import Terms
from orchestrator.plan.exchange import Routing
from orchestrator.plan.forecast import Cpus
from orchestrator.plan.keeping import PLANNED, Keeping
from orchestrator.plan.layout import stages_per_rank
from orchestrator.plan.stack import Stack
from orchestrator.plan.workload import Assumptions, Calibration, Workload

SCHEDULES = [schedule.name for schedule in Schedule if schedule is not Schedule.gpipe] + ["dualpipe"]
MAX_TP = 8
MOST_DEVICES = 16384
"""That a question looks at."""
DEGREES = ("tp", "cp")
"""That only others' programs have, beside a ZeRO stage."""


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
    """`bf16`, `fp8`, or `any` that the hardware has."""
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    keep: int = 10
    """So many of the fastest layouts are put on the clock, and as many of the fastest that `train` runs."""
    pinned: tuple[tuple[str, object], ...] = ()
    """Keys of `layout_of` and the only value each may have."""
    assumptions: Assumptions = Assumptions()
    calibration: Calibration = Calibration()
    stack: Stack = Stack()
    """The software that trains."""
    routing: Routing = Routing()
    batch_asked: bool = False
    """Whether the batch was asked for; one that was not follows the number of devices."""
    terms: Terms = Terms()
    """What the bill counts besides the step."""
    keeping: Keeping = PLANNED
    """What the program keeps in memory."""
    per_machine: int = 0
    """Ranks of a machine, as the cluster has them; 0: unknown."""
    cpus: Cpus | None = None
    """Whose ranks share machines, if they do."""
    cpu_dtype: str = "fp32"
    """What they compute in, at the rate of the calibrating run's products."""
    run_words: tuple[str, ...] = ()
    """Words of the command that say nothing of model, layout and batch, and hold for `train` too."""

    def asks(self, work: Workload, *keys: str) -> bool:
        """Whether nothing else was pinned in these keys."""
        layout = layout_of(work)
        return all(layout[key] == value for key, value in self.pinned if key in keys)

    @property
    def computes_in(self) -> str:
        """What `train` would compute in."""
        return self.dtype if self.cpus is None else self.cpu_dtype

    @property
    def more_memory(self) -> str:
        """What to do where no number of devices holds the model."""
        if self.cpus and not self.per_machine:
            return "name more machines than this one, as in cluster.ranks_per_node=2"
        return "use larger devices"

    @property
    def most_devices(self) -> int:
        """That a question looks at; a single machine has no more ranks than cores."""
        single = self.cpus and not self.per_machine
        return max(1, self.cpus.calibration.cores) if single else MOST_DEVICES

    @property
    def most_tp(self) -> int:
        """Tensor-parallel ranks: of one node."""
        return min(MAX_TP, self.hardware.scale_up_devices)


def divides_heads(model: ModelConfig, tp: int) -> bool:
    return model.n_heads % tp == 0 and (model.attention is Attention.mla or model.n_kv_heads % tp == 0)


def layout_of(work: Workload) -> dict:
    """As plan.json has it."""
    return {"pp": work.pp, "dp": work.dp, "ep": work.ep, "tp": work.tp, "cp": work.cp, "schedule": work.schedule,
            "stages_per_rank": _virtual(work), "microbatches": work.microbatches, "recompute": work.recompute.name,
            "zero": work.zero, "dtype": work.dtype}


def _virtual(work: Workload) -> int:
    if work.pp == 1:
        return 1
    return 2 if work.schedule == "dualpipe" else stages_per_rank(Schedule[work.schedule], work.stages_per_rank)
