"""Equal loss from measured curves, against power laws whose answer is known."""

import math

import pytest

from orchestrator.plan.multiplier import cost_to_reach, multiplier, spread


def law(scale: float, costs=(1e3, 3e3, 1e4, 3e4, 1e5)) -> list[tuple[float, float]]:
    """Loss falls by 0.5 per factor of e in cost: linear in log(cost), so interpolation is exact."""
    return [(cost, 20 - 0.5 * math.log(cost * scale)) for cost in costs]


@pytest.mark.parametrize("scale", [1.7, 1.0, 0.4])
def test_the_multiplier_of_two_shifted_laws_is_their_shift(scale):
    ratio, loss = multiplier(law(scale), law(1.0))
    assert ratio == pytest.approx(scale)
    assert loss == max(law(scale)[-1][1], law(1.0)[-1][1])


def test_a_loss_that_was_never_reached_has_no_cost():
    assert cost_to_reach(law(1.0), -100.0) is None
    assert multiplier([], law(1.0)) is None


def test_a_curve_that_rises_in_between_counts_when_it_first_arrives():
    assert cost_to_reach([(1, 3.0), (10, 2.0), (100, 2.5), (1000, 1.0)], 2.0) == pytest.approx(10)
    assert cost_to_reach([(5, 1.0)], 2.0) == 5


def test_the_spread_of_seeds():
    assert spread([3.0, 1.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "seeds": 2}
