"""The learning rate from step to step, at the edges too."""

import dataclasses

import pytest

from orchestrator.config import LRSchedule, OptimConfig
from orchestrator.train.optim import learning_rate

OPTIM = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=4, decay_fraction=0.5)


def rates(steps: int, **changes) -> list[float]:
    optim = dataclasses.replace(OPTIM, **changes)
    return [learning_rate(step, optim, steps) for step in range(1, steps + 1)]


def test_wsd_warms_up_holds_and_ends_at_the_floor():
    assert rates(10) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.82, 0.64, 0.46, 0.28, 0.1])


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_floor():
    assert rates(8, schedule=LRSchedule.cosine) == pytest.approx(
        [0.25, 0.5, 0.75, 1, 0.8681981, 0.55, 0.2318019, 0.1])


@pytest.mark.parametrize("schedule", list(LRSchedule))
def test_edges_of_the_schedules(schedule):
    assert rates(1, schedule=schedule, warmup_steps=0) == pytest.approx([0.1])
    assert rates(3, schedule=schedule, warmup_steps=5) == pytest.approx([0.2, 0.4, 0.6]), "the end of a short run"
    assert rates(4, schedule=schedule, warmup_steps=4)[-1] == 1


def test_a_run_without_decay_holds_the_peak_to_its_last_step():
    assert rates(6, warmup_steps=1, decay_fraction=0.0) == [1.0] * 6
