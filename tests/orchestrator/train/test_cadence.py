"""Checkpoints are due at the optimum for what saves are seen to cost, or every so many steps."""

import pytest

from orchestrator.config import Config
from orchestrator.plan.interval import optimal_interval
from orchestrator.train.cadence import Cadence


def cadence(every="auto", **known):
    config = Config()
    config.checkpoint.every, config.cluster.mtbf_hours_per_device = every, 100.0
    return Cadence(config, devices=100, **({"faults": 0, "wall_s": 0.0, "now": 0.0} | known))


def test_auto_is_the_default_and_waits_for_the_optimal_interval():
    assert Config().checkpoint.every == "auto"
    found = cadence()
    found.step(2.0, saving=False)
    assert found.interval_s() == optimal_interval(2.0, 3600), "before the first save, a step stands for its cost"
    assert not found.due(5, now=118) and found.due(5, now=120)


def test_a_save_costs_its_stall_and_what_the_steps_beside_it_took_longer():
    found = cadence()
    for _ in range(30):
        found.step(2.0, saving=False)
    found.saved(0.5, now=10)
    for seconds in (2.5, 1.5, 3.0):
        found.step(seconds, saving=True)
    assert found.save_cost_s() == pytest.approx(0.5 + 0.5 + 0.0 + 1.0)
    assert not found.due(1, now=10 + 114) and found.due(1, now=10 + 120)


def test_faults_shorten_the_interval():
    assert cadence(faults=5, wall_s=500.0).interval_s() < cadence().interval_s() / 4


def test_a_number_is_steps_and_zero_is_only_at_the_end():
    assert [step for step in range(1, 10) if cadence(3).due(step, now=0)] == [3, 6, 9]
    assert not any(cadence(0).due(step, now=1e9) for step in range(1, 10))


def test_the_summary_sets_the_run_beside_its_optimum():
    found = cadence()
    for step in range(20):
        found.step(3.0, saving=False)
        if step in (9, 19):
            found.saved(1.0, now=3.0 * step)
    told = found.summary(restart_s=60.0)
    assert told["mean_interval_s"] == 30 and told["saves"] == 2 and told["save_cost_s"] == 1.0
    assert told["optimal_interval_s"] == optimal_interval(1.0, 3600)
    assert 0 < told["predicted_loss"]["checkpoint"] < 0.02 and told["predicted_loss"]["restart"] > 0.015
