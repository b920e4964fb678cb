"""A loss is a spike by median and MAD, which neither an outlier nor a non-finite value can poison."""

import math
import random

import pytest
import torch

from orchestrator.train.spikes import NORMAL, is_spike, remember


def noise(num, seed=0):
    chance = random.Random(seed)
    return [2.0 + chance.gauss(0, 0.05) for _ in range(num)]


def test_noise_is_no_spike_a_jump_is_and_a_fall_is_not():
    recent = noise(64)
    assert not any(is_spike(loss, recent, sigmas=6, window=64) for loss in noise(200, seed=1))
    assert is_spike(2.6, recent, sigmas=6, window=64)
    assert not is_spike(0.1, recent, sigmas=6, window=64)


def test_nothing_is_judged_before_the_window_is_full_or_when_off():
    assert not is_spike(99.0, noise(63), sigmas=6, window=64)
    assert not is_spike(99.0, noise(64), sigmas=0, window=64)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_a_non_finite_loss_never_enters_the_window(bad):
    recent = noise(8)
    assert remember(bad, recent, window=8) == recent and not is_spike(bad, recent, sigmas=6, window=8)
    assert remember(1.0, recent, window=8) == [*recent[1:], 1.0]


def test_one_spike_in_the_window_does_not_hide_the_next():
    recent = remember(1e9, noise(64), window=64)
    assert is_spike(2.7, recent, sigmas=6, window=64)


def test_a_flat_window_does_not_make_ripples_spikes():
    assert not is_spike(2.0 + 1e-6, [2.0] * 8, sigmas=6, window=8)
    assert is_spike(2.1, [2.0] * 8, sigmas=6, window=8)


def test_the_scale_is_a_normal_distributions():
    quartile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.75, dtype=torch.float64))
    assert NORMAL == pytest.approx(1 / quartile.item(), abs=1e-4)
