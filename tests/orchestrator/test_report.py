import json
import math
import pathlib
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from orchestrator.errors import BadRequest
from orchestrator.plan.cost import MFU_CONVENTION
from orchestrator.report import write_report
from orchestrator.report_plots import Series, format_number, line_chart, load_heatmap, nice_ticks, smoothed
from orchestrator.report_run import expert_load, read_run, shares
from orchestrator.report_style import STYLE

LAYERS = ("layers.1", "layers.2", "layers.3", "mtp.0")


def rows_of(steps, *, experts=16, usd_per_h=0.05, seed=0, loss_to=1.6):
    """Rows as a run of 4 CPU ranks writes them: a falling loss, a noisy rate, experts that balance by and by."""
    rng = random.Random(seed)
    seconds, rows = 6.0, []
    popularity = [[rng.gauss(0, 0.6) for _ in range(experts)] for _ in LAYERS]
    for step in range(1, steps + 1):
        loss = loss_to + 3.9 * math.exp(-step / 45) + rng.gauss(0, 0.03)
        step_s = 0.42 * (1 + 0.07 * rng.gauss(0, 1) ** 2)
        seconds += step_s + (1.2 if step % 50 == 0 else 0.0)
        imbalance = math.exp(-step / 80) + 0.12
        counts = [[round(512 * math.exp(imbalance * p + rng.gauss(0, 0.05))) for p in layer] for layer in popularity]
        maxima = [max(layer) * experts / sum(layer) for layer in counts]
        tokens, usd = step * 4096, None if usd_per_h is None else 4 * seconds / 3600 * usd_per_h
        row = {"step": step, "train/loss": loss, "train/grad_norm": 0.4 + 2 / step + abs(rng.gauss(0, 0.05)),
               "tokens/total": tokens,
               "tokens/per_s": 4096 / step_s, "time/step_s": step_s, "time/data_s": 0.004, "perf/mfu": 0.41,
               "cost/device_hours": 4 * seconds / 3600, "cost/usd_total": usd,
               "moe/load_max_over_mean": sum(maxima) / len(maxima), "moe/tokens_per_expert": counts,
               **{f"moe/load_max_over_mean/{name}": load for name, load in zip(LAYERS, maxima, strict=True)}}
        for name, factor in (("total", 2.6), ("active", 1.0)):
            hours = factor * step * 0.43 * 4 / 3600
            row[f"cost/dense_equal_{name}_device_hours"] = hours
            row[f"cost/dense_equal_{name}_usd"] = None if usd_per_h is None else hours * usd_per_h
        if step % 50 == 0 or step == steps:
            row |= {"validation/loss": loss + 0.05, "validation/bits_per_byte": (loss + 0.05) / math.log(2)}
        rows.append(row)
    return rows


def summary_of(rows, *, name="tiny", usd_per_h=0.05):
    last = rows[-1]
    hours = last["cost/device_hours"] + 0.004
    usd = None if usd_per_h is None else hours * usd_per_h
    buckets = {"goodput": 0.83, "validation": 0.04, "startup": 0.06, "data": 0.01, "checkpoint": 0.02,
               "lost_work": 0.015, "restart": 0.0}
    buckets = {key: share * hours * 3600 for key, share in buckets.items()}
    buckets["idle"] = hours * 3600 - math.fsum(buckets.values())
    return {
        "status": "completed", "steps": last["step"], "tokens": last["tokens/total"], "attempts": 1, "name": name,
        "loss": {"train": last["train/loss"], "validation": last["validation/loss"]},
        "bits_per_byte": {"validation": last["validation/bits_per_byte"], "bigram": 3.62, "gzip": 2.71},
        "tokens_per_s": 9600.0, "mfu": 0.41, "device_hours": hours, "usd_total": usd,
        "usd_per_million_tokens": None if usd is None else usd / last["tokens/total"] * 1e6, "buckets_s": buckets,
        "dense": {key: {"parameters": parameters, "flops": 1e12, "device_hours": last[f"cost/dense_{key}_device_hours"],
                        "usd": last[f"cost/dense_{key}_usd"]}
                  for key, parameters in (("equal_total", 3_400_000), ("equal_active", 1_200_000))},
        "predicted": {"step_time_s": 0.40}, "run_dir": "x",
        "measured": {"step_time_s": 0.43, "peak_flops_per_s": 5.5e10, "peak_source": "measured GEMM",
                     "model_flops_total": 1e12, "mfu_convention": MFU_CONVENTION},
        "model": {"name": "tiny", "parameters": 3_400_000, "active_parameters": 1_200_000},
        "layout": {"pp": 2, "dp": 2, "ep": 2, "schedule": "1f1b", "microbatches": 2},
        "hardware": {"name": "cpu_2core", "device": "cpu", "devices": 4, "usd_per_h": usd_per_h, "market": "on_demand",
                     "source": "a price list", "date": "2026-11-01"},
    }


@pytest.fixture
def write_run(tmp_path):
    """Write a run directory; `summary=False` is one that was killed."""
    def write(name="tiny", *, steps=200, summary=True, usd_per_h=0.05, **kwargs):
        run = tmp_path / name
        run.mkdir()
        rows = rows_of(steps, usd_per_h=usd_per_h, **kwargs)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        events = [("run_started", None, None), ("placed", None, None), ("attempt_started", 0, None),
                  ("validated", 50, None), ("checkpoint_saved", 100, None),
                  ("step_skipped", 120, "non-finite loss <nan> or gradient norm inf"), ("run_finished", steps, None)]
        (run / "events.jsonl").write_text("".join(
            json.dumps({"time": 1e9 + 7.5 * i, "kind": kind, "rank": 0, "node": 0, "step": step, "cause": cause}) + "\n"
            for i, (kind, step, cause) in enumerate(events)))
        (run / "config.yaml").write_text(f"run:\n  name: {name}\nseed: 0\ntracker:\n  project: </pre><b>x</b>\n")
        if summary:
            (run / "summary.json").write_text(json.dumps(summary_of(rows, name=name, usd_per_h=usd_per_h)))
        return str(run)
    return write


class Outline(HTMLParser):
    """Checks that tags nest, and collects what a browser would load."""

    VOID = {"meta", "br", "line", "rect", "circle", "path", "i"}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.titles = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href")]
        self.titles += tag == "title"
        if tag not in self.VOID - {"i"} and tag != "i":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag != "i" and tag not in self.VOID:
            assert self.open.pop() == tag


def read_page(path):
    page = open(path).read()
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return page, outline


def test_the_page_is_one_file_that_needs_no_network_and_runs_no_script(write_run):
    page, outline = read_page(write_report([write_run()]))
    assert outline.links == []
    assert not re.search(r"https?://|@import|url\((?!#)|<script", page)
    assert "prefers-color-scheme: dark" in page


def test_the_page_shows_the_headline_figures_and_every_plot(write_run):
    page, outline = read_page(write_report([write_run()]))
    for text in ("Validation loss", "bigram 3.620", "gzip 2.710", "41.0%", "measured GEMM", "Device-hours",
                 "dense, equal total parameters", "dense, equal active parameters", "Expert load", "goodput",
                 "layers.3", "mtp.0", "Predicted and measured", "a price list", "half the score matrix"):
        assert text in page, text
    assert page.count("<svg") == 8
    assert outline.titles > 100, "hovering shows numbers"


def test_each_of_several_runs_has_its_own_bar_and_table_of_time(write_run):
    page = open(write_report([write_run("a"), write_run("b"), write_run("c")])).read()
    part = page[page.index("Where the time went") :].split("</figure>")[0]
    heads = re.findall(r"<tr><th>bucket</th>.*?</tr>", part)
    assert len(heads) == 3 and all(head.count("<th") == 5 for head in heads)
    assert [part.index(f'bar-label">{name}<') for name in "abc"] == sorted(part.index(f'bar-label">{name}<')
                                                                           for name in "abc")


def brightness(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return sum(weight * (part / 12.92 if part <= 0.04 else ((part + 0.055) / 1.055) ** 2.4)
               for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_labels_in_a_bar_stand_out_from_it_by_day_and_by_night():
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in STYLE.split("prefers-color-scheme: dark"))
    rules = re.findall(r"([^{};]+) \{ fill: ([^;]+); \}", STYLE)
    ink = {name: value for names, value in rules for name in re.findall(r"\.(b\d) \+ \.inbar", names)}
    for colours in (light, light | dark):
        for name in (f"b{i}" for i in range(9)):
            on = ink.get(name, "#fff")
            on = colours.get(on.removeprefix("var(--").removesuffix(")"), on)
            low, high = sorted((brightness(colours[name]), brightness(on)))
            assert (high + 0.05) / (low + 0.05) >= 3, (name, colours[name], on)


def test_events_do_not_break_their_times_and_tell_sizes(write_run):
    run = write_run()
    event = {"time": 1e9 + 99, "kind": "checkpoint_saved", "rank": 0, "node": 0, "step": 200, "bytes": 27421416}
    with open(pathlib.Path(run) / "events.jsonl", "a") as file:
        file.write(json.dumps(event) + "\n")
    page = open(write_report([run])).read()
    assert '<span class="named">+99.0 s</span>' in page and "bytes 27.42M" in page


def test_what_was_measured_is_of_one_window_that_the_table_names(write_run):
    run = write_run()
    summary = json.loads((pathlib.Path(run) / "summary.json").read_text())
    summary["predicted"] |= {"tokens_per_s": 10_240.0, "steps_usd": 0.004}
    summary["measured"] |= {"tokens_per_s": 9525.0, "steps_usd": 0.005, "median_of_steps": 80, "since_step": 119}
    (pathlib.Path(run) / "summary.json").write_text(json.dumps(summary))
    page = open(write_report([run])).read()
    assert "medians of 80 kept steps since step 119" in page and ">9,525<" in page and ">0.005<" in page
    assert "tokens/s, mean of kept steps since step 119" in page and "own MFU since step 119" in page


def test_every_drawing_is_well_formed_xml(write_run):
    page = open(write_report([write_run(steps=1500, experts=8)])).read()
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ElementTree.fromstring(svg)
    assert len(page) < 1_000_000


def test_what_a_run_directory_says_cannot_become_markup(write_run):
    page, _ = read_page(write_report([write_run()]))
    assert "<b>x</b>" not in page and "&lt;/pre&gt;" in page and "loss &lt;nan&gt;" in page


def test_a_markdown_twin_is_written_beside_the_page(write_run):
    run = write_run()
    assert write_report([run]) == f"{run}/report.html"
    text = open(f"{run}/report.md").read()
    assert "| Validation loss |" in text and "| goodput |" in text and "| 83.0% |" in text


def test_an_unknown_price_is_never_shown_as_a_number(write_run):
    page, _ = read_page(write_report([write_run(usd_per_h=None)]))
    assert ">unknown<" in page and "the price is unknown" in page
    assert not re.search(r"\$\d", page)


def test_a_run_that_has_no_step_does_not_hide_what_the_others_cost(write_run, tmp_path):
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "config.yaml").write_text("seed: 0\n")
    page, _ = read_page(write_report([write_run(), str(tmp_path / "failed")]))
    assert "dollars for the tokens so far" in page and "the price is unknown" not in page


@pytest.mark.parametrize("summary", [True, False])
def test_a_dense_run_is_not_held_beside_itself(write_run, summary):
    run = pathlib.Path(write_run(summary=summary))
    for file in run.glob("*.json*"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            for key in [key for key in line if key.startswith("cost/dense_equal_total")]:
                line[key] = line[key.replace("total", "active")]
            if "dense" in line:
                line["dense"]["equal_total"] = line["dense"]["equal_active"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, _ = read_page(write_report([str(run)]))
    assert "dense, equal" not in page and "dense models" not in page and "the model is dense" in page


@pytest.mark.parametrize("left", ["metrics.jsonl", "config.yaml", "events.jsonl"])
def test_an_unfinished_run_still_gives_a_page(write_run, left):
    run = write_run(summary=False)
    for file in pathlib.Path(run).iterdir():
        if file.name != left:
            file.unlink()
    page, _ = read_page(write_report([run]))
    assert "unfinished" in page


def test_a_run_that_goes_on_is_not_told_by_the_summary_of_an_attempt_before(write_run):
    run = pathlib.Path(write_run(steps=60))
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(before | {"steps": 12, "usd_total": 0.001}))
    with open(run / "events.jsonl", "a") as file:
        for kind, status, steps in (("attempt_claimed", "unfinished", 60), ("run_failed", "completed", 12)):
            file.write(json.dumps({"kind": kind}) + "\n")
            file.flush()
            found = read_run(str(run))
            assert (found.summary["status"], found.summary["steps"]) == (status, steps)
            if status == "unfinished":
                page, _ = read_page(write_report([str(run)]))
                assert "summary.json is of an earlier attempt" in page and "-, - active" not in page
                assert found.summary["usd_total"] == found.rows[-1]["cost/usd_total"]
                assert found.summary["mfu"] == pytest.approx(0.41) and found.summary["hardware"]["devices"] == 1


def test_a_row_torn_by_a_crash_is_left_out(write_run):
    run = write_run(summary=False, steps=20)
    with open(f"{run}/metrics.jsonl", "a") as file:
        file.write('{"step": 21, "train/lo')
    assert read_run(run).summary["steps"] == 20
    write_report([run])


@pytest.mark.parametrize("content", ["", '{"status": "comp', "[]"])
def test_a_damaged_summary_is_said_and_the_rows_are_summed_up(write_run, content):
    run = write_run(steps=20)
    pathlib.Path(run, "summary.json").write_text(content)
    page, _ = read_page(write_report([run]))
    said = "summary.json is damaged: summed up from the rows"
    assert said in page and said in pathlib.Path(run, "report.md").read_text() and "unfinished" in page
    assert read_run(run).summary["steps"] == 20


def test_several_runs_are_compared_on_one_page(write_run, tmp_path):
    runs = [write_run("moe"), write_run("dense", seed=1, loss_to=1.8), write_run("killed", summary=False, steps=90)]
    page, _ = read_page(write_report(runs, out=str(tmp_path / "all.html")))
    for text in ("train, moe", "train, dense", "validation, killed", 'bar-label">moe<', 'bar-label">dense<'):
        assert text in page, text
    assert (tmp_path / "all.md").exists()


def test_a_run_that_is_named_twice_is_one_run(write_run):
    run = write_run()
    alone = pathlib.Path(write_report([run])).read_text()
    assert pathlib.Path(write_report([run, f"{run}/", run])).read_text() == alone


@pytest.mark.parametrize("out", ["", "/nonexistent/a.html"])
def test_a_report_makes_no_folder(write_run, out):
    with pytest.raises(BadRequest, match=f"out={out}: cannot be written; name a file in a folder that exists"):
        write_report([write_run()], out=out)
    assert not pathlib.Path("/nonexistent").exists()


@pytest.mark.parametrize("out, use", [("x.pdf", "x.pdf.html"), ("", "/report.html")])
def test_a_report_goes_where_it_is_sent_or_nowhere(write_run, tmp_path, out, use):
    with pytest.raises(BadRequest, match=f"must be the name of a file that ends in .html; use out={tmp_path}/?{use}$"):
        write_report([write_run()], out=f"{tmp_path}/{out}".rstrip("/"))
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.parent.glob(f"{tmp_path.name}.html"))


def test_no_directory_and_a_wrong_one_are_told_apart(tmp_path):
    with pytest.raises(BadRequest, match="no run directory was given"):
        write_report([])
    with pytest.raises(BadRequest, match=r"nowhere.*is not a run directory"):
        write_report([str(tmp_path / "nowhere")])


def test_what_saves_and_failures_cost_stands_beside_the_optimum(write_run):
    path = pathlib.Path(write_run())
    interval = {"every": "auto", "saves": 4, "save_cost_s": 0.52, "mtbf_s": 10_800.0, "faults": 1,
                "mean_interval_s": 150.0, "optimal_interval_s": 105.7,
                "predicted_loss": {"checkpoint": 0.0049, "lost_work": 0.0049, "restart": 0.0017}}
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"checkpoint_interval": interval}))
    assert {s.bucket: s.at_optimum for s in shares(read_run(str(path)).summary) if s.at_optimum} == {
        "checkpoint": 0.0049, "lost_work": 0.0049, "restart": 0.0017}
    page = pathlib.Path(write_report([str(path)])).read_text()
    for text in ("predicted at the optimal interval", "0.49%", "every 2.5 min of training (checkpoint.every: auto)",
                 "saves that cost 0.52 s and a failure in 3.0 h the optimum is every 105.7 s"):
        assert text in page and text in (path / "report.md").read_text()


def test_buckets_keep_their_order_and_sum_to_one(write_run):
    found = shares(read_run(write_run()).summary)
    assert [s.bucket for s in found][:2] == ["goodput", "validation"]
    assert "restart" not in [s.bucket for s in found], "an empty bucket is left out"
    assert math.fsum(s.share for s in found) == pytest.approx(1.0)


def test_expert_load_is_over_the_layers_mean(write_run):
    loads, names, steps = expert_load(read_run(write_run()))
    assert names == list(LAYERS) and steps == 50
    assert all(sum(layer) / len(layer) == pytest.approx(1.0) for layer in loads)


@pytest.mark.parametrize("low,high", [(0, 1), (1.62, 5.49), (-3, 3), (0, 3.2e-7), (1e9, 7e12), (4.0, 4.0), (0, 0)])
def test_ticks_are_round_and_enclose_the_data(low, high):
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 14
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6


def test_a_chart_of_nothing_says_so():
    assert "no data" in line_chart([Series("a", [1, 2], [None, float("nan")])], x_label="x", y_label="y")
    assert "<svg" in line_chart([Series("a", [1], [2.0])], x_label="x", y_label="y")


@pytest.mark.parametrize("last, anchor", [(3.73, "start"), (2.5, "end"), (5.5, "end")])
def test_a_levels_label_stands_where_no_curve_ends(last, anchor):
    drawn = line_chart([Series("a", [5, 40], [6.0, last], style="points")], x_label="x", y_label="y",
                       levels=[("bigram", 3.58)])
    assert re.search(r'class="level-label"[^>]*text-anchor="(\w+)"', drawn)[1] == anchor


def test_spikes_survive_thinning():
    ys = [1.0] * 5000
    ys[1234] = 9.0
    drawn = line_chart([Series("a", list(range(5000)), ys)], x_label="x", y_label="y")
    path = re.search(r'<path class="line line c0" d="M([^"]+)"', drawn).group(1).split("L")
    assert len(path) <= 810 and len({point.split()[1] for point in path}) == 2


def test_a_large_heatmap_stays_small():
    assert len(load_heatmap([[1.0 + (i * j % 7) / 3 for j in range(256)] for i in range(58)],
                            [f"layers.{i}" for i in range(58)])) < 500_000


def test_numbers_read_well():
    assert [format_number(x) for x in (None, 0, 0.5, 12.345, 4096, 409_600, 2.5e9, 671e9, 14.8e12, 3e-7)] == [
        "-", "0", "0.5", "12.35", "4,096", "409.6K", "2.5B", "671B", "14.8T", "3.00e-07"]


def test_smoothing_is_a_trailing_mean_over_known_values():
    assert smoothed([1.0, None, 3.0, 5.0], 2) == [1.0, 1.0, 2.0, 4.0]
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
