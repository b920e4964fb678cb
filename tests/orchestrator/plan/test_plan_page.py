"""What a person sees of a plan: page, pictures, explanation, difference, what-if. One small plan serves all."""

import dataclasses
import json
import re
from datetime import date
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from orchestrator import plan_sweep
from orchestrator.__main__ import main
from orchestrator.compose import combinations, compose_config
from orchestrator.plan.bill import Terms
from orchestrator.plan.estimate import estimate, send_s
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.memory import in_flight
from orchestrator.plan.money import money
from orchestrator.plan.planner import to_dict
from orchestrator.plan.questions import scaled
from orchestrator.plan.request import Request
from orchestrator.plan.search import Candidate, Plan, search
from orchestrator.plan.stack import stack_named
from orchestrator.plan.trace import held_over_time
from orchestrator.plan.workload import Workload, is_first, pipeline_of
from orchestrator.plan_diff import by_cause, difference, print_diff
from orchestrator.plan_explain import explained, precisions, reduce_words
from orchestrator.plan_format import train_note
from orchestrator.plan_page import page
from orchestrator.plan_plots import timeline_chart
from orchestrator.plan_table import mfu_line, price_words, print_plan, reasons


@pytest.fixture(scope="module")
def small() -> tuple[Plan, dict]:
    request = Request(compose_config(["model=deepseek_v2_lite"]).model, catalogue()["h100"], 16, 1e11, 2048, 64,
                      schedules=("dualpipe",), pinned=(("pp", 2),))
    plan = search(request)
    data = to_dict(plan)
    for row, why in zip(data["candidates"], reasons(data["candidates"]), strict=True):
        row["why"] = why
    return plan, data | money(request, plan.candidates[0], Terms(extension=((10, 8, 8192),)))


@pytest.fixture(scope="module")
def pipelined() -> Workload:
    model = compose_config(["model=deepseek_v2_lite"]).model
    return Workload(model, catalogue()["h100"], 2048, 64, 4, 4, 4, "dualpipe", 8)


def test_the_page_is_one_whole_file_that_asks_the_network_for_nothing(small):
    text = page(*small)
    assert not re.search(r"<script|<link|@import|src=|url\(|`", text)
    opened, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, _: opened.append(tag) if tag != "meta" else None
    parser.handle_endtag = lambda tag: opened.pop() if opened[-1:] == [tag] else opened.append(f"/{tag}")
    parser.handle_startendtag = lambda tag, attributes: None
    parser.feed(text)
    assert opened == []
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert '</figcaption><div class="pan"><svg' in text and '<div class="whole"><svg' in text  # on a telephone
    for words in ("One step, rank by rank", "Memory over a step", "Two bills, never one", "Beside dense models"):
        assert words in text


def test_cost_against_days_is_of_a_questions_offers_or_of_more_and_fewer_replicas(small):
    plan, data = small
    found = {scaling[-1]["devices"]: scaling for scaling in (scaled(each, plan.request) for each in plan.candidates)}
    rows = found[max(found)]
    own = next(row for row in scaled(plan.candidates[0], plan.request) if row["devices"] == plan.request.devices)
    assert own["days"] > data["best"]["days"] and max(found) > plan.request.devices
    assert [row["days"] for row in rows] == sorted((row["days"] for row in rows), reverse=True)
    offers = [{"hardware": name, "days": 1.0, "usd_total": 2.0} for name in ("h100", "a100")]
    assert "fewer and more replicas" in page(plan, data | {"scaling": rows})
    text = page(plan, data | {"question": {"offers": [*offers, {"hardware": "t4", "reason": "no layout fits"}]}})
    assert "of every offer" in text and "a100" in text and "Cost against days" not in page(plan, data)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipe"])
def test_the_timeline_draws_every_action_once_where_the_clock_has_it(pipelined, schedule):
    timeline = estimate(dataclasses.replace(pipelined, schedule=schedule)).timeline
    svg = timeline_chart(timeline, tail=[("optimizer", 0.1)], numbers=True).split("</svg>")[0] + "</svg>"
    rects = [rect for rect in ElementTree.fromstring(svg) if rect.tag == "rect"]
    by_class = {css: [r for r in rects if r.get("class") == css] for css in ("b2", "b4", "b1", "b0", "b7", "slot")}
    kinds = [action.kind for span in timeline.spans for action in span.actions]
    for kind, css in (("F", "b2"), ("B", "b4"), ("I", "b1"), ("W", "b0")):
        assert len(by_class[css]) == kinds.count(kind)
    assert len(by_class["b7"]) == len(by_class["slot"]) == 4
    scale = (1080 - 58 - 4) / (timeline.step_time + 0.1)
    first = min(timeline.spans, key=lambda span: (span.rank, span.start))
    assert float(rects[4].get("width")) == pytest.approx((first.end - first.start) * scale, abs=0.8)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipe"])
def test_memory_over_time_peaks_where_the_schedules_own_order_does(pipelined, schedule):
    work = dataclasses.replace(pipelined, schedule=schedule)
    timeline, stages = estimate(work).timeline, len(pipeline_of(work)[0])
    held = held_over_time(timeline, [1.0] * stages)
    most = [max(sum(times for _, times in counts) for _, counts, _, _ in cases) for cases in in_flight(work)]
    assert [max(value for _, value in points) for points in held] == most
    assert all(points[-1][1] == 0 for points in held)


def test_an_explanation_has_every_term_of_the_step_the_memory_and_the_bill(small):
    plan, data = small
    lines = {line[0]: line for _, section in explained(plan, data) for line in section}
    names = [*data["best"]["parts_s"], *data["best"]["memory_gib"]]
    names += [term["name"] for term in data["bill"]["expected"]["terms"]]
    assert set(names) <= set(lines) and lines["step"][1] == f"{data['best']['step_time_s']:.3f} s"
    assert all(line[2] for name, line in lines.items())


def test_an_explained_pipeline_is_the_sum_of_its_busiest_ranks_slots(small):
    plan, data = small
    sections = dict(explained(plan, data))
    slots = [float(line[1].split()[0]) for line in sections["the step"] if line[0].startswith("  rank ")]
    assert len(slots) > 1 and sum(slots) == pytest.approx(data["best"]["parts_s"]["pipeline"], abs=0.002)
    names = " ".join(line[0] for line in sections["one stage, one microbatch"])
    assert all(part in names for part in ("forward", "overlapped pair", "head", "a send to the next stage"))
    assert any("ms of all-to-all alone" in line[2] for line in sections["one stage, one microbatch"])


def sent_s(work: Workload, timeline) -> float:
    """From a forward's end on one rank to the earliest start of the next stage's on another."""
    spans = {(action.stage, action.microbatch): span for span in timeline.spans for action in span.actions
             if action.kind == "F"}
    return min(span.start - before.end for (stage, micro), span in spans.items() if not is_first(work, stage)
               for before in [spans[stage - 1, micro]] if before.rank != span.rank)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipe"])
def test_a_send_is_told_as_the_clock_has_it(pipelined, schedule):
    work = dataclasses.replace(pipelined, schedule=schedule, dp=2, ep=2, batch_size=32)
    expected = work.microbatch_tokens * work.model.dim * 2 / (450e9 * work.assumptions.network)
    assert sent_s(work, estimate(work).timeline) == pytest.approx(expected, rel=1e-3)
    assert send_s(work) == pytest.approx(expected)


@pytest.mark.parametrize("zero, stack, said", [
    (1, "deepseek", "reduce-scatter of 4-byte gradients and all-gather of 2-byte weights, once; over"),
    (2, "default", "reduce-scatter of 4-byte gradients after each of 8 microbatches, behind computation"),
    (3, "default", "all-gather of 2-byte weights for its forward and its backward"),
    (1, "megatron_bridge_2604", "reduce-scatter of 2-byte gradients"), (0, "default", "all-reduce of 4-byte")])
def test_the_reduction_is_told_as_it_is_counted(pipelined, zero, stack, said):
    assert said in reduce_words(dataclasses.replace(pipelined, zero=zero, stack=stack_named(stack)))
    assert reduce_words(dataclasses.replace(pipelined, dp=1, ep=1, schedule="1f1b")).startswith("nothing")


def test_bytes_by_precision_are_those_of_the_readme(capsys):
    """State a parameter 16, 18, 14; kept a token of DeepSeek-V3 57.1, 28.6, 21.1 MB."""
    work = Workload(compose_config(["model=deepseek_v3"]).model, catalogue()["h800"], 4096, 15360, 16, 128, 64,
                    "dualpipe", 120, dtype="fp8")
    found = {name: value for name, value, _ in precisions(work)}
    for dtype, state, kept in (("fp32", 16, 57.1), ("bf16", 18, 28.6), ("fp8", 14, 21.1)):
        assert found[f"train precision={dtype}: state a parameter"] == f"{state} bytes"
        assert found[f"train precision={dtype}: kept a token"] == f"{kept} MB"


def test_a_difference_is_told_by_term_and_sums_to_the_change(small):
    plan, a = small
    request = dataclasses.replace(plan.request, hardware=dataclasses.replace(plan.request.hardware, usd_per_h=2.0))
    b = a | money(request, plan.candidates[0], Terms(failures=20))
    found = difference(a, b)
    rows = {name: (before, after) for name, before, after in found["bill"]}
    assert found["changed"]["failures"] == (3.8, 20) and not any(x - y for _, x, y in found["step"])
    change = sum(after[1] - before[1] for name, (before, after) in rows.items() if not name.endswith(" bill"))
    assert change == pytest.approx(rows["expected bill"][1][1] - rows["expected bill"][0][1])
    assert sum(by_cause(a["bill"], b["bill"]).values()) == pytest.approx(change)


def test_a_difference_of_unknown_dollars_has_no_percentage(small, capsys):
    _, data = small
    data = json.loads(json.dumps(data))
    other = json.loads(json.dumps(data))
    for side in ("steady", "expected"):
        other["bill"][side]["usd"] = None
        for term in other["bill"][side]["terms"]:
            term["usd"], term["gpu_hours"] = None, term["gpu_hours"] * 2
    other["bill"]["price"]["usd_per_h"] = None
    print_diff(data, other, ["a", "b"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "unknown" in line and "expected  " not in line]
    assert len(rows) > 3 and not any("%" in row for row in rows)


def test_a_difference_is_told_in_figures_that_show_it(small, capsys):
    data = json.loads(json.dumps(small[1]))
    tiny = json.loads(json.dumps(data)) | {"tokens": 819200}
    tiny["best"]["memory_gib"]["weights"] = 0.00321
    tiny["bill"]["steady"]["days"], tiny["bill"]["steady"]["usd"] = 0.0021, 0.0456
    tiny["bill"]["terms"] |= {"validate_sequences": 64, "ramp_steps": 12424}
    print_diff(data, tiny, ["a", "b"])
    out = capsys.readouterr().out
    assert "tokens: 100,000,000,000 -> 819,200" in out and "train.batch_ramp_steps: 0 -> 12,424" in out
    assert "0.00321" in out and "0.0021" in out and "$0.0456" in out
    assert "changed   train.validate_sequences: 0 -> 64 (multiples of each layout's dp x microbatches)" in out


def test_microbatches_have_their_numbers_where_the_clock_begins(small):
    """All of them, also of ranks with few layers, and the beginning is whole."""
    plan, data = small
    model = compose_config(["model=deepseek_v3"]).model
    work = Workload(model, catalogue()["h800"], 4096, 3840, 16, 32, 32, "dualpipev", 120, dtype="fp8")
    text = page(dataclasses.replace(plan, candidates=[Candidate(work, estimate(work))]), data)
    first, then = (re.search(f"<h2>{title}</h2>.*?</svg>", text, re.DOTALL)[0]
                   for title in ("Its beginning", "How it goes on"))
    forwards = re.findall(r'<rect class="b2" x="([\d.]+)" y="0.0" width="([\d.]+)"', first)
    numbers = re.findall(r'<text class="micro" x="([\d.]+)" y="([\d.]+)"', first)
    assert len(forwards) > 20 and len([y for _, y in numbers if float(y) < 24]) >= len(forwards)
    assert then.count("<title>") > 100


def test_the_table_shows_bars_bills_and_dense_lines(small, capsys):
    print_plan(*small)
    text = capsys.readouterr().out
    for words in ("why it is here", "\u2588", "steady", "expected", "production factor", "dense, equal active",
                  "range of joint", "GPT-4", "context_8192"):
        assert words in text


@pytest.mark.parametrize("columns", [80, 100])
def test_a_plan_fits_a_narrow_terminal(small, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_plan(*small)
    lines = capsys.readouterr().out.splitlines()
    tables = [lines[next(i for i, line in enumerate(lines) if line.startswith(head)) :]
              for head in ("layout", "bill ", "beside it", "published", "memory")]
    for rows in tables:
        assert all(len(row) <= columns for row in rows[: rows.index("") if "" in rows else None] if "energy" not in row)
    monkeypatch.delenv("COLUMNS")
    print_plan(*small)
    wide = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines + wide) and max(map(len, wide)) > 120


def test_parts_of_memory_that_are_equal_have_equal_bars(small, capsys):
    plan, data = small
    sizes = data["best"]["memory_gib"] | {"masters": 1.2, "moments": 1.2, "gradients": 3.3, "logits": 0.0}
    print_plan(plan, data | {"best": data["best"] | {"memory_gib": sizes}})
    bars = {line[10:22].strip(): line.count("\u2588") for line in capsys.readouterr().out.splitlines()
            if line.startswith((" " * 10, "memory"))}
    assert bars["masters"] == bars["moments"] == 1 and bars["gradients"] == 2 and bars["logits"] == 0


def test_the_command_for_train_can_be_pasted_and_says_what_it_misses(small, capsys):
    plan, data = small
    rows = [row | {"train": None, "train_not": "train has no such thing"} for row in data["candidates"]]
    rows[0] |= {"train": ["model=x"], "train_step_s": 9e9}
    rows[-1] |= {"train": ["model=x", "layout.pp=2"], "train_step_s": 1234.5,
                 "expected": {"days": 26.34, "usd": 51234.0}}
    print_plan(plan, data | {"candidates": rows, "question": {"deadline_days": 25.6}})
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("sparing train model=x layout.pp=2")
    assert lines[at - 1].startswith("train  ") and lines[at + 1] == ""
    rows[0]["train"] = None
    print_plan(plan, data | {"candidates": rows, "question": {"deadline_days": 25.6}})
    lines += capsys.readouterr().out.splitlines()
    at = lines.index("sparing train model=x layout.pp=2", at + 1)
    for words in ("1234.50 s a step by its own stack (", "26.3 days and $51,234 by the expected bill",
                  "MISSES deadline_days=25.6", "train has no such thing"):
        assert words in lines[at - 1]
    for budget, misses in ((5e4, True), (6e4, False)):
        note = train_note(data | {"candidates": rows, "question": {"budget_usd": budget}})
        assert ("MISSES budget_usd=50000" in note) == misses


def test_the_mfu_names_its_convention_and_the_best_layouts_by_the_others(small, capsys):
    plan, data = small
    print_plan(plan, data)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("MFU  "))
    whole, half = (data["mfu_conventions"][f"bf16 peak, {which} attention"] for which in ("whole", "causal"))
    assert half == pytest.approx(data["best"]["mfu"]) and whole > half and "recompute not" in line
    assert f"{whole:.1%} of the bf16 peak, whole attention" in line and "fp8" not in line and "MTP" not in line
    low = data | {"best": data["best"] | {"layout": data["best"]["layout"] | {"dtype": "fp8"}}}
    assert f"{half / 2:.1%} of the fp8 peak, causal" in mfu_line(low, mtp=True)
    assert "without MTP modules: " in mfu_line(low, mtp=True)


def test_a_ranks_bubble_and_all_ranks_idle_time_have_two_names(small, capsys):
    plan, data = small
    print_plan(plan, data)
    text = capsys.readouterr().out
    head = next(line for line in text.splitlines() if line.startswith("layout"))
    assert "idle" in head and "bubble" not in head and "least idle" in text and "least bubble" not in text
    assert "pipeline and bubble are the busiest rank's, idle above is all ranks' share" in text
    assert f"ranks idle {data['best']['bubble_fraction']:.0%}" in page(plan, data)


@pytest.mark.parametrize("schedule, said", [("dualpipe", "of its paper, which <code>train</code> does not run"),
                                            ("1f1b", "the action table that is executed")])
def test_the_timeline_says_whether_its_table_is_executed(small, pipelined, schedule, said):
    plan, data = small
    work = dataclasses.replace(pipelined, schedule=schedule)
    shown = dataclasses.replace(plan, candidates=[Candidate(work, estimate(work))])
    assert said in page(shown, data)


def test_a_dense_model_is_its_own_twin(small, capsys):
    plan, data = small
    model = compose_config(["model=llama_3_1_8b"]).model
    dense = search(dataclasses.replace(plan.request, model=model, schedules=("1f1b",)))
    found = money(dense.request, dense.candidates[0], Terms())
    assert found["dense"]["equal_active"]["over_pre_training"] == pytest.approx(1)
    assert "equal_loss" not in found["dense"]
    print_plan(dense, data | to_dict(dense) | found | {"candidates": data["candidates"]})
    assert "dense, equal" not in capsys.readouterr().out


def test_a_price_older_than_a_year_is_marked():
    price = {"usd_per_h": 2.0, "market": "spot", "source": "an offer", "date": "2024-01-01"}
    assert "OLD: " in price_words(price) and "OLD" not in price_words(price | {"date": str(date.today())})
    assert "set hardware.usd_per_h" in price_words(price | {"usd_per_h": None})


def test_commas_make_every_combination():
    assert combinations(["model=a,b", "gpus=8", "market=spot,reserved"]) == [
        ["model=a", "gpus=8", "market=spot"], ["model=a", "gpus=8", "market=reserved"],
        ["model=b", "gpus=8", "market=spot"], ["model=b", "gpus=8", "market=reserved"]]


def test_a_what_if_is_one_table_and_a_plan_that_cannot_be_is_a_row_of_it(capsys, tmp_path):
    out = tmp_path / "plans.json"
    words = ["plan", "-m", "model=olmoe_1b_7b", "hardware=h100", "gpus=2", "tokens=1e9,1e2", "train.batch_size=4",
             f"out={out}", f"html={tmp_path / 'plans.html'}"]
    assert main(words) == 0
    assert "Cost against days" in (tmp_path / "plans.html").read_text()
    text, plans = capsys.readouterr().out, json.loads(out.read_text())
    assert text.splitlines()[0].split()[0] == "tokens" and "must be at least one step" in text
    assert plans[0]["bill"]["steady"]["usd"] > 0 and "tokens=100" in plans[1]["error"]


def test_a_what_if_says_whence_its_prices_are_and_how_each_row_was_made(capsys, tmp_path):
    """DeepSeek's $2 for an H800 is an assumption of its report, and older than a year."""
    words = ["plan", "-m", "model=olmoe_1b_7b", "hardware=h100,h800", "gpus=2", "tokens=1e9", "train.batch_size=4",
             "layout.pp=1", f"html={tmp_path / 'plans.html'}"]
    assert main(words) == 0
    for text in (capsys.readouterr().out, (tmp_path / "plans.html").read_text()):
        assert "$2.00 assumed" in text and "an assumption, not an offer" in text and "OLD: " in text
        assert "RunPod H100 SXM" in text and "formula" in text and text.count("assumed in the DeepSeek-V3 report") == 1


def test_a_comparison_whose_losses_never_met_is_told(tmp_path, capsys):
    (tmp_path / "compare.json").write_text(json.dumps({"multiplier": {"equal_active": {}, "equal_total": {}}}))
    words = ["model=olmoe_1b_7b", "hardware=h100", "gpus=2", "tokens=1e9", "train.batch_size=4", "layout.pp=1"]
    assert main(["plan", *words, f"multiplier_from={tmp_path}/compare.json", f"html={tmp_path}/plan.html"]) == 0
    said = f"{tmp_path}/compare.json has no multiplier: the losses of mixture and dense twin never met"
    assert f"measured  nothing: {said}" in capsys.readouterr().out
    assert "losses of mixture and dense twin never met" in (tmp_path / "plan.html").read_text()


def test_a_what_if_takes_the_last_of_a_repeated_key(monkeypatch):
    asked = []
    monkeypatch.setattr(plan_sweep, "_one", lambda words: asked.append(words) or {"error": "-"})
    assert main(["plan", "-m", "model=tiny,mini", "gpus=8", "+model=mini", "gpus=16,32", "tokens=1e9"]) == 3
    assert asked == [["model=mini", f"gpus={number}", "tokens=1e9"] for number in (16, 32)]
    assert main(["plan", "-m", "model=tiny", "gpus=8", "layout.schedule=dualpipe,zbv", "tokens=1e9"]) == 3


@pytest.mark.parametrize("words, said", [
    (["diff", "several.json", "b.json"], "several.json: holds several plans, as `sparing plan -m` writes them; give"),
    (["diff", "a.json"], "takes 2 arguments, not 1"), (["diff", "a.json", "b.json"], "a.json: cannot be read"),
    (["price"], "plan price: there are plan diff, plan prices, plan budgets, and overrides; did you mean prices?"),
    (["-m", "model=tiny", "explain=true"], "goes with one plan"),
    (["-m", "model=tinny", "gpus=8,16"], "no such option"),
    (["model=tiny", "explain=maybe"], "explain=maybe: must be true or false"),
    (["model=olmoe_1b_7b", "hardware=h100", "gpus=8", "tokens=1e9", "multiplier_from=none.json"], "no readable JSON"),
    (["model=olmoe_1b_7b", "hardware=h100", "gpus=8", "tokens=1e9", "multiplier_from=foreign.json"],
     "multiplier_from=foreign.json: must have multiplier.equal_active, and has none; give the compare.json"),
    (["model=llama_3_1_8b", "hardware=h100", "gpus=8", "tokens=1e9", "multiplier_from=foreign.json"],
     "multiplier_from=foreign.json: model=llama_3_1_8b has no routed experts; leave it out"),
    (["model=olmoe_1b_7b", "hardware=h100", "gpus=2", "tokens=1e9", "train.batch_size=4", "out=no/where.json"],
     "out=no/where.json: cannot be written"),
    (["hardware=h100", "gpus=2", "tokens=1e9", "train.batch_size=0"], "train.batch_size=0: must be at least 1"),
    (["hardware=h100", "gpus=2", "tokens=1e9", "train.seq_len=0"], "train.seq_len=0: must be at least 1"),
    (["hardware=h100", "gpus=2", "tokens=1e9", "hardware.bf16_tflops=-5"], "must be positive and finite; take it from"),
    (["hardware=h100", "gpus=2", "tokens=1e9", "hardware.usd_per_h=-1"], "usd_per_h=-1.0: must be finite and not neg"),
    (["model=olmoe_1b_7b", "hardware=v100", "gpus=8", "tokens=1e9", "market=spot"], "market=spot: no such price")])
def test_what_cannot_be_is_answered_in_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "several.json").write_text("[]")
    (tmp_path / "foreign.json").write_text(json.dumps({"predicted": True, "dense": {"equal_active": {}}}))
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
