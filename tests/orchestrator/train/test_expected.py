"""A calibration is read from a finished run, or refused by name."""

import json

import pytest
import yaml

from orchestrator.compose import compose_config
from orchestrator.config import to_dict
from orchestrator.errors import BadRequest
from orchestrator.plan.forecast import Machine, forecast, memory_of, workload_of
from orchestrator.plan.questions import resized
from orchestrator.plan_diff import plan_diff
from orchestrator.plan_format import first_runnable
from orchestrator.plan_request import compose_plan, read_request
from orchestrator.show_plan import planned
from orchestrator.train.expected import expected, keep_plan, read_calibration
from orchestrator.train.memory import total_bytes


def test_a_finished_run_teaches_the_next_forecast(tmp_path):
    config, machine = compose_config(["experiment=tiny", "hardware=cpu"]), Machine("cpu", 4e10, 4, 2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    measured = {"forward_backward_s": 2.0, "optimizer_s": 0.1, "machine": vars(machine)}
    (tmp_path / "summary.json").write_text(json.dumps({"measured": measured}))
    learnt = read_calibration(str(tmp_path))
    assert forecast(config, machine, learnt)["step_time_s"] == pytest.approx(2.1)
    assert read_calibration(None).forward_backward == 1.0


@pytest.mark.parametrize("summary", [None, {"measured": {"step_time_s": 1.0}}])
def test_a_run_without_measured_parts_is_refused_by_name(tmp_path, summary):
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(BadRequest, match=f"run.calibrate={tmp_path}: holds no finished run"):
        read_calibration(str(tmp_path))


def test_a_plan_for_this_cpu_starts_from_a_runs_own_measurements(tmp_path):
    config, machine = compose_config(["experiment=tiny", "hardware=cpu"]), Machine("cpu", 4e10, 4, 2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    before = forecast(config, machine)
    measured = {key: 3 * before[key] for key in ("forward_backward_s", "optimizer_s")} | {"machine": vars(machine)}
    (tmp_path / "summary.json").write_text(json.dumps({"measured": measured}))
    layout = ["layout.pp=2", "layout.dp=2", "layout.ep=2", "layout.schedule=1f1b", "layout.microbatches=2"]
    words = ["model=tiny", "hardware=cpu", "train.batch_size=16", "train.seq_len=256", *layout]
    options = {"gpus": "4", "tokens": "1e6", "calibrate": str(tmp_path)}
    _, data = planned(options, words)
    asked = compose_config([*words, "layout.recompute=none"])
    tensors = memory_of(asked, machine, workload_of(asked, machine))
    assert data["best"]["layout"]["recompute"] == "none" and data["best"]["memory_gib"] == pytest.approx(tensors)
    machine_gib = total_bytes() / 2**30
    assert data["dtype"] == "fp32" and data["hardware"]["memory_gib"] == pytest.approx(machine_gib / 4)
    half = planned(options, [*words, "precision=bf16", "cluster.nodes=2", "cluster.ranks_per_node=2"])[1]
    bf16 = compose_config([*words, "layout.recompute=none", "precision=bf16"])
    assert half["dtype"] == "bf16" and half["hardware"]["memory_gib"] == pytest.approx(machine_gib / 2)
    assert half["best"]["memory_gib"] == pytest.approx(memory_of(bf16, machine, workload_of(bf16, machine)))
    with pytest.raises(BadRequest, match="dtype=fp8: is of a GPU's tensor cores"):
        planned(options | {"dtype": "fp8"}, words)
    with pytest.raises(BadRequest, match="precision.fp8=true: a CPU emulates eight bits"):
        planned(options, [*words, "precision=fp8"])
    request = read_request({"calibrate": str(tmp_path), "tokens": "1e6", "gpus": "1"}, *compose_plan(words[:2]))
    for devices in (2, 8):
        asked = read_request({"calibrate": str(tmp_path), "tokens": "1e6", "gpus": str(devices)},
                             *compose_plan(words[:2]))
        assert resized(request, devices).hardware == asked.hardware and asked.hardware.memory_gib == pytest.approx(
            machine_gib / devices)
    ratio = data["best"]["step_time_s"] / (3 * before["step_time_s"])
    assert 0.9 < ratio < 1.5, "but for cores that idle ranks lend, and ZeRO stages that train does not have"
    assert data["routing"] == "balanced"
    counts = {"moe/tokens_per_expert": [[30.0] * 4 + [10.0] * 4] * 4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(counts) + "\n")
    assert planned(options, words)[1]["routing"] == str(tmp_path)
    assert planned(options | {"routing": "balanced"}, words)[1]["routing"] == "balanced"
    with pytest.raises(BadRequest, match="hardware=cpu: a plan needs a GPU's data sheet"):
        planned({"gpus": "4", "tokens": "1e6"}, words)
    with pytest.raises(BadRequest, match=f"calibrate={tmp_path}: was measured on a CPU and says nothing of hardw"):
        planned({"gpus": "4", "tokens": "1e6", "calibrate": str(tmp_path)}, ["model=tiny", "hardware=h100"])
    unnamed = [word for word in words if not word.startswith("hardware=")]
    assert planned(options, unnamed)[1]["hardware"] == planned(options, words)[1]["hardware"]
    own = planned(options, [*unnamed, "hardware.usd_per_h=2"])[1]
    assert own["hardware"]["usd_per_h"] == 2 and own["hardware"]["source"] == "given"
    assert {"hardware=cpu", "hardware.usd_per_h=2"} <= set(first_runnable(own["candidates"])["train"])
    with pytest.raises(BadRequest, match="stack=nemo_25: calibrate=.* is a run of this program"):
        planned(options | {"stack": "nemo_25"}, words)
    gpu = Machine("cuda", 1e15, 4)
    here = compose_config(["experiment=tiny", "hardware=h100", f"run.calibrate={tmp_path}"])
    assert expected(here, gpu)[0]["how"].startswith(
        f"not predicted: run.calibrate={tmp_path}: was measured on a CPU and says nothing of hardware=h100; name")
    with pytest.raises(BadRequest, match="calibrate=/nowhere: holds no finished run"):
        planned({"gpus": "4", "tokens": "1e6", "calibrate": "/nowhere"}, words)


def test_a_plan_by_a_run_on_gpus_is_that_run_and_of_no_other_device(tmp_path):
    """Its layout, planned again, takes what it took: figures are over those of this program, tokens sent as it did."""
    machine = Machine("cuda", 989e12, 8)
    for per_node in (0, 8):
        layout = ["layout.pp=2", "layout.dp=8", "layout.ep=8", "layout.schedule=1f1b", "layout.microbatches=16"]
        words = ["model=qwen3_30b_a3b", "train.batch_size=128", "train.seq_len=4096", *layout]
        config = compose_config([*words, "hardware=h100", f"layout.ep_per_node={per_node}"])
        measured = {key: 1.25 * forecast(config, machine)[key] for key in ("forward_backward_s", "optimizer_s")}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
        (tmp_path / "summary.json").write_text(json.dumps({"measured": measured | {"machine": vars(machine)}}))
        options = {"gpus": "16", "tokens": "1e9", "calibrate": str(tmp_path), "tp": "1", "cp": "1", "zero": "1"}
        data = planned(options, [*words, "hardware=h100"])[1]
        assert data["best"]["step_time_s"] == pytest.approx(sum(measured.values()))
        assert data["bill"]["made"] == "measured"
    with pytest.raises(BadRequest, match="calibrate=.*: was measured on h100 and says nothing of hardware=b200"):
        planned(options, [*words, "hardware=b200"])
    assert planned(options, ["model=deepseek_v2_lite", "hardware=h100"])[1]["bill"]["made"] == "calibrated"
    elsewhere = compose_config(["experiment=tiny", "hardware=h800", f"run.calibrate={tmp_path}"])
    assert expected(elsewhere, machine)[0]["how"].startswith(
        f"not predicted: run.calibrate={tmp_path}: was measured on h100 and says nothing of hardware=h800; name")


def test_a_run_leaves_a_plan_of_its_own_layout(tmp_path, capsys):
    """That of the forecast: what `sparing plan diff` takes for either side."""
    machine = Machine("cpu", 4e10, 4, 2)
    for name, words in (("one", []), ("two", ["train.batch_size=32", "precision=fp8"])):
        config = compose_config(["experiment=tiny", "hardware=cpu", f"run.dir={tmp_path}/{name}", *words])
        (tmp_path / name).mkdir()
        found, learnt = expected(config, machine)
        keep_plan(config, machine, learnt)
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert plan["best"]["step_time_s"] == found["step_time_s"] and plan["best"] == plan["candidates"][0]
        assert plan["tokens"] == 200 * config.train.batch_size * config.train.seq_len
        assert plan["bill"]["steady"]["usd"] == pytest.approx(found["steps_usd"])
        assert 0 < plan["best"]["memory_gib"]["total"] < 1 and plan["best"]["memory_gib"]["framework"] == 0
    plan_diff(f"{tmp_path}/one", f"{tmp_path}/two")
    assert "expected bill" in capsys.readouterr().out


def test_a_calibrating_run_is_read_once_for_forecast_and_plan(tmp_path):
    machine, taught = Machine("cpu", 4e10, 4, 2), tmp_path / "taught"
    config = compose_config(["experiment=tiny", "hardware=cpu", f"run.dir={tmp_path}", f"run.calibrate={taught}"])
    taught.mkdir()
    (taught / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    measured = {"forward_backward_s": 2.0, "optimizer_s": 0.1, "machine": vars(machine)}
    (taught / "summary.json").write_text(json.dumps({"measured": measured}))
    found, learnt = expected(config, machine)
    for file in taught.iterdir():
        file.unlink()
    keep_plan(config, machine, learnt)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert found["step_time_s"] == plan["best"]["step_time_s"] == pytest.approx(2.1)
