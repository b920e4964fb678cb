"""From words to a plan and back: what is pinned, the commands that are printed, what cannot be planned."""

import dataclasses
import json
import re
import shlex

import pytest

from model.hf_config import config_to_hf
from orchestrator.compose import compose_config
from orchestrator.config import conf_dir
from orchestrator.errors import BadRequest, NotFit
from orchestrator.own_files import expanded
from orchestrator.plan.forecast import Machine, forecast
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.layout import check_run
from orchestrator.plan.money import terms_for
from orchestrator.plan.planner import price
from orchestrator.plan.questions import (
    fits,
    offer,
)
from orchestrator.plan.request import Request
from orchestrator.plan.runs import not_run, overrides_of
from orchestrator.plan.search import search
from orchestrator.plan.workload import Workload
from orchestrator.plan_questions import settle
from orchestrator.plan_request import compose_plan, read_request
from orchestrator.show_plan import run
from orchestrator.train.data import samples_before

H100 = "hardware=h100"
SMALL = ["model=deepseek_v2_lite", H100, "train.seq_len=2048", "train.batch_size=64"]


@pytest.mark.parametrize("words, expected", [
    (["model=mini", "layout.schedule=gpipe", "layout.pp=4"], {"schedule": "gpipe", "pp": 4}),
    (["model=moonlight_16b", "layout.pp=4", "layout.schedule=interleaved_1f1b", "layout.stages_per_rank=6"],
     {"stages_per_rank": 6}),
    (["model=mini", "train.batch_size=512", "layout.dp=4", "layout.microbatches=4"], {"dp": 4, "microbatches": 4}),
    (["model=mini", "layout.pp=2", "layout.schedule=1f1b", "layout.stages_per_rank=2"], {"schedule": "1f1b"}),
    (["model=mini", "layout.pp=2", "layout.schedule=zbv", "layout.stages_per_rank=3"], {"schedule": "zbv"}),
])
def test_what_train_accepts_is_planned_though_no_search_would_try_it(words, expected):
    gpus = "64" if "model=moonlight_16b" in words else "4"
    asked = read_request({"gpus": gpus, "tokens": "1e10"}, *compose_plan([*words, H100]))
    found = offer(asked).plan.candidates
    layouts = [price(each, asked)["layout"] for each in found]
    assert layouts and all(layout[key] == value for layout in layouts for key, value in expected.items())
    assert fits(asked)


def test_degrees_are_no_mistake_before_the_number_of_gpus_is_known():
    words = ["model=deepseek_v3", "hardware=h800", "layout.pp=16", "layout.ep=64"]
    answer = settle({"gpus": "fit", "tokens": "1e11", "dtype": "fp8"}, words)
    assert int(answer.options["gpus"]) % (16 * 64) == 0
    with pytest.raises(BadRequest, match="layout.ep=64: must divide the 4 GPUs of a stage"):
        settle({"gpus": "64,128", "tokens": "1e11", "dtype": "fp8"}, words)


def test_a_link_that_is_not_used_need_not_be_known():
    words = ["model=tiny", "hardware=rtx_4090", "train.seq_len=256"]
    alone, node = (offer(read_request({"gpus": gpus, "tokens": "1e9"}, *compose_plan(words))) for gpus in ("1", "8"))
    assert 0 < node.days < alone.days
    unlinked = offer(read_request({"gpus": "1", "tokens": "1e9"},
                                  *compose_plan([*words, "hardware.scale_up_gb_per_s=null"])))
    assert unlinked.days == alone.days


def test_a_config_json_is_taken_as_the_model_and_its_plan_is_what_train_takes(tmp_path):
    """Its own quantisation does not matter to a plan."""
    own = compose_config(["model=tiny"]).model
    values = config_to_hf(own) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    words = [f"model={tmp_path / 'config.json'}", "hardware=h100", "train.batch_size=8", "train.seq_len=128"]
    asked = read_request({"gpus": "2", "tokens": "1e6"}, *compose_plan(words))
    assert (asked.model.dim, asked.model.n_routed_experts, asked.model.n_layers) == (128, 8, 4)
    config = compose_config(offer(asked).best["train"])
    check_run(config)
    assert config.model == asked.model


def test_train_and_launch_take_a_config_json_as_the_plan_does(tmp_path):
    own = dataclasses.replace(compose_config(["model=tiny"]).model, n_layers=6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config_to_hf(own)))
    words = ["model.n_dense_layers=2", f"model={tmp_path}/mine/config.json", "layout.pp=2", "layout.microbatches=2"]
    config = compose_config(words)
    check_run(config)
    assert (config.model.name, config.model.n_layers, config.model.n_dense_layers) == ("mine", 6, 2)
    assert config == compose_config([words[0], f"model={tmp_path}/mine", *words[2:]])
    assert config.run.name == "mine" and compose_config(expanded(words)) == config
    assert not any(word.startswith("model=") for word in expanded(words))  # so that no file has to travel


STRANGE = "it's <mine>, v2: {50%} [a]=\\ \u00e9"


@pytest.mark.parametrize("words, options", [
    ([], {}),
    (["model.n_layers=12", "model.norm_eps=1e-6", "cluster=h100_64"], {"market": "spot"}),
    (["train.batch_size=512", "train.batch_start=256", "train.batch_ramp_steps=100", "cluster=h100_256"], {}),
    (["train.validate_every=9", "train.validate_sequences=2048", "optim.lr=1e-3", "hardware.usd_per_h=1.5"], {}),
])
def test_every_printed_command_is_the_very_run_that_was_planned(words, options):
    asked = read_request({"gpus": "64", "tokens": "1e10"} | options,
                         *compose_plan(["model=moonlight_16b", H100, "train.seq_len=8192", *words]))
    for config in commands_of(asked):
        assert config.hardware.name == "h100" and config.hardware.usd_per_h == asked.hardware.usd_per_h
        assert config.cluster.nodes * config.cluster.ranks_per_node in (0, 64)
        assert config.optim.lr == (1e-3 if "optim.lr=1e-3" in words else 3e-3)
        assert config.train.validate_sequences == 2048 or asked.terms.validate_every != 9


@pytest.mark.parametrize("folder", ["mini", STRANGE, "null", "007", "a b"])
def test_the_command_of_a_config_json_is_its_run_whatever_its_folder_is_called(folder, tmp_path):
    """`mini` is a shipped model of another shape."""
    values = config_to_hf(dataclasses.replace(compose_config(["model=olmoe_1b_7b"]).model, n_layers=4, dim=256))
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text(json.dumps(values))
    words = [f"model={tmp_path / folder / 'config.json'}", H100, "train.seq_len=256", "model.n_layers=6"]
    asked = read_request({"gpus": "4", "tokens": "1e7"}, *compose_plan(words))
    name = {STRANGE: "it-s-mine-v2-50-a", "a b": "a-b"}.get(folder, folder)  # as a run may be called
    assert (asked.model.name, asked.model.dim, asked.model.n_layers) == (name, 256, 6)
    commands_of(asked, most=1)


def commands_of(asked: Request, most: int | None = None) -> list:
    """The configs of the printed commands, each the run that was asked for."""
    found = offer(asked).plan.candidates[:most]
    rows = [row for row in (price(each, asked) for each in found) if row["train"]]
    assert rows
    configs = [compose_config(shlex.split(shlex.join(row["train"]))) for row in rows]
    for row, config in zip(rows, configs, strict=True):
        check_run(config)
        assert row["train_step_s"] == pytest.approx(forecast(config, Machine("cuda", 1.0))["step_time_s"])
        train = config.train
        assert config.model == asked.model and (train.batch_size, train.seq_len) == (asked.batch_size, asked.seq_len)
        assert (train.batch_start, train.batch_ramp_steps) == (asked.terms.batch_start, asked.terms.ramp_steps)
        seen = samples_before(train.steps, train) * train.seq_len
        assert 0 <= seen - asked.tokens < asked.batch_size * asked.seq_len
    return configs


def test_a_batch_ramp_that_a_layout_cannot_begin_is_told_and_not_printed():
    words = ["model=moonlight_16b", H100, "train.batch_size=512", "train.batch_start=192", "train.batch_ramp_steps=9",
             "layout.pp=8", "layout.microbatches=16", "layout.schedule=1f1b", "layout.recompute=full"]
    asked = read_request({"gpus": "64", "tokens": "1e10", "tp": "1", "cp": "1"}, *compose_plan(words))
    rows = [price(each, asked) for each in search(asked).candidates]
    wrong = "train.batch_start=192: must be a multiple of dp x microbatches"
    assert any(wrong in (row["train_not"] or "") for row in rows)


def test_a_ramp_that_keeps_all_layouts_from_train_is_told_with_a_remedy(capsys):
    """Beside other reasons, of layouts that are faster."""
    words = ["model=moonlight_16b", H100, "gpus=64", "tokens=1e10", "train.batch_size=512", "layout.pp=8",
             "train.batch_ramp_steps=9"]
    run([*words, "train.batch_start=96"])
    told = capsys.readouterr().out.split("cannot run what fits, for these reasons:")[1].split("refused  ")[0]
    assert "train has no schedule dualpipe" in told and "\nsparing train" not in told
    rule = re.search("train.batch_start=96: must be a multiple of dp x microbatches = 256; use (256), or no ramp", told)
    run([*words, f"train.batch_start={rule[1]}"])
    assert "\nsparing train" in capsys.readouterr().out


def test_a_plan_takes_dualpipe_which_train_refuses():
    asked = read_request({"gpus": "8", "tokens": "1e9"}, *compose_plan([*SMALL, "layout.schedule=dualpipe"]))
    assert {each.work.schedule for each in offer(asked).plan.candidates} == {"dualpipe"} and fits(asked)
    with pytest.raises(BadRequest, match="layout.schedule=dualpipe: must be one of .*; use layout.schedule=dualpipev"):
        compose_config(["layout.schedule=dualpipe"])


def test_a_zero_stage_without_replicas_is_refused_in_words():
    alone = read_request({"gpus": "1", "tokens": "1e9"}, *compose_plan(SMALL))
    assert "ZeRO stage 3 shards over data-parallel replicas, and this layout has none" in {
        each.reason for each in search(alone).refused}


@pytest.mark.parametrize("words, batch, printed", [
    (["experiment=tiny"], (16, 256), set()),
    (["experiment=tiny", "train.seq_len=128"], (16, 128), set()),
    (["experiment=mtp"], (4, 512), set()),
    (["model=tiny", "train.batch_size=16", "train.seq_len=256"], (16, 256), set()),
    (["model=tiny", "train.batch_size=16", "train.validate_sequences=50"], (16, 1024), {"train.validate_sequences=52"}),
])
def test_an_experiments_batch_is_asked_for_and_its_validation_kept(words, batch, printed):
    asked = read_request({"gpus": "4", "tokens": "1e7"}, *compose_plan([*words, H100, "layout.dp=4"]))
    assert (asked.batch_size, asked.seq_len) == batch and asked.batch_asked
    best = price(next(each for each in search(asked).candidates if not not_run(each.work)), asked)
    assert {word for word in best["train"] if word.startswith("train.validate_sequences")} == printed
    commands_of(asked)


def test_an_experiments_precision_is_asked_for(monkeypatch, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "low.yaml").write_text("defaults: [override /model: tiny, override /precision: fp8]\n")
    monkeypatch.setattr("orchestrator.plan_request.conf_dir", lambda: tmp_path)
    fp8 = dataclasses.replace(compose_config(["precision=fp8", H100]))
    monkeypatch.setattr("orchestrator.plan_request.compose_config", lambda words: fp8)
    asked = read_request({"gpus": "4", "tokens": "1e7"}, *compose_plan(["experiment=low"]))
    assert asked.dtype == "fp8"


def test_a_bill_has_the_validation_that_train_is_told(tmp_path):
    """The config's own, where the layout takes so many; it does not follow the layout."""
    asked = read_request({"gpus": "8", "tokens": "1e9"}, *compose_plan(SMALL))
    for dp, microbatches, wanted in ((8, 1, 64), (8, 4, 64), (4, 3, 72), (8, 16, 128)):
        work = dataclasses.replace(search(asked).candidates[0].work, dp=dp, microbatches=microbatches, pp=8 // dp)
        assert terms_for(asked, work).validate_sequences == wanted


def test_every_shipped_model_is_printed_by_its_name_alone():
    for file in (conf_dir() / "model").glob("*.yaml"):
        model = compose_config([f"model={file.stem}"]).model
        work = Workload(model, catalogue()["h100"], 128, 1, 1, 1, 1, "1f1b", 1)
        assert overrides_of(work)[0] == f"model={model.name}" and overrides_of(work)[1].startswith("layout.")


def test_a_degree_that_is_given_holds_for_every_layout():
    for degree, wanted in ((["layout.pp=2"], {2}), ([], {2, 4, 8})):
        words = compose_plan([*SMALL, *degree, "layout.schedule=zbv"])
        found = offer(read_request({"gpus": "8", "tokens": "1e9"}, *words)).plan.candidates
        assert found and {each.work.schedule for each in found} == {"zbv"}
        assert {each.work.pp for each in found} <= wanted


def test_the_stack_and_the_routing_of_a_run_are_what_every_layout_is_priced_with(tmp_path):
    counts = [[300, *[100] * 63], [100] * 64]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "moe/tokens_per_expert": counts}) + "\n")
    options = {"gpus": "8", "tokens": "1e9"}
    asked = read_request(options | {"stack": "megatron_bridge_2604", "routing": str(tmp_path)}, *compose_plan(SMALL))
    found = offer(asked).plan.candidates
    for each in found:
        assert each.work.stack.name == "megatron_bridge_2604"
        fullest = 1 + 200 * each.work.ep / 6600 - 200 / 6600
        assert each.work.imbalance == pytest.approx((fullest + 1) / 2)
    times = [offer(read_request(options | {"routing": name}, *compose_plan(SMALL))).best["step_time_s"]
             for name in ("balanced", "bias", "unbalanced")]
    assert times == sorted(times) and times[0] == offer(read_request(options, *compose_plan(SMALL))).best["step_time_s"]


@pytest.mark.parametrize("words, error, told", [
    (["hardware=h100", "gpus=8", "tokens=1e9", "stack=torchtitn"], BadRequest, "stack=torchtitn: no such software sta"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "stack=torchtitn"], BadRequest, "did you mean torchtitan"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "routing=even"], BadRequest, "routing=even: must be one of balanced, b"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "model=llama_3_1_70b", "routing=bias"], BadRequest,
     "routing=bias: model=llama_3_1_70b has no routed experts; leave it out"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "model=deepseek_v3"], NotFit, "the smallest that holds it is gpus="),
    (["hardware=h100", "gpus=8", "tokens=1000"], BadRequest, "tokens=1000: must be at least one step of 64 sequences"),
    (["hardware=gb200", "gpus=8", "budget_usd=100"], BadRequest, "hardware.usd_per_h: is not known for hardware=gb200"),
    (["hardware=gb200", "gpus=8", "budget_usd=100"], BadRequest, "market=on_demand: a100, a100_40, b200, h100, "),
    (["hardware=gb200", "gpus=8,16", "tokens=1e9", "objective=dollars"], BadRequest, "set hardware.usd_per_h"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "layout.pp=3"], BadRequest, "layout.pp=3: must divide the 8 GPUs"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "layout.pp=2", "layout.dp=3"], BadRequest, "layout.pp x layout.dp = 6 "),
    (["hardware=h100", "gpus=8", "tokens=1e9", "tp=3"], BadRequest, "tp=3: must divide the model's 16 heads and be "),
    (["hardware=h100", "gpus=24", "tokens=1e9", "tp=16"], BadRequest, "tp=16: .* at most 8, ranks of one node"),
    (["hardware=h100", "gpus=6", "tokens=1e9", "tp=4"], BadRequest, "tp=4: must divide the 6 GPUs"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "cp=3"], BadRequest, "cp=3: must divide the 8 GPUs"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "pue=0.5"], BadRequest, "pue=0.5: must be a number of at least 1; use"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "power_share=7"], BadRequest, "power_share=7: .* from 0 to 1; use"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "layout.ep=3"], BadRequest, "layout.ep=3: must divide the model's 64"),
    (["hardware=h100,h20x", "gpus=8", "tokens=1e9"], BadRequest, "hardware=h20x: no such device; did you mean h20"),
    (["hardware=h10", "gpus=8", "tokens=1e9"], BadRequest, "did you mean h100"),
    (["hardware=h100", "tokens=1e9", "deadline_days=1", "budget_usd=5"], BadRequest, "ask one at a time"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "deadline_days=1"], BadRequest, "gpus=8: does not go with deadline"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "budget_usd=9"], BadRequest, "leave one of them out, or tokens, to ask"),
    (["hardware=h100,a100", "gpus=8", "budget_usd=9"], BadRequest, "budget_usd=9: buys tokens on one kind of GPU"),
    (["hardware=h100", "gpus=4", "budget_usd=100", "hardware.usd_per_h=0"], BadRequest,
     "budget_usd=100: buys more than 1e.12 GPU-hours at hardware.usd_per_h=0; set that to what one costs, or give"),
    (["hardware=h100,h200", "tokens=1e9", "budget_usd=100", "hardware.usd_per_h=0"], BadRequest, "usd=100: buys"),
    (["hardware=h100", "gpus=4", "budget_usd=1e29"], BadRequest, "budget_usd=1e.29: buys more than 1e.12 GPU-hours at"),
    (["hardware=h100", "gpus=8", "budget_usd=0.001"], NotFit, "budget_usd=0.001: does not pay for start-up and one"),
    (["hardware=h100", "tokens=1e9", "deadline_days=none"], BadRequest, "a positive number; use deadline_days=30"),
    (["hardware=h100", "tokens=1e12", "deadline_days=1e-4"], NotFit,
     "no number of h100 that was tried, up to 16,384, meets it; the nearest is [0-9,]+ x h100: "),
    (["hardware=h100", "gpus=8", "tokens=1e30"], BadRequest, "tokens=1e30: must be a positive number below 1e30; use "),
    (["hardware=rtx_4090", "tokens=1e12", "deadline_days=9", "model=deepseek_v3"], BadRequest,
     "hardware.scale_out_gb_per_s: is not known for hardware=rtx_4090"),
    (["hardware=rtx_4090", "gpus=8", "tokens=1e12", "model=deepseek_v3"], NotFit,
     "fits on 8 x rtx_4090, and on more of them none can be planned: hardware.scale_out_gb_per_s: is not known"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "layout.pp=1", "layout.schedule=zbv"], BadRequest,
     "layout.schedule=zbv: is one of pipelines, and layout.pp=1 is none; leave one of them to the plan"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "layout.dp=8", "layout.schedule=zbv"], BadRequest, "is one of pip"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "layout.schedule=zbv", "layout.recompute=full"], NotFit,
     "leave one of layout.schedule, layout.recompute to the plan"),
    (["-m", "hardware=h100", "gpus=1,2", "tokens=1e9", "model=deepseek_v3"], NotFit, "none of the 2 combinations"),
    (["hardware=h100", "gpus=8.5", "tokens=1e9"], BadRequest, "gpus=8.5: must be a positive whole number"),
    (["hardware=rtx_3090", "gpus=fit", "tokens=1e9"], BadRequest, "hardware.bf16_tflops: is not known for hardware=r"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "train.seq_len=65536", "model=moonlight_16b"], BadRequest,
     "train.seq_len=65536: must not exceed model.max_seq_len=8192; shorten it or raise model.max_seq_len"),
    (["hardware=rtx_4090", "gpus=16", "tokens=1e9"], BadRequest, "hardware.scale_out_gb_per_s: is not known for hardw"),
    (["hardware=a100", "gpus=8", "tokens=1e9", "market=spot"], BadRequest, "market=spot: no such price is known for h"),
    (["hardware=h100", "gpus=4", "tokens=1e9", "model=mini", "layout.pp=2", "layout.microbatches=1"], NotFit,
     "leave one of layout.pp, layout.microbatches to the plan"),
    (["-m", "hardware=h100", "gpus=4", "tokens=1e9", "deadline_days=1"], BadRequest, "deadline_days=1: goes with one "),
    (["-m", "hardware=h100", "gpus=4", "tokens=1e9", "budget_usd=1"], BadRequest, "budget_usd=1: goes with one plan, "),
    (["-m", "hardware=h100", "gpus=4", "tokens=1e9", "objective=time"], BadRequest, "objective=time: goes with one pl"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "objective=fun"], BadRequest, "objective=fun: must be time or dollars"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "model=nowhere/config.json"], BadRequest, "is no readable JSON object"),
])
def test_words_that_cannot_be_planned_are_told_by_key_rule_and_remedy(words, error, told, capsys):
    model = [] if any(word.startswith("model=") for word in words) else ["model=deepseek_v2_lite"]
    with pytest.raises(error, match=told.replace("(", ".")):
        run([*words, *model])
