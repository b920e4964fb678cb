"""What happens before what: the action table of a pipeline schedule, the same one that the runtime executes.

The one place that touches torch's schedule table, whose name is private (DESIGN: one schedule table).
"""

from orchestrator.config import Schedule
from orchestrator.plan.layout import stages_per_rank

TORCH_NAMES = {
    Schedule.gpipe: "GPipe",
    Schedule["1f1b"]: "1F1B",
    Schedule.interleaved_1f1b: "Interleaved1F1B",
    Schedule.interleaved_zero_bubble: "InterleavedZeroBubble",
    Schedule.zbv: "ZBVZeroBubble",
    Schedule.dualpipev: "DualPipeV",
}


def actions(schedule: Schedule, pp: int, microbatches: int, *, requested_stages: int = 2) -> list[list]:
    """Per pipeline rank, its ordered torch `_Action`s (stage, F B I W or OVERLAP_F_B, microbatch); no idle slots."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    per_rank = stages_per_rank(schedule, requested_stages)
    table = get_schedule_ops(TORCH_NAMES[schedule], pp, microbatches, per_rank)
    return [[action for action in row if action is not None] for row in table]


def torch_class(schedule: Schedule) -> type:
    """The torch schedule class that executes the table."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    return get_schedule_class(TORCH_NAMES[schedule])
