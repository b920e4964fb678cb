"""Operators by shape, uneven routing, and what a prediction says of itself."""

import math
from dataclasses import replace

import pytest

from orchestrator.compose import compose_config
from orchestrator.config import Recompute
from orchestrator.errors import BadRequest
from orchestrator.plan.block import LayerTime, expert_rows, head_time, layer_time
from orchestrator.plan.confidence import band, made
from orchestrator.plan.estimate import estimate, step_parts
from orchestrator.plan.exchange import Routing, dispatch_bytes, imbalance_of
from orchestrator.plan.forecast import OWN
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.kernels import fill, product_s, rates_of
from orchestrator.plan.memory import stages_on
from orchestrator.plan.stack import Stack, stack_named, stacks
from orchestrator.plan.workload import Assumptions, Calibration, Workload, stage_layers

H100 = catalogue()["h100"]
RATES = rates_of(H100, "bf16", Assumptions())


@pytest.fixture(scope="module")
def moe() -> Workload:
    return Workload(compose_config(["model=qwen3_30b_a3b"]).model, H100, 4096, 64, 1, 8, 8, "1f1b", 8)


def test_a_product_that_needs_one_tile_more_than_the_device_has_takes_nearly_twice_as_long():
    full = product_s(RATES, 256 * 12, 128 * 11, 4096)
    assert fill(132, 256 * 12, 128 * 11) == 1.0
    assert product_s(RATES, 256 * 12, 128 * 11 + 128, 4096) > 1.5 * full


def test_few_rows_are_bound_by_the_bytes_of_the_weight():
    assert product_s(RATES, 1, 8192, 8192) == pytest.approx(2 * 8192 * 8192 / RATES.bytes_per_s, rel=0.01)


def test_large_products_reach_the_devices_share_and_small_experts_do_not():
    def rate(rows, columns, inner, groups=1):
        return 2 * rows * columns * inner * groups / product_s(RATES, rows, columns, inner, groups=groups) / RATES.bf16

    assert 0.9 < rate(8448, 8192, 16384) <= 1.0
    assert rate(64, 1536, 2048, 16) < 0.5 < rate(2048, 1536, 2048, 16)


def test_imbalance_comes_from_a_runs_own_counts_and_makes_the_fullest_rank_slower(moe):
    assert imbalance_of([10, 10, 10, 10], 2) == 1.0 == imbalance_of("balanced", 8)
    assert imbalance_of([30, 10, 10, 10], 2) == pytest.approx(40 / 30)
    with pytest.raises(ValueError, match="do not go into 3 ranks"):
        imbalance_of([1, 2, 3, 4], 3)
    counted = Routing("runs/a", ((30, 10, 10, 10), (10, 10, 10, 10)))
    assert counted.imbalance(2) == pytest.approx((40 / 30 + 1) / 2), "mean over layers: ranks wait in every one"
    assert counted.imbalance(1) == 1.0 == Routing("unbalanced").imbalance(1)
    uneven = replace(moe, imbalance=1.5)
    assert expert_rows(uneven) == 1.5 * expert_rows(moe)
    assert layer_time(uneven, True).sent_bytes == 0 and layer_time(uneven, True).up_bytes > 0
    assert estimate(uneven).step_time_s > 1.03 * estimate(moe).step_time_s


def test_the_host_holds_up_small_layers_unless_a_graph_launches_them(moe):
    stack = replace(stack_named("megatron_bridge_2511"), overhead=1.0)
    small = replace(moe, seq_len=64, hardware=catalogue()["b200"], stack=stack)
    graph = replace(small, stack=replace(small.stack, graphs=1.0))
    assert layer_time(graph, True).forward < 0.7 * layer_time(small, True).forward
    hopper = replace(small, hardware=H100)  # whose recipes have none
    assert layer_time(hopper, True) == layer_time(replace(hopper, stack=replace(small.stack, graphs=1.0)), True)
    large = replace(small, seq_len=4096, batch_size=512)
    assert layer_time(replace(large, stack=graph.stack), True) == layer_time(large, True)
    slow, graphed = (replace(large, stack=replace(each, overhead=2.0)) for each in (stack, graph.stack))
    assert layer_time(graphed, True) == layer_time(large, True) != layer_time(slow, True), "what is above 1 waits"


def test_experts_launched_one_by_one_cost_the_host_by_their_number_and_more_where_quantised(moe):
    small = replace(moe, seq_len=64, stack=Stack(expert_launches=2))
    spread = replace(small, ep=1)  # 128 experts on the rank, not 16
    host = small.assumptions.host_s
    one = layer_time(replace(small, stack=Stack()), True).forward
    assert layer_time(spread, True).forward - one == pytest.approx(2 * 128 * host)
    assert layer_time(replace(spread, dtype="fp8"), True).forward - one == pytest.approx(8 * 128 * host)


def test_copies_for_every_expert_send_more_than_one_for_every_node_or_rank(moe):
    wide = replace(moe, dp=32, ep=32, batch_size=512)  # four nodes
    sent, up = dispatch_bytes(wide)
    copied = dispatch_bytes(replace(wide, stack=Stack(copies=True)))
    payload = wide.microbatch_tokens * wide.model.dim * 4
    assert copied == pytest.approx((payload * 8 * 3 / 4, payload * 8 * 7 / 32))
    assert copied[0] > 2 * sent and copied[1] < up, "the node forwards what it received once"
    low = replace(wide, dtype="fp8")
    assert dispatch_bytes(low)[0] == pytest.approx(sent * 3 / 4)
    assert dispatch_bytes(replace(low, stack=Stack(low_dispatch=False))) == (sent, up)


def test_weight_gradients_summed_in_fp32_move_more_bytes(moe):
    few = replace(moe, seq_len=128)
    assert layer_time(few, True).weight > layer_time(replace(few, stack=Stack(gradient_bytes=2)), True).weight


def test_sliding_windows_and_a_stacks_own_recompute_change_a_block(moe):
    assert layer_time(replace(moe, attended=0.5), True).forward < layer_time(moe, True).forward
    again = replace(moe, recompute=Recompute.selective)
    half, core = replace(again, stack=Stack(recomputed=0.5)), layer_time(again, True)
    assert layer_time(half, True).backward > core.backward > layer_time(moe, True).backward


def test_fp4_and_fp8_products_have_the_best_that_was_measured_or_follow_bf16s():
    b200 = catalogue()["b200"]
    assert rates_of(b200, "fp4", Assumptions()).low == pytest.approx(4519e12 * b200.gemm_share)
    assert rates_of(H100, "fp4", Assumptions()).low == pytest.approx(1403e12 * 1.7 * H100.gemm_share)
    amd = catalogue()["mi325x"]
    assert rates_of(amd, "fp8", Assumptions()).low == pytest.approx(
        0.85 * 2 * amd.bf16_best_tflops * 1e12 * 0.71 / 0.8)


def test_fp8s_best_is_found_within_a_ninth_where_it_was_measured():
    measured = [device for device in catalogue().values() if device.fp8_best_tflops]
    assert len(measured) == 7  # one of them is named twice: H800 is H100's chip
    for device in measured:
        guessed = rates_of(replace(device, fp8_best_tflops=None), "fp8", Assumptions()).low
        assert 0.89 < guessed / rates_of(device, "fp8", Assumptions()).low < 1.005, device.name


@pytest.mark.parametrize("name", ["mi300x", "b200", "h20"])
def test_no_product_is_slower_for_a_higher_figure_of_the_device(name):
    device = catalogue()[name]
    for key in ("bf16_tflops", "fp8_tflops", "bf16_best_tflops", "fp8_best_tflops"):
        higher = replace(device, **{key: 1.5 * (getattr(device, key) or device.bf16_tflops)})
        for dtype in ("bf16", "fp8", "fp4"):
            before, after = (rates_of(each, dtype, Assumptions()) for each in (device, higher))
            assert after.low >= before.low and after.bf16 >= before.bf16 and after.attention >= before.attention


@pytest.mark.parametrize("pp, per_rank, layers, first, last", [
    (4, 5, 80, 4, 4),      # whole
    (8, 4, 126, 3, 3),     # Llama 3.1 405B: embedding and head count as a layer each
    (8, 3, 94, 3, 3),      # Qwen3 235B
    (2, 8, 61, 4, 1),      # neither: balanced, as DeepSeek-V3's own recipe `Et*4|(t*4|)*14tmL`
])
def test_layers_of_others_runs_are_split_as_megatron_does(pp, per_rank, layers, first, last):
    model = compose_config(["model=deepseek_v3" if layers == 61 else "model=llama_3_1_405b"]).model
    model = model if layers == 61 else replace(model, n_layers=layers, n_dense_layers=layers)
    work = Workload(model, H100, 4096, 64, pp, 1, 1, "interleaved_1f1b", 64, stages_per_rank=per_rank, even_stages=True)
    found = [len(each) for each in stage_layers(work)]
    assert sum(found) == layers and (found[0], found[-1]) == (first, last)
    assert len(set(found[1:-1])) == 1


def test_selective_recompute_does_again_what_it_does_not_keep():
    """Norms and SwiGLU by bytes; Megatron's is of the attention core. Either is less than a whole forward."""
    model = compose_config(["model=qwen3_235b_a22b"]).model
    none = Workload(model, H100, 32768, 64, 8, 8, 8, "1f1b", 8)
    light, core = (layer_time(replace(none, recompute=Recompute.selective, stack=Stack(recomputes_core=core)), True).
                   backward - layer_time(none, True).backward for core in (False, True))
    moved = none.microbatch_tokens * (8 * model.dim + 6 * model.moe_inter_dim * model.n_activated_experts)
    assert light == pytest.approx(moved / (H100.memory_gb_per_s * 1e9 * none.assumptions.memory), rel=0.01)
    assert 5 * light < core < layer_time(none, True).forward


@pytest.mark.parametrize("schedule, split", [("1f1b", {0: 0, 7: 0}), ("dualpipev", {0: 0, 15: 7, 7: 4, 8: 4}),
                                             ("zbv", {0: 0, 15: 16, 7: 16, 8: 16})])
def test_our_own_selective_recompute_is_done_twice_where_a_backward_is_split(schedule, split, monkeypatch):
    """split: backwards in two parts, of a stage; the first, which has no input gradient, has none. Of blocks alone."""
    monkeypatch.setattr("orchestrator.plan.estimate.head_time", lambda work: LayerTime())
    model = replace(compose_config(["model=deepseek_v3"]).model, n_layers=64, n_dense_layers=0, n_mtp_layers=0)
    none = Workload(model, H100, 4096, 64, 8, 8, 8, schedule, 16, stack=OWN, even_stages=True,
                    assumptions=Assumptions(overlap_cost=math.inf))
    less = replace(none, recompute=Recompute.selective)
    kept, again = layer_time(none, True), layer_time(less, True)
    assert (again.forward, again.weight) == (kept.forward, kept.weight) and kept.again == 0
    assert again.again == pytest.approx(again.backward - kept.backward) and again.again < kept.forward
    with_it, without = (step_parts(work)[1].busy for work in (less, none))
    for rank in (0, 7):
        times = sum(len(stage_layers(less)[stage]) * (16 + split[stage]) for stage in stages_on(less, rank))
        assert with_it[rank] - without[rank] == pytest.approx(times * again.again)


def test_logits_are_made_again_under_recompute():
    model = replace(compose_config(["model=deepseek_v3"]).model, n_mtp_layers=0)
    work = Workload(model, H100, 4096, 64, 8, 8, 8, "1f1b", 16, stack=OWN)
    kept, less = head_time(work), head_time(replace(work, recompute=Recompute.selective))
    assert less.backward - kept.backward == pytest.approx(less.again) and kept.again == 0
    assert 0 < less.again < less.forward


def test_a_prediction_says_how_it_was_made_and_how_far_it_may_be_off(moe):
    known = replace(moe, stack=stack_named("nemo_25"))
    assert [made(known), made(moe), made(replace(moe, hardware=catalogue()["l40s"]))] == [
        "calibrated", "formula", "extrapolated"]
    run = Calibration(run="runs/before", model=moe.model.name)
    assert made(replace(moe, calibration=run)) == "measured"
    assert made(replace(moe, calibration=replace(run, model="another"))) == "calibrated"
    widths = [band(replace(moe, stack=stack, hardware=hardware)) for stack, hardware in (
        (known.stack, H100), (moe.stack, H100), (moe.stack, catalogue()["l40s"]))]
    assert all(low < 1.1 and high > 1 for low, high in widths)
    assert widths == sorted(widths, key=lambda pair: pair[1] - pair[0])


def test_stacks_are_data_and_an_unknown_one_is_refused():
    assert stacks()["megatron_deepspeed"].attention == "unfused"
    with pytest.raises(BadRequest, match="stack=torch: no such software stack"):
        stack_named("torch")
