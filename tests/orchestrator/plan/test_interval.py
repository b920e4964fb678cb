"""The optimal interval against brute force: a grid search of the exact mean, and failures drawn at random."""

import numpy as np
import pytest

from orchestrator.plan.interval import expected_losses, mean_time_between_failures, optimal_interval


def kept_share(interval_s, save_s, mtbf_s, restart_s=0.0):
    return 1 - sum(expected_losses(interval_s, save_s, mtbf_s, restart_s).values())


def simulated(interval_s, save_s, mtbf_s, restart_s, num, seed=0):
    """Seconds by kind over `num` finished segments; a failure costs what the segment had done, and a restart."""
    chance = np.random.default_rng(seed)
    spent = dict.fromkeys(("kept", "checkpoint", "lost_work", "restart"), 0.0)
    left = chance.exponential(mtbf_s)
    for _ in range(num):
        while left < interval_s + save_s:
            spent["lost_work"] += left
            left = chance.exponential(mtbf_s)
            while left < restart_s:
                spent["restart"] += left
                left = chance.exponential(mtbf_s)
            spent["restart"] += restart_s
            left -= restart_s
        left -= interval_s + save_s
        spent["kept"], spent["checkpoint"] = spent["kept"] + interval_s, spent["checkpoint"] + save_s
    total = sum(spent.values())
    return {kind: seconds / total for kind, seconds in spent.items()}


@pytest.mark.parametrize("save_s, mtbf_s", [(0.5, 3600), (30, 10_800), (120, 3600), (600, 3600)])
def test_no_interval_keeps_more_than_the_optimum(save_s, mtbf_s):
    best = max(kept_share(interval, save_s, mtbf_s) for interval in np.geomspace(save_s, mtbf_s, 4000))
    assert kept_share(optimal_interval(save_s, mtbf_s), save_s, mtbf_s) == pytest.approx(best, abs=1e-4)


def test_the_expected_losses_are_those_of_failures_drawn_at_random():
    seen = simulated(300, 20, 900, 60, num=20_000)
    for kind, share in expected_losses(300, 20, 900, 60).items():
        assert share == pytest.approx(seen[kind], rel=0.03), kind


def test_when_saving_takes_as_long_as_living_the_interval_is_the_mtbf():
    assert optimal_interval(200.0, 100.0) == 100.0


def test_llama_3s_cluster_failed_every_three_hours():
    """419 unexpected interruptions in 54 days on 16,384 GPUs are the default rate."""
    assert mean_time_between_failures(16_384, 50_000) == pytest.approx(54 * 86_400 / 419, rel=0.02)


def test_a_runs_own_rate_counts_from_the_second_fault_on_if_it_is_higher():
    configured = mean_time_between_failures(8, 50_000)
    assert mean_time_between_failures(8, 50_000, faults=1, wall_s=100) == configured
    assert mean_time_between_failures(8, 50_000, faults=2, wall_s=100) == 50
    assert mean_time_between_failures(8, 50_000, faults=2, wall_s=1e12) == configured
