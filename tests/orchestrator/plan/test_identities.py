"""Published figures of DeepSeek that follow from one another: exact, or to the digits in print."""

import pytest

from model import count
from orchestrator.compose import compose_config
from orchestrator.plan.cost import mfu_conventions
from orchestrator.plan.exchange import imbalance_of
from orchestrator.plan.hardware import catalogue

TOKENS, STEP_S, DEVICES = 15360 * 4096, 19.926, 2048
EPLB_WEIGHT = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
               [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]


@pytest.fixture(scope="module")
def v3():
    return compose_config(["model=deepseek_v3"]).model


def test_a_day_of_v3s_steps_is_the_published_number_of_tokens():
    """ISCA paper, table 4: 272.80 B a day; V3 report: 180K GPU-hours per trillion, 3.7 days."""
    assert TOKENS / STEP_S * 86400 == pytest.approx(272.80e9, rel=1e-4)
    assert DEVICES * STEP_S / 3600 / TOKENS * 1e12 == pytest.approx(180.18e3, rel=1e-3)


def test_v3s_published_rate_and_flops_per_token_agree(v3):
    """385 TFLOPS causal and 432 whole are 249.7 and 280.2 GFLOPs a token (table 2: 250); their gap is causal half."""
    per_token = {which: rate * 1e12 * DEVICES * STEP_S / TOKENS for which, rate in (("causal", 385), ("whole", 432))}
    assert per_token["causal"] == pytest.approx(249.7e9, rel=1e-3)
    for which, flops in per_token.items():
        assert count.training_flops(v3, 4096, causal=which == "causal") == pytest.approx(flops, rel=4e-3)


def test_one_run_has_four_mfus_and_each_says_which(v3):
    """43.7% and 38.9% (ISCA paper, table 4), 19.5% over the FP8 peak; Epoch's 22%: 6 N over a PCIe card's FP8 peak."""
    found = mfu_conventions(v3, TOKENS / STEP_S / DEVICES, 4096, catalogue()["h800"])
    assert found["bf16 peak, whole attention"] == pytest.approx(0.4373, abs=0.003)
    assert found["bf16 peak, causal attention"] == pytest.approx(0.3894, abs=0.003)
    assert found["fp8 peak, causal attention"] == pytest.approx(0.195, abs=0.002)
    assert 6 * 37e9 * 14.8e12 / (2.664e6 * 3600 * 1513e12) == pytest.approx(0.22, abs=0.01)


@pytest.mark.parametrize("which, physical, expected", [
    (0, [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], 1.208),
    (1, [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1], 1.242),
    (0, [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1], 1.073),
    (1, [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7], 1.190)])
def test_eplbs_example_is_as_uneven_as_its_placement(which, physical, expected):
    """EPLB's README: 12 experts, 16 replicas, 8 GPUs; the first two node-limited, the last two not."""
    weight = EPLB_WEIGHT[which]
    loads = [weight[expert] / physical.count(expert) for expert in physical]
    assert imbalance_of(loads, 8) == pytest.approx(expected, abs=1e-3)
