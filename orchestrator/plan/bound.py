"""A step's time without the whole clock: a lower bound from its stages, and a long step from a short one."""

from dataclasses import replace

from orchestrator.plan.estimate import estimate, stage_times
from orchestrator.plan.memory import stages_on
from orchestrator.plan.simulate import StageTime
from orchestrator.plan.workload import SPLIT, Workload, stage_layers


def clock_s(work: Workload) -> float:
    """Seconds of a step. Of many microbatches, two rounds by the clock; then the busiest rank sets the pace."""
    rounds = work.microbatches // work.pp
    if work.pp == 1 or rounds <= 3 or work.microbatches % work.pp or work.cores:
        return estimate(work).step_time_s
    each = work.batch_size // work.microbatches
    short = estimate(replace(work, microbatches=2 * work.pp, batch_size=2 * work.pp * each))
    return short.step_time_s + (rounds - 2) * work.pp * max(busy_s(work))


def floor_s(work: Workload) -> float:
    """Lower bound of a step, from its stages: a rank waits for the first forward, does all its work, and what it sent
    back has to reach the first stage."""
    if work.schedule == "dualpipe" and work.pp > 1:
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
    overlaps, copies = work.pp > 1 and work.schedule in ("dualpipe", "dualpipev"), 1
    if work.schedule == "dualpipe" and work.pp > 1:
        copies = 2
    each = [time.forward + time.backward + time.weight for time in times]
    if overlaps:
        each = [min(alone, time.overlapped or alone) for alone, time in zip(each, times, strict=True)]
    return [sum(each[stage] for stage in stages_on(work, rank)) / copies for rank in range(work.pp)]
