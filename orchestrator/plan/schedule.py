"""What happens before what: the action table of a pipeline schedule, the same one that the runtime executes.

The one place that touches torch's schedule table, whose name is private (DESIGN: one schedule table).
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

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


_NO_SPEC = SimpleNamespace(create_autospec=lambda *_, **__: SimpleNamespace())


@lru_cache(maxsize=512)
def actions(schedule: Schedule, pp: int, microbatches: int, *, requested_stages: int = 2) -> list[list[tuple]]:
    """Per pipeline rank, what it runs in order: each slot one Action, or a forward and a backward that overlap.

    The table is shared between callers: read it, do not change it. torch would also work out each rank's sends and
    weight gathering, in a time that grows with the square of the microbatches, and leave them out of the table; and it
    would look at a stage's every method to pretend one, which takes longer than the table.
    """
    from torch.distributed.pipelining import _schedule_visualizer
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    per_rank = stages_per_rank(schedule, requested_stages)
    with (patch.object(_PipelineScheduleRuntime, "_prepare_schedule_with_comms"),
          patch.object(_schedule_visualizer, "mock", _NO_SPEC, create=True)):
        table = _schedule_visualizer.get_schedule_ops(TORCH_NAMES[schedule], pp, microbatches, per_rank)
    rows = [[tuple(_plain(part) for part in action.sub_actions or (action,)) for action in row
             if action is not None and action.computation_type.name != "REDUCE_GRAD"] for row in table]
    if schedule is Schedule["1f1b"]:
        # torch 2.13 numbers the last rank's forwards from 1 in the table (its runtime counts from 0).
        rows[-1] = [(slot[0]._replace(microbatch=i // 2),) if slot[0].kind == "F" else slot
                    for i, slot in enumerate(rows[-1])]
    return rows


@lru_cache(maxsize=64)
def dualpipe(pp: int, microbatches: int) -> list[list[tuple]]:
    """DualPipe's table (V3 report, section 3.2.1; the eight steps of DeepSeek's dualpipe.py), which torch does not run.

    Microbatches enter from both ends, half of them from each. Going up they pass stages 0 to pp - 1; coming down they
    pass the copies of the same stages on the opposite ranks, numbered pp to 2 pp - 1: rank r has r and 2 pp - 1 - r.
    """
    if pp % 2 or microbatches % 2 or microbatches < 2 * pp:
        raise ValueError(f"dualpipe wants an even number of ranks and an even number of microbatches, at least twice "
                         f"as many: not {pp} ranks with {microbatches} microbatches")
    return [_dualpipe_rank(rank, pp, microbatches) for rank in range(pp)]


def _dualpipe_rank(rank: int, pp: int, microbatches: int) -> list[tuple]:
    half = min(rank, pp - 1 - rank)
    stages = (rank, 2 * pp - 1 - rank) if rank < pp // 2 else (2 * pp - 1 - rank, rank)
    numbers = {(kind, phase): iter(range(microbatches)) for kind in "FB" for phase in (0, 1)}
    row: list[tuple] = []
    later: list[Action] = []

    def one(kind: str, phase: int, *, split: bool = False) -> Action:
        action = Action(kind, stages[phase], next(numbers[kind, phase]))
        if split:
            later.append(action._replace(kind="W"))
            return action._replace(kind="I")
        return action

    def weight() -> None:
        row.append((later.pop(0),))

    outer, inner = pp // 2 - half - 1, half + 1
    row += [(one("F", 0),) for _ in range(2 * outer)]
    for _ in range(inner):
        row += [(one("F", 0),), (one("F", 1),)]
    for _ in range(outer):
        row.append((one("B", 1, split=True),))
        weight()
        row.append((one("F", 1),))
    for i in range(microbatches // 2 - pp + inner):
        pair = one("F", 0), one("B", 1)
        row += [(pair[0],), (pair[1],)] if i == 0 and outer == 0 else [pair]
        row.append((one("F", 1), one("B", 0)))
    for _ in range(outer):
        row += [(one("B", 1),), (one("F", 1), one("B", 0))]
    for i in range(inner):
        odd = half % 2
        row.append((one("B", 1, split=i > inner // 2 or (i == inner // 2 and odd == 1)),))
        row.append((one("B", 0, split=i >= inner // 2),))
    for _ in range(outer):
        weight()
        row.append((one("B", 0, split=True),))
    for _ in range(len(later)):
        weight()
    return row


def _plain(action) -> Action:
    return Action(KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)


def torch_class(schedule: Schedule) -> type:
    """The torch schedule class that executes the table."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    return get_schedule_class(TORCH_NAMES[schedule])
