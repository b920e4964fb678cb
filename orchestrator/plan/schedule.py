"""What happens before what: the action table of a pipeline schedule, the same one that the runtime executes.

The one place that touches torch's schedule table, whose name is private (DESIGN: one schedule table).
"""

from typing import NamedTuple

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


KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


class Action(NamedTuple):
    """F forward, B full backward, I its input-gradient part, W its weight-gradient part."""

    kind: str
    stage: int
    microbatch: int


def actions(schedule: Schedule, pp: int, microbatches: int, *, requested_stages: int = 2) -> list[list[tuple]]:
    """Per pipeline rank, what it runs in order: each slot one Action, or a forward and a backward that overlap."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    per_rank = stages_per_rank(schedule, requested_stages)
    table = get_schedule_ops(TORCH_NAMES[schedule], pp, microbatches, per_rank)
    rows = [[tuple(_plain(part) for part in action.sub_actions or (action,)) for action in row
             if action is not None and action.computation_type.name != "REDUCE_GRAD"] for row in table]
    if schedule is Schedule["1f1b"]:
        # torch 2.13 numbers the last rank's forwards from 1 in the table (its runtime counts from 0).
        rows[-1] = [(slot[0]._replace(microbatch=i // 2),) if slot[0].kind == "F" else slot
                    for i, slot in enumerate(rows[-1])]
    return rows


def _plain(action) -> Action:
    return Action(KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)


def torch_class(schedule: Schedule) -> type:
    """The torch schedule class that executes the table."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    return get_schedule_class(TORCH_NAMES[schedule])
