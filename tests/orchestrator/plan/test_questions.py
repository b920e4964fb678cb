"""What turns a plan round, and what is told of words that cannot be planned. All figures are predicted."""

import dataclasses

import pytest

from orchestrator.config import Recompute
from orchestrator.errors import BadRequest
from orchestrator.plan import questions
from orchestrator.plan.forecast import Cpus
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.money import bill_of
from orchestrator.plan.planner import default_batch
from orchestrator.plan.questions import (
    between,
    chosen,
    fits,
    for_budget,
    for_deadline,
    front,
    offer,
    resized,
    smallest,
    tokens_for,
)
from orchestrator.plan.request import MOST_DEVICES, Request
from orchestrator.plan.search import search
from orchestrator.plan_format import days
from orchestrator.plan_offers import Told
from orchestrator.plan_questions import settle
from orchestrator.plan_request import compose_plan, read_request
from orchestrator.show_plan import planned

H100 = "hardware=h100"
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
    """On the grid of numbers, and then in between: 40 GPUs, where the grid has 32 and 48."""
    free, told = dataclasses.replace(request_, batch_asked=False), []
    days = offer(resized(free, 40)).days * 1.0001
    found = for_deadline(free, days, told.append)
    assert {id(each) for each in found} <= {id(each) for each in told} and found[-1].request.devices == 40
    assert found[-1].days <= days and all(each.days > days for each in found[:-1])


def test_a_budget_below_the_smallest_cluster_is_met_by_a_larger_one(request_):
    """The smallest is short of memory, so that it recomputes and is the dearest; the fastest within the budget is
    found beyond it, and lies below the first that is above."""
    tight = dataclasses.replace(request_, hardware=dataclasses.replace(request_.hardware, memory_gib=40))
    least = smallest(tight)
    first, larger = offer(least), offer(resized(tight, 2 * least.devices))
    assert larger.usd < first.usd
    budget = (larger.usd + first.usd) / 2
    found = for_budget(tight, budget, lambda each: None)
    within = [each for each in found if each.usd <= budget]
    assert found[0].usd > budget and within
    fastest = chosen(within, "time").request.devices
    assert all(each.usd > budget for each in found if each.request.devices > fastest)


def test_a_limit_holds_for_all_that_is_billed(request_):
    """Post-training and context extension are in the days and dollars of an offer, and in the tokens of a budget."""
    terms = dataclasses.replace(request_.terms, other_gpu_hours=50.0, extension=((10, 64, 4096),))
    more = dataclasses.replace(request_, terms=terms)
    plain, whole = offer(request_), offer(more)
    assert whole.best["usd_total"] == plain.best["usd_total"] < plain.usd
    assert whole.usd > plain.usd + 50 * request_.hardware.usd_per_h and whole.days > plain.days + 50 / 8 / 24
    tokens = tokens_for(whole, 500.0)
    again = offer(dataclasses.replace(more, tokens=tokens))
    assert again.usd == pytest.approx(500, rel=1e-3) and again.usd <= 500 and tokens < tokens_for(plain, 500.0)
    assert for_deadline(more, whole.days, lambda each: None)[-1].days <= whole.days


@pytest.mark.parametrize("limit, value, side", [("deadline_days", 0.1, "days"), ("budget_usd", 60.0, "usd")])
def test_the_plan_of_a_limit_keeps_it_with_start_up_and_failures(limit, value, side, capsys):
    """The bill that is printed with it is the offer's. Steady, fewer GPUs would do for the deadline, and more for the
    budget."""
    options = {"tokens": "1e9", "start_up_s": "3000", "preemptions": "500", limit: str(value)}
    answer = settle(options, SMALL)
    chosen_row = next(row for row in answer.question["offers"] if row.get("chosen"))
    bill = planned(answer.options, answer.overrides)[1]["bill"]
    assert bill["expected"][side] <= value and bill["expected"]["days"] == pytest.approx(chosen_row["days"])
    assert bill["expected"]["usd"] == pytest.approx(chosen_row["usd_total"]) and answer.question["bill"] == "expected"
    assert "of the expected bill" in capsys.readouterr().out
    free = read_request(answer.options, *compose_plan(SMALL))
    other = resized(free, free.devices // 2 if limit == "deadline_days" else 2 * free.devices)
    best = search(other).candidates[0]
    steady = bill_of(other, best, other.terms)["steady"]
    assert steady[side] <= value < offer(other).expected[side]


def test_a_budget_is_looked_for_beyond_a_number_that_is_dearer_than_its_neighbours(request_, monkeypatch):
    """32 GPUs divide badly, 128 are within the budget again; start-up ends it."""
    usd = {8: 100, 16: 110, 32: 140, 64: 118, 128: 119, 256: 130, 512: 150, 1024: 190, 2048: 270}
    free = dataclasses.replace(request_, batch_asked=False)
    monkeypatch.setattr(questions, "fits", lambda each: each.devices >= 8)
    monkeypatch.setattr(questions, "offer", lambda each: questions.Offer(
        each, None, expected={"usd": usd.get(each.devices, 119 + (each.devices - 128) / 10), "days": 9 / each.devices}))
    monkeypatch.setattr(questions, "least_bill", lambda each: {"usd": 90 + each.devices / 10, "days": 0.0})
    found = for_budget(free, 120.0, lambda each: None)
    within = max(each.request.devices for each in found if each.usd <= 120)
    assert within == 136 and max(each.request.devices for each in found) <= 256


def test_the_least_bill_is_no_more_than_any_layouts(offers):
    for each in offers:
        if each.best:
            least = questions.least_bill(each.request)
            assert 0 < least["days"] <= each.days and 0 <= least["usd"] <= (each.usd or 0.0)


def test_a_batch_that_was_asked_for_stays_even_where_it_is_the_usual_one():
    words = ["model=deepseek_v2_lite", H100, "train.seq_len=2048"]
    usual = read_request({"gpus": "8", "tokens": "1e9"}, *compose_plan(words))
    asked = read_request({"gpus": "8", "tokens": "1e9"}, *compose_plan([*words, "train.batch_size=64"]))
    assert usual.batch_size == asked.batch_size == 64
    assert (resized(usual, 16).batch_size, resized(asked, 16).batch_size) == (128, 64)


def test_of_equally_fast_offers_the_cheapest_is_chosen(request_):
    """As one's own contract for a device of the catalogue is, wherever it stands among them."""
    dear, ours, unknown = (offer(dataclasses.replace(request_, hardware=dataclasses.replace(
        request_.hardware, usd_per_h=price))) for price in (2.99, 1.9, None))
    assert chosen([dear, ours], "time") is ours and chosen([unknown, dear], "time") is dear


def test_a_price_that_nobody_offers_is_not_the_cheapest(request_):
    """DeepSeek's $2 for an H800 is an assumption of its report."""
    cheap = dataclasses.replace(catalogue()["h800"], usd_per_h=0.01)
    both = [offer(request_), offer(dataclasses.replace(request_, hardware=cheap))]
    assert both[1].usd < both[0].usd and chosen(both, "dollars") is both[0] and front(both) == [both[0]]
    assert chosen(both[1:], "dollars") is both[1]


def test_a_device_without_a_price_of_the_market_is_an_offer_with_its_reason(capsys):
    words = ["model=deepseek_v2_lite", "train.seq_len=2048", "train.batch_size=64", "hardware=h100,a100"]
    rows = settle({"gpus": "8", "tokens": "1e9", "market": "spot"}, words).question["offers"]
    assert rows[0]["price"] == {"usd_per_h": 1.25, "market": "spot", "source": catalogue()["h100"].spot.source,
                                "date": "2025-03-01", "age_days": rows[0]["price"]["age_days"], "assumed": False}
    assert rows[1]["reason"].startswith("market=spot: no such price is known for hardware=a100")
    shown = " ".join(capsys.readouterr().out.split())
    assert "$1.25 a GPU-hour, spot (Nebius H100" in shown and "OLD" in shown
    answer = settle({"tokens": "1e9", "market": "spot", "deadline_days": "1"}, words)
    assert "hardware=h100" in answer.overrides and "reason" in answer.question["offers"][-1]
    with pytest.raises(BadRequest, match="market=spot: no such price is known for hardware=a100"):
        settle({"gpus": "8,16", "tokens": "1e9", "market": "spot"}, [*words[:-1], "hardware=a100"])


def test_the_day_of_a_price_may_be_a_users_own_words():
    answer = settle({"gpus": "4,8", "tokens": "1e9"}, [*SMALL, "hardware.usd_per_h=2", "hardware.date=yesterday"])
    assert [row["price"]["age_days"] for row in answer.question["offers"]] == [None, None]


def test_tokens_for_a_budget_cost_the_budget(offers):
    tokens = tokens_for(offers[0], 500.0)
    again = offer(dataclasses.replace(offers[0].request, tokens=tokens))
    assert again.usd == pytest.approx(500, rel=1e-3) and again.usd <= 500


def test_a_model_fits_under_a_split_backward_by_what_selective_recompute_drops():
    words = ["model=deepseek_v3", "cluster=h800_2048", "layout.pp=16", "layout.ep=64", "layout.microbatches=120",
             "precision=fp8", "layout.schedule=dualpipev"]
    asked = {how: read_request({"tokens": "14.8e12", "tp": "1", "cp": "1"}, *compose_plan([*words, *how]))
             for how in ((), ("layout.recompute=none",))}
    assert [fits(each) for each in asked.values()] == [True, False]
    assert {candidate.work.recompute for candidate in search(asked[()]).candidates} == {Recompute.selective}


@pytest.mark.parametrize("devices, seq_len, sequences", [
    (64, 2048, 512), (64, 4096, 512), (64, 8192, 256), (64, 131072, 64), (8, 131072, 8), (4096, 4096, 15360),
    (4096, 32768, 1920), (4096, 131072, 480),  # those of V3's context extension
])
def test_the_usual_batch_has_no_more_tokens_where_sequences_are_longer(devices, seq_len, sequences):
    assert default_batch(devices, seq_len) == sequences


def test_amounts_may_be_written_as_people_say_them(request_):
    for words in ({"gpus": "8", "tokens": "1B"}, {"gpus": "8", "tokens": "1000M"}, {"gpus": "8", "tokens": "1e6k"}):
        assert read_request(words, *compose_plan(SMALL)) == request_
    for tokens in ("T", "1TB", "-1T"):
        with pytest.raises(BadRequest, match=f"tokens={tokens}: must be a positive number"):
            read_request({"gpus": "8", "tokens": tokens}, *compose_plan(SMALL))
    with pytest.raises(BadRequest, match="gpus=2K: must be a positive whole number"):
        read_request({"gpus": "2K", "tokens": "1B"}, *compose_plan(SMALL))


def test_a_ramp_that_the_fastest_layout_cannot_begin_is_planned_with_one_that_can(request_):
    words = ["train.batch_start=4", "train.batch_ramp_steps=9"]
    asked = read_request({"gpus": "8", "tokens": "1e9"}, *compose_plan([*SMALL, *words]))
    found, free = search(asked), search(request_)
    assert free.candidates[0].work.dp == 8 and {each.work.dp for each in found.candidates} <= {1, 2, 4}
    assert any(item.reason == "train.batch_start=4: must be a multiple of dp=8" for item in found.refused)
    assert offer(asked).expected["usd"] > offer(request_).usd


def test_one_machine_of_cpus_has_no_more_ranks_than_cores(request_):
    calibration = dataclasses.replace(request_.calibration, peak_flops_per_s=1e11, cores=6)
    cpu = dataclasses.replace(request_, hardware=catalogue()["cpu"], cpus=Cpus(catalogue()["cpu"], calibration))
    several = dataclasses.replace(cpu, per_machine=2)
    assert [each.most_devices for each in (cpu, several, request_)] == [6, MOST_DEVICES, MOST_DEVICES]


def test_an_offer_says_between_which_days_eight_of_ten_runs_of_its_kind_would_be_done(offers, capsys):
    Told().show(offers[:2], offers[0])
    low, high = offers[0].band_days
    assert low < offers[0].days < high and f"{days(low)}-{days(high)}" in capsys.readouterr().out


def test_the_smallest_cluster_holds_the_model_and_half_of_it_does_not(request_):
    least = smallest(request_)
    assert least.devices > 1 and fits(least) and not fits(resized(least, least.devices // 2))
    v3 = read_request({"gpus": "8", "tokens": "1e11", "dtype": "fp8"}, *compose_plan(["model=deepseek_v3", H100]))
    least = smallest(v3)
    assert not any(fits(resized(v3, devices)) for devices in range(8, least.devices, 8))
    short = dataclasses.replace(v3, hardware=dataclasses.replace(v3.hardware, memory_gib=74.5))
    assert fits(resized(short, 144)) and smallest(short).devices <= 144  # the grid has 128 and 192
    assert [each.devices for each in between(128, resized(v3, 192))] == list(range(136, 192, 8))
    rack = dataclasses.replace(v3, hardware=catalogue()["gb200"])
    assert [each.devices for each in between(8, resized(rack, 16))] == [12], "machines of a rack are of four"
    assert [each.devices for each in between(4, resized(rack, 8))] == [5, 6, 7], "one that is shared"


def test_several_values_become_one_plan_and_a_table(capsys):
    answer = settle({"gpus": "4,8", "tokens": "1e9", "objective": "dollars"}, SMALL)
    assert answer.options["gpus"] in ("4", "8") and len(answer.question["offers"]) == 2
    assert "on the front" in " ".join(capsys.readouterr().out.split())
    assert settle({"gpus": "8", "tokens": "1e9"}, SMALL).question is None


def test_offers_stand_by_their_number_with_their_batch_and_what_lacks_is_told_once(request_, capsys):
    free = dataclasses.replace(request_, batch_asked=False)
    lacking = dataclasses.replace(free, hardware=catalogue()["rtx_3090"])
    found = [offer(resized(each, devices)) for each in (free, lacking) for devices in (32, 8, 16)]
    Told().show(found, found[1])
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(0).strip() == "tokens" and "GPUs  a step" in lines[0]
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["h100", "8", "131.1K"], ["h100", "16", "262.1K"], ["h100", "32", "524.3K"]]
    assert lines[4] == "not planned: rtx_3090: hardware.bf16_tflops: is not known"
    assert "different trainings" in lines[5] and not any("rtx_3090" in line for line in lines[5:])
    Told().show(found[:1], found[0])
    assert "different trainings" not in capsys.readouterr().out


def test_a_value_that_is_named_twice_is_one_row():
    rows = settle({"gpus": "8,8", "tokens": "1e9"}, [word.replace(H100, "hardware=h100,h100") for word in SMALL])
    assert len(rows.question["offers"]) == 1


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
