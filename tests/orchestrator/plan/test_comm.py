"""Tensor, context and data parallelism in the planner's clock: what they cost and what they save. All predicted."""

from dataclasses import replace

import pytest

from model import count
from orchestrator.compose import compose_config
from orchestrator.config import Recompute
from orchestrator.plan.block import layer_time
from orchestrator.plan.comm import context_s, reduce_s, tensor_s
from orchestrator.plan.estimate import estimate
from orchestrator.plan.exchange import scale_up_bytes_per_s
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.memory import memory_gib
from orchestrator.plan.workload import Workload, pipeline_of, rank_parameters


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(compose_config(["model=deepseek_v3"]).model, catalogue()["h800"], 4096, 15360, 16, 128, 64, "1f1b",
                    120)


def test_tensor_ranks_move_the_bytes_of_two_all_reduces(work):
    alone = replace(work.assumptions, latency_s=0.0, hop_s=0.0, few_ranks=0.0)
    two = replace(work, tp=2, assumptions=alone)
    all_reduces = 2 * 2 * (1 / 2) * two.microbatch_tokens * 7168 * 2
    assert tensor_s(two, False) == tensor_s(two, True) == pytest.approx(all_reduces / (200e9 * 0.8))
    slower = replace(two, assumptions=replace(alone, few_ranks=1.06))
    assert tensor_s(slower, False) == pytest.approx(tensor_s(two, False) / 0.735), "as measured of two against eight"
    assert tensor_s(work, False) == 0.0 < tensor_s(replace(work, tp=8), False) < tensor_s(replace(work, tp=16), False)


def test_tokens_leave_for_their_experts_from_the_ranks_that_share_them(work):
    routed = replace(work, tp=2, model=replace(work.model, n_shared_experts=0))
    assert tensor_s(routed, True) == pytest.approx(tensor_s(routed, False) / 2), "attention gathers and scatters alone"
    assert tensor_s(replace(routed, etp=2), True) == tensor_s(routed, False)


def test_tensor_ranks_share_a_layers_products_and_its_dense_parameters(work):
    two = replace(work, tp=2)
    assert two.devices == 2 * work.devices and two.microbatch_tokens == work.microbatch_tokens
    assert layer_time(two, False).weight == pytest.approx(layer_time(work, False).weight / 2, rel=0.05)
    ranges, table, _ = pipeline_of(work)
    dense, experts = rank_parameters(work, ranges, table[3])
    on_each = len(ranges[3]) * (count.latent_parameters(work.model) + 2 * 7168 + 256 * 7169)  # norms, router
    assert rank_parameters(two, ranges, table[3]) == pytest.approx(((dense - on_each) / 2 + on_each, experts))


def test_a_ring_of_keys_is_hidden_behind_an_attention_core_that_is_long_enough(work):
    two = replace(work, cp=2)
    assert two.microbatch_tokens == work.microbatch_tokens // 2
    assert context_s(two, 1.0) == 0.0 < context_s(two, 0.0)


def test_zero_stage_3_hides_its_gathers_as_far_as_computation_goes(work):
    ranges, table, _ = pipeline_of(work)
    work = replace(work, assumptions=replace(work.assumptions, latency_s=0.0, hop_s=0.0))
    once = reduce_s(work, ranges, table, 0.0)
    three = replace(work, zero=3)
    shown = reduce_s(three, ranges, table, 0.0)
    assert shown == pytest.approx(work.microbatches * once * 8 / 6), "weights are gathered twice"
    assert reduce_s(three, ranges, table, 1e9) == pytest.approx(0.1 * shown)


def test_selective_recompute_lies_between_none_and_full(work):
    none, selective, full = (estimate(replace(work, recompute=how)).step_time_s
                             for how in (Recompute.none, Recompute.selective, Recompute.full))
    assert none < selective < full


def test_a_ring_of_many_replicas_takes_longer_than_its_bytes(work):
    """A collective for each block, and for its experts; each goes once around for gradients and once for weights."""
    ranges, table, _ = pipeline_of(work)
    bytes_alone = replace(work, assumptions=replace(work.assumptions, latency_s=0.0, hop_s=0.0))
    blocks, around = max(map(len, ranges)), 10e-6 + 127 * 3e-6
    experts = 10e-6 + 1 * 3e-6
    found = reduce_s(work, ranges, table, 0.0) - reduce_s(bytes_alone, ranges, table, 0.0)
    assert found == pytest.approx(2 * ((blocks + 1) * around + blocks * experts))


def reduced_s(work: Workload) -> float:
    ranges, table, _ = pipeline_of(work)
    return reduce_s(work, ranges, table, 0.0)


def test_experts_that_every_rank_holds_reduce_as_dense_parameters_do(work):
    """All ranks of a node share its way out; with ep=4 two of its eight do, with ep=8 none."""
    model = compose_config(["model=mixtral_8x7b"]).model
    alone = replace(work.assumptions, latency_s=0.0, hop_s=0.0, bucket_s=0.0)
    one = Workload(model, work.hardware, 4096, 64, 1, 64, 1, "1f1b", 1, assumptions=alone)
    dense, experts = rank_parameters(one, *pipeline_of(one)[:1], pipeline_of(one)[1][0])
    rate = min(one.hardware.scale_up_gb_per_s, 8 * one.hardware.scale_out_gb_per_s) * 1e9 * alone.network
    assert reduced_s(one) == pytest.approx(6 * (dense + experts) * 63 / 64 / rate)
    four, eight = replace(one, ep=4), replace(one, ep=8)
    out = one.hardware.scale_out_gb_per_s * 1e9 * alone.network
    for each, sharing, replicas in ((four, 2, 16), (eight, 1, 8)):
        routed = experts / each.ep * (replicas - 1) / replicas / (sharing * out)
        assert reduced_s(each) == pytest.approx(6 * (dense * 63 / 64 / rate + routed))


def test_tensor_ranks_that_hold_the_same_experts_reduce_them(work):
    model = compose_config(["model=mixtral_8x7b"]).model
    one = Workload(model, work.hardware, 4096, 8, 1, 1, 1, "1f1b", 1, tp=8)
    assert (one.replicas, one.expert_replicas) == (1, 8) and reduced_s(one) > 0
    assert reduced_s(replace(one, ep=8)) == 0.0
    whole, cut = (memory_gib(replace(one, ep=ep, zero=3))["buffers"] for ep in (1, 8))
    assert whole > cut, "experts that are gathered"


def test_without_a_switch_a_rank_has_one_link_to_each_other():
    """MI300X: 448 GB/s to seven peers, 64 to one."""
    mi300x = catalogue()["mi300x"]
    assert [scale_up_bytes_per_s(mi300x, ranks) for ranks in (2, 4, 8)] == [64e9, 192e9, 448e9]
    assert scale_up_bytes_per_s(catalogue()["h800"], 2) == 200e9
