"""A step's time without the whole clock: a lower bound from its stages, and a long step from a short one."""

from dataclasses import replace
from math import inf

from orchestrator.plan.estimate import reduction_s, stage_times, step_parts
from orchestrator.plan.memory import stages_on
from orchestrator.plan.simulate import StageTime
from orchestrator.plan.workload import SPLIT, Workload, pipeline_of, stage_layers

NEAR = 0.97
"""Of what a short clock says, at least, the whole one may say."""


def clock_s(work: Workload, *, below: float = inf) -> float:
    """Seconds of a step. Of many microbatches, two rounds by the clock; then the busiest rank sets the pace. The whole
    clock runs where that may come out below `below`."""
    rounds = work.microbatches // work.pp
    if work.pp > 1 and rounds > 3 and not work.microbatches % work.pp and not work.cores:
        seconds = _short_s(work, rounds)
        if NEAR * seconds >= below:
            return seconds
    return sum(step_parts(work)[0].values())


def _short_s(work: Workload, rounds: int) -> float:
    each = work.batch_size // work.microbatches
    short = replace(work, microbatches=2 * work.pp, batch_size=2 * work.pp * each)
    parts, (ranges, table, _) = step_parts(short)[0], pipeline_of(short)
    further = (rounds - 2) * work.pp * max(busy_s(work))
    reduce = reduction_s(work, ranges, table, parts["pipeline"] + further)
    return sum(parts.values()) - parts["reduce"] + further + reduce


def floor_s(work: Workload) -> float:
    """Lower bound of a step, from its stages: a rank waits for the first forward, does all its work, and what it sent
    back has to reach the first stage."""
    if work.copies > 1:
        return max(busy_s(work)) * work.microbatches
    times, before, floor = stage_times(work, stage_layers(work)), 0.0, 0.0
    for rank, busy in enumerate(busy_s(work, times)):
        floor = max(floor, busy * work.microbatches + before)
        before += times[rank].forward + (0.0 if work.schedule in SPLIT else times[rank].backward)
    return floor


def busy_s(work: Workload, times: list[StageTime] | None = None) -> list[float]:
    """Per rank, seconds at work for each microbatch of the step, once a schedule is under way: pairs overlap where they
    can. DualPipe runs half of the microbatches on either copy of a stage."""
    times = times or stage_times(work, stage_layers(work))
    overlaps = work.pp > 1 and work.schedule in ("dualpipe", "dualpipev")
    split = work.pp > 1 and work.schedule in SPLIT and not overlaps
    each = [time.forward + time.backward + time.weight + (time.again if split else 0.0) for time in times]
    if overlaps:
        each = [min(alone, time.overlapped or alone) for alone, time in zip(each, times, strict=True)]
    return [sum(each[stage] for stage in stages_on(work, rank)) / work.copies for rank in range(work.pp)]
