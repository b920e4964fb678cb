import dataclasses
import json
import math

import pytest

from model import count
from model.config import ModelConfig
from orchestrator.errors import BadRequest
from orchestrator.plan.cost import (
    BUCKETS,
    Ledger,
    dense_equivalents,
    mfu,
    model_flops,
    usd_per_million_tokens,
    would_pass,
)

MOE = ModelConfig(n_mtp_layers=1)
V3 = ModelConfig(vocab_size=129280, dim=7168, n_layers=61, n_dense_layers=3, inter_dim=18432, n_heads=128,
                 q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                 n_routed_experts=256, n_shared_experts=1, n_activated_experts=8, moe_inter_dim=2048)


def test_every_device_second_from_placement_to_release_is_charged():
    ledger = Ledger(devices=4, usd_per_h=2.0, since=1000.0)
    ledger.charge("goodput", 10.0)
    assert ledger.charged_s(1900.0) == 3600.0
    assert ledger.device_hours(1900.0) == 1.0
    assert ledger.usd(1900.0) == 2.0


def test_deepseek_v3s_published_bill_comes_out():
    """V3 report, table 1: 2.788M H800 hours at $2 are $5.576M."""
    ledger = Ledger(devices=2048, usd_per_h=2.0, since=0.0)
    assert ledger.usd(2.788e6 / 2048 * 3600) == pytest.approx(5.576e6)


def test_closed_buckets_sum_to_the_charged_total_to_the_last_bit():
    ledger = Ledger(devices=3, usd_per_h=1.7, since=1e9 + 0.1)
    for i in range(1000):
        ledger.charge(BUCKETS[i % len(BUCKETS)], 0.1 / (i + 1))
    released = 1e9 + 1234.567
    by_clock, usd = ledger.charged_s(released), ledger.usd(released)
    ledger.close(released)
    assert math.fsum(ledger.buckets_s.values()) == ledger.charged_s(released) == ledger.charged_s(released + 99)
    assert ledger.charged_s(released) == pytest.approx(by_clock, rel=1e-15)
    assert ledger.usd(released + 99) == pytest.approx(usd, rel=1e-15)
    assert ledger.buckets_s["idle"] > 0.9 * by_clock


def test_spares_are_charged_by_the_same_clock_into_a_bucket_of_their_own():
    ledger = Ledger(devices=4, usd_per_h=2.0, since=0.0, spares=1)
    ledger.charge("goodput", 900.0)
    assert (ledger.buckets_s["goodput"], ledger.buckets_s["spares"]) == (3600.0, 900.0)
    assert ledger.usd(3600.0) == 10.0 and would_pass(ledger, 3600.0, 360.0, 10.9)
    ledger.resize(3600.0, 2, spares=3)
    again = Ledger.from_dict(ledger.to_dict(7200.0), devices=5, usd_per_h=2.0, since=9000.0)
    ledger.close(7200.0)
    assert ledger.charged_s(9999.0) == math.fsum(ledger.buckets_s.values()) == 2 * 5 * 3600.0
    assert again.charged_s(9001.0) == 2 * 5 * 3600.0 + 5


def test_time_that_no_bucket_has_shows_in_the_live_figures_and_ends_in_idle():
    ledger = Ledger(devices=2, usd_per_h=None, since=0.0)
    ledger.charge("startup", 5.0)
    assert ledger.charged_s(10.0) == 20.0
    ledger.close(10.0)
    assert ledger.buckets_s["idle"] == 10.0


def test_seconds_are_charged_even_when_the_clock_was_set_back():
    ledger = Ledger(devices=2, usd_per_h=1.0, since=100.0)
    ledger.charge("goodput", 50.0)
    assert ledger.charged_s(90.0) == 100.0
    ledger.close(90.0)
    assert ledger.buckets_s["idle"] == 0.0 and ledger.charged_s(90.0) == 100.0


def test_an_unknown_price_is_unknown_and_never_zero():
    ledger = Ledger(devices=2, usd_per_h=None, since=0.0)
    assert ledger.usd(0.0) is None and ledger.usd(3600.0) is None
    resumed = Ledger.from_dict(ledger.to_dict(3600.0), devices=2, usd_per_h=5.0, since=4000.0)
    assert resumed.usd(4000.0) is None, "one unknown part makes the sum unknown"


def test_a_run_that_changes_its_devices_pays_for_each_while_it_has_them():
    ledger = Ledger(devices=4, usd_per_h=3.0, since=0.0)
    ledger.resize(3600.0, 2)
    ledger.charge("goodput", 1800.0)
    ledger.resize(7200.0, 8, usd_per_h=1.0)
    assert ledger.charged_s(10800.0) == (4 + 2 + 8) * 3600.0
    assert ledger.usd(10800.0) == 4 * 3.0 + 2 * 3.0 + 8 * 1.0
    ledger.close(10800.0)
    assert ledger.buckets_s["goodput"] == 3600.0


def test_money_never_falls_from_one_attempt_to_the_next():
    first = Ledger(devices=2, usd_per_h=1.0, since=0.0)
    first.charge("goodput", 100.0)
    saved = json.loads(json.dumps(first.to_dict(100.0)))
    shown_s = first.charged_s(160.0)
    second = Ledger.from_dict(saved, devices=4, usd_per_h=1.0, since=500.0)
    second.catch_up(shown_s, "lost_work")
    assert second.charged_s(500.0) == shown_s and second.usd(500.0) == pytest.approx(first.usd(160.0), rel=1e-15)
    assert second.buckets_s["lost_work"] == 120.0
    second.catch_up(shown_s, "restart")
    assert second.buckets_s["restart"] == 0.0, "what is remembered already is not charged twice"
    second.close(510.0)
    assert second.charged_s(510.0) == 320.0 + 40.0


def test_the_same_attempt_goes_on_from_where_its_ledger_was_written():
    ledger = Ledger(devices=2, usd_per_h=1.0, since=0.0)
    state = ledger.to_dict(100.0)
    same = Ledger.from_dict(state, devices=2, usd_per_h=1.0, since=state["at"])
    assert same.charged_s(150.0) == ledger.charged_s(150.0)


def test_a_budget_is_kept_before_the_step_that_would_pass_it():
    ledger = Ledger(devices=2, usd_per_h=1800.0, since=0.0)
    assert not would_pass(ledger, 5.0, 1.0, None)
    assert not would_pass(ledger, 5.0, 1.0, 6.0), "ending at the budget is allowed"
    assert would_pass(ledger, 5.0, 1.01, 6.0)


def test_a_budget_without_a_price_is_refused():
    with pytest.raises(BadRequest, match=r"budget.max_usd=5.*hardware.usd_per_h"):
        would_pass(Ledger(devices=1, usd_per_h=None, since=0.0), 1.0, 1.0, 5)


def test_mfu_is_flops_over_the_peak_of_all_devices_and_unknown_without_a_peak():
    assert mfu(4e14, devices=2, peak_flops_per_s=1e15) == 0.2
    assert mfu(4e14, devices=2, peak_flops_per_s=None) is None


def test_flops_of_deepseek_v3_are_those_in_print():
    """ISCA paper, table 2: 250 GFLOPs per training token at 4096 tokens."""
    assert model_flops(V3, 1e9, 4096) == pytest.approx(250.46e18, rel=1e-3)


@pytest.mark.parametrize("model", [MOE, dataclasses.replace(MOE, n_mtp_layers=0), V3])
def test_dense_equivalents_equal_the_twins_that_compare_trains(model):
    found = dense_equivalents(model, 1000, seq_len=256, mfu=0.5, peak_flops_per_s=1e12, usd_per_h=2.0, devices=4)
    for name, twin in (("equal_total", count.dense_equal_total(model)),
                       ("equal_active", count.dense_equal_active(model))):
        flops = 1000 * count.training_flops(twin, 256, mtp=True)
        assert found[name]["parameters"] == pytest.approx(count.parameters(twin).total, rel=0.02)
        assert found[name]["flops"] == pytest.approx(flops, rel=0.06 if model.n_mtp_layers else 0.02)
        assert found[name]["device_hours"] == pytest.approx(found[name]["flops"] / 0.5e12 / 3600)
        assert found[name]["hours"] == pytest.approx(found[name]["device_hours"] / 4)
        assert found[name]["usd"] == pytest.approx(2.0 * found[name]["device_hours"])


def test_a_dense_model_is_its_own_equivalent():
    dense = count.dense_equal_active(MOE)
    found = dense_equivalents(dense, 10, seq_len=8, mfu=0.5, peak_flops_per_s=1e12, usd_per_h=1.0, devices=1)
    assert found["equal_total"] == found["equal_active"]


def test_dense_equivalents_without_price_or_peak_are_unknown():
    unpriced = dense_equivalents(MOE, 10, seq_len=8, mfu=0.5, peak_flops_per_s=1e12, usd_per_h=None, devices=1)
    assert unpriced["equal_total"]["usd"] is None and unpriced["equal_total"]["device_hours"] > 0
    no_peak = dense_equivalents(MOE, 10, seq_len=8, mfu=None, peak_flops_per_s=None, usd_per_h=1.0, devices=1)
    assert no_peak["equal_total"]["device_hours"] is None


def test_dollars_per_million_tokens():
    assert usd_per_million_tokens(3.0, 1_500_000) == 2.0
    assert usd_per_million_tokens(None, 5) is None and usd_per_million_tokens(1.0, 0) is None
