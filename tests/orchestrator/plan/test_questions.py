"""What turns a plan round, and what is told of words that cannot be planned. All figures are predicted."""

import dataclasses
import json

import pytest

from model.hf_config import config_to_hf
from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest, NotFit
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.layout import check_run
from orchestrator.plan.planner import Request
from orchestrator.plan.questions import chosen, fits, for_deadline, front, offer, resized, smallest, tokens_for
from orchestrator.plan_questions import settle
from orchestrator.plan_request import compose_plan, read_request
from orchestrator.show_plan import run

SMALL = ["model=deepseek_v2_lite", "hardware=h100", "train.seq_len=2048", "train.batch_size=64"]


@pytest.fixture(scope="module")
def request_() -> Request:
    return read_request({"gpus": "8", "tokens": "1e9"}, *compose_plan(SMALL))


@pytest.fixture(scope="module")
def offers(request_) -> list:
    others = [dataclasses.replace(request_, hardware=catalogue()[name]) for name in ("a100", "gb200", "rtx_3090")]
    return [offer(each) for each in (request_, resized(request_, 16), *others)]


def test_nothing_on_the_front_is_beaten_in_days_and_dollars_and_all_else_is(offers):
    pareto = front(offers)
    priced = [each for each in offers if each.usd is not None]
    beaten = [a for a in priced if any(b.days <= a.days and b.usd <= a.usd and b is not a for b in priced)]
    assert pareto and {id(each) for each in pareto} == {id(each) for each in priced} - {id(each) for each in beaten}


def test_the_cheapest_has_a_price_and_a_device_without_figures_is_an_offer_with_its_reason(offers):
    fast, cheap = chosen(offers, "time"), chosen(offers, "dollars")
    assert fast.days == min(each.days for each in offers) and fast.request.hardware.name == "gb200"
    assert cheap.usd == min(each.usd for each in offers if each.usd is not None)
    assert "hardware.bf16_tflops: is not known for hardware=rtx_3090" in offers[-1].reason


def test_a_deadline_is_met_by_the_first_size_that_meets_it(request_):
    told = []
    found = for_deadline(request_, 0.05, told.append)
    assert found == told and found[-1].days <= 0.05 and all(each.days > 0.05 for each in found[:-1])


def test_tokens_for_a_budget_cost_the_budget(offers):
    tokens = tokens_for(offers[0], 500.0)
    again = offer(dataclasses.replace(offers[0].request, tokens=tokens))
    assert again.usd == pytest.approx(500, rel=1e-3) and again.usd <= 500


def test_the_smallest_cluster_holds_the_model_and_half_of_it_does_not(request_):
    least = smallest(request_)
    assert least.devices > 1 and fits(least) and not fits(resized(least, least.devices // 2))


def test_several_values_become_one_plan_and_a_table(capsys):
    answer = settle({"gpus": "4,8", "tokens": "1e9", "objective": "dollars"}, SMALL)
    assert answer.options["gpus"] in ("4", "8") and len(answer.question["offers"]) == 2
    assert "on the front of dollars against days" in " ".join(capsys.readouterr().out.split())
    assert settle({"gpus": "8", "tokens": "1e9"}, SMALL).question is None


SEVERAL = ["model=deepseek_v2_lite", "train.seq_len=2048", "train.batch_size=64", "hardware=h100,a100,rtx_3090"]


def test_of_several_types_the_cheapest_that_meets_a_deadline_and_the_smallest_that_fits(capsys):
    """A type without figures is an offer with its reason, and its words are those of the plan that is made."""
    answer = settle({"tokens": "1e9", "deadline_days": "0.1"}, SEVERAL)
    rows = answer.question["offers"]
    able = [row for row in rows if row.get("days", 1) <= 0.1]
    assert {row["hardware"] for row in able} == {"h100", "a100"}
    best = min(able, key=lambda row: row["usd_total"])
    assert answer.options["gpus"] == str(best["devices"]) and f"hardware={best['hardware']}" in answer.overrides
    assert "hardware.bf16_tflops: is not known" in capsys.readouterr().out
    fit = settle({"tokens": "1e9", "gpus": "fit", "objective": "dollars"}, SEVERAL).question
    assert sum("layout" in row for row in fit["offers"]) == 2 and fit["smallest"] <= 16


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


def test_a_degree_that_is_given_holds_for_every_layout(request_):
    asked = read_request({"gpus": "8", "tokens": "1e9"}, *compose_plan([*SMALL, "layout.pp=2", "layout.schedule=zbv"]))
    found = offer(asked).plan.candidates
    assert found and {(each.work.pp, each.work.schedule) for each in found} == {(2, "zbv")}


def test_the_stack_and_the_routing_of_a_run_are_what_every_layout_is_priced_with(tmp_path, request_):
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
    assert times == sorted(times) and times[0] == offer(request_).best["step_time_s"]


@pytest.mark.parametrize("words, error, told", [
    (["hardware=h100", "gpus=8", "tokens=1e9", "stack=torchtitn"], BadRequest, "stack=torchtitn: no such software sta"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "stack=torchtitn"], BadRequest, "did you mean torchtitan"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "routing=even"], BadRequest, "routing=even: must be one of balanced, b"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "model=llama_3_1_70b", "routing=bias"], BadRequest,
     "routing=bias: model=llama_3_1_70b has no routed experts; leave it out"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "model=deepseek_v3"], NotFit, "the smallest that holds it is gpus="),
    (["hardware=h100", "gpus=8", "tokens=1000"], BadRequest, "tokens=1000: must be at least one step of 64 sequences"),
    (["hardware=gb200", "gpus=8", "budget_usd=100"], BadRequest, "hardware.usd_per_h: is not known for hardware=gb200"),
    (["hardware=gb200", "gpus=8,16", "tokens=1e9", "objective=dollars"], BadRequest, "set hardware.usd_per_h"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "layout.pp=3"], BadRequest, "layout.pp=3: layout.pp x layout.dp = 3"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "layout.ep=3"], BadRequest, "layout.ep=3: must divide the model's 64"),
    (["hardware=h100,h20x", "gpus=8", "tokens=1e9"], BadRequest, "hardware=h20x: no such device; did you mean h20"),
    (["hardware=h10", "gpus=8", "tokens=1e9"], BadRequest, "did you mean h100"),
    (["hardware=h100", "tokens=1e9", "deadline_days=1", "budget_usd=5"], BadRequest, "ask one at a time"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "deadline_days=1"], BadRequest, "gpus=8: does not go with deadline"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "budget_usd=9"], BadRequest, "leave one of them out, or tokens, to ask"),
    (["hardware=h100,a100", "gpus=8", "budget_usd=9"], BadRequest, "budget_usd=9: buys tokens on one kind of GPU"),
    (["hardware=h100", "gpus=8", "budget_usd=0.001"], NotFit, "budget_usd=0.001: does not pay for one step"),
    (["hardware=h100", "tokens=1e9", "deadline_days=none"], BadRequest, "a positive number; use deadline_days=30"),
    (["hardware=h100", "gpus=8.5", "tokens=1e9"], BadRequest, "gpus=8.5: must be a positive whole number"),
    (["hardware=rtx_3090", "gpus=fit", "tokens=1e9"], BadRequest, "hardware.bf16_tflops: is not known for hardware=r"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "objective=fun"], BadRequest, "objective=fun: must be time or dollars"),
    (["hardware=h100", "gpus=8", "tokens=1e9", "model=nowhere/config.json"], BadRequest, "is no readable JSON object"),
])
def test_words_that_cannot_be_planned_are_told_by_key_rule_and_remedy(words, error, told, capsys):
    model = [] if any(word.startswith("model=") for word in words) else ["model=deepseek_v2_lite"]
    with pytest.raises(error, match=told.replace("(", ".")):
        run([*words, *model])
