"""A run's own forecast: the planner's figures for its layout, shared cores, and what a measured run changes."""

from dataclasses import replace

import pytest

from orchestrator.compose import compose_config
from orchestrator.plan.estimate import estimate
from orchestrator.plan.forecast import Machine, calibrate, forecast, workload_of
from orchestrator.plan.keeping import own
from orchestrator.plan.memory import memory_gib

CPU = Machine("cpu", 4e10, ranks_per_node=4, cores=2)
TINY = ["experiment=tiny", "hardware=cpu"]


def test_on_a_gpu_it_is_the_planners_estimate_of_that_layout():
    config = compose_config(["model=deepseek_v2_lite", "hardware=h100", "layout.pp=2", "layout.dp=8", "layout.ep=8",
                             "layout.microbatches=4", "train.batch_size=64", "train.seq_len=2048"])
    machine = Machine("cuda", config.hardware.bf16_tflops * 1e12, ranks_per_node=8)
    work = workload_of(config, machine)
    found, planned = forecast(config, machine), estimate(work)
    assert found["step_time_s"] == pytest.approx(planned.step_time_s) and found["how"] == "formula"
    assert found["memory_peak_gib"] == memory_gib(replace(work, keeping=own("bf16")))["total"]
    hours = found["step_time_s"] * config.train.steps * 16 / 3600
    assert found["steps_usd"] == pytest.approx(hours * config.hardware.usd_per_h)


def test_a_forecast_knows_the_precision_how_tokens_go_and_whether_pairs_overlap():
    words = ["model=deepseek_v3", "hardware=h800", "layout.pp=16", "layout.dp=64", "layout.ep=64",
             "layout.schedule=dualpipev", "layout.microbatches=64", "train.batch_size=4096", "train.seq_len=4096",
             "precision=fp8", "train.validate_sequences=4096"]
    machine = Machine("cuda", 1e15, ranks_per_node=8)
    by_node, copies, in_turn, wide = (forecast(compose_config(words + more), machine)["step_time_s"] for more in (
        ["layout.ep_per_node=8"], [], ["layout.overlap=false"], ["precision=bf16"]))
    assert 1.1 * by_node < copies < in_turn and 1.2 * copies < wide
    emulating = forecast(compose_config(words), replace(machine, emulates_fp8=True))["step_time_s"]
    assert emulating == wide, "no tensor cores for it"


def test_ranks_that_share_cores_take_as_long_as_their_work_on_those_cores():
    config = compose_config(TINY + ["layout=ep4"])
    alone, crowded = (forecast(config, replace(CPU, peak_flops_per_s=peak, cores=cores))
                      for peak, cores in ((8e10, 4), (4e10, 2)))
    assert crowded["forward_backward_s"] >= 1.9 * alone["forward_backward_s"]
    piped = compose_config(TINY + ["layout=pp2_ep2"])
    full = forecast(piped, replace(CPU, peak_flops_per_s=8e10, cores=4))
    shared = forecast(piped, CPU)
    assert full["bubble"] > 0.1 and shared["forward_backward_s"] < 2 * full["forward_backward_s"], "idle ranks lend"


def test_a_calibrated_forecast_of_the_same_run_is_what_that_run_measured():
    config, measured = compose_config(TINY), {"forward_backward_s": 1.25, "optimizer_s": 0.03}
    learnt = calibrate(config, CPU, measured, "runs/before")
    again = forecast(config, replace(CPU, peak_flops_per_s=5e10), learnt)
    assert again["forward_backward_s"] == pytest.approx(1.25) and again["optimizer_s"] == pytest.approx(0.03)
    assert again["how"] == "calibrated on runs/before"
    other = compose_config(TINY + ["train.batch_size=32"])
    ratio = forecast(other, CPU)["forward_backward_s"] / forecast(config, CPU)["forward_backward_s"]
    assert forecast(other, CPU, learnt)["forward_backward_s"] == pytest.approx(1.25 * ratio)


def test_a_forecast_has_the_routing_of_the_run_that_calibrates_it_where_ranks_wait_for_the_fullest():
    """Two ranks on two cores wait; of four on two cores those that wait leave their core to the others."""
    counts, measured = ((3.0,) * 4 + (1.0,) * 4,), {"forward_backward_s": 1.0, "optimizer_s": 0.03}
    configs = {ep: compose_config(TINY + ["layout=single", f"layout.dp={ep}", f"layout.ep={ep}"]) for ep in (1, 2, 4)}
    even, uneven = (calibrate(configs[1], replace(CPU, ranks_per_node=1), measured, "runs/before", each)
                    for each in ((), counts))
    two, four, one = (workload_of(configs[ep], CPU, uneven) for ep in (2, 4, 1))
    assert two.imbalance == four.imbalance == 1.5 and one.imbalance == workload_of(configs[2], CPU, even).imbalance == 1
    assert two.felt_imbalance == 1.5 and four.felt_imbalance == 1
    longer = [forecast(configs[2], CPU, each)["forward_backward_s"] for each in (even, uneven)]
    assert 1.1 * longer[0] < longer[1] < 1.5 * longer[0]
    other = compose_config(TINY + ["layout=single", "layout.dp=2", "layout.ep=2", "model.n_routed_experts=16"])
    assert workload_of(other, CPU, uneven).imbalance == 1, "experts of another model"


def test_what_an_operator_takes_on_this_machine_is_in_its_forecast():
    config = compose_config(TINY + ["layout=single", "layout.microbatches=4"])
    alone = replace(CPU, ranks_per_node=1)
    quick, slow, shared = (forecast(config, replace(alone, operator_s=operator, barrier_s=barrier))["step_time_s"]
                           for operator, barrier in ((5e-6, 0.0), (25e-6, 0.0), (5e-6, 20e-6)))
    assert quick < 0.9 * slow and slow == pytest.approx(shared) and forecast(config, alone)["step_time_s"] != quick


def test_hardware_without_a_figure_is_named():
    config = compose_config(["model=tiny", "hardware=h100", "hardware.memory_gb_per_s=null"])
    with pytest.raises(ValueError, match="hardware.memory_gb_per_s"):
        forecast(config, Machine("cuda", 1e14))
