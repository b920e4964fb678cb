"""`sparing plan -m ...`: what-if over every combination of the values that are separated by commas, in one table."""

import json
from html import escape

from orchestrator.arguments import check_writable, write_file
from orchestrator.compose import combinations
from orchestrator.errors import BadRequest, NotFit
from orchestrator.plan.questions import assumed
from orchestrator.plan_format import console as console_of
from orchestrator.plan_format import days, dollars, usd_range
from orchestrator.plan_offers import price_lines
from orchestrator.plan_plots import cost_chart
from orchestrator.plan_questions import OPTIONS as QUESTIONS
from orchestrator.plan_request import compose_plan, number
from orchestrator.report_plots import format_number
from orchestrator.report_style import document, figure, table
from orchestrator.words import plain

HEAD = ("best layout", "step s", "made", "MFU", "a GPU-hour", "days", "steady", "expected", "dense, equal loss")
NOTE = ("All figures are predicted; made: calibrated on published runs of device and stack, by formula (no stack's), "
        "extrapolated (no device's). Days are of the expected bill. Equal loss: range of two scaling laws, steady; * "
        "is outside their fits.")


def plan_sweep(arguments: list[str]) -> None:
    """Print one row a combination. `out` keeps all plans, a JSON list; `html` is the table with cost against days. Bad
    words are told before anything is planned."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from orchestrator.show_plan import split_words

    fixed, _ = split_words(arguments)
    check_writable(fixed, "out", "html")
    for key in ("explain", *QUESTIONS):
        if key in fixed:
            raise BadRequest(f"{key}={fixed[key]}: goes with one plan, not with -m; leave it out, or plan one of them")
    jobs = combinations([word for word in plain(arguments) if not word.startswith(("out=", "html="))])
    if any("gpus=fit" in words for words in jobs):
        raise BadRequest("gpus=fit: goes with one plan, not with -m; give numbers, or plan one of them")
    for words in jobs:
        compose_plan(split_words(words)[1])
    varied = [[word for word in words if any(word not in other for other in jobs)] for words in jobs]
    log = Console(stderr=True)
    shown = track(jobs, "planning", console=log, transient=True, disable=not log.is_terminal)
    results = [_one(words) for words in shown]
    console = console_of(markup=False)
    head = [*(word.split("=", 1)[0] for word in varied[0]), *HEAD]
    rows = [[*map(_shown, words), *_cells(result)]
            for words, result in zip(varied, results, strict=True)]
    printed = Table(*head, box=None, pad_edge=False)
    for column in printed.columns[len(varied[0]) + 1 :]:
        column.justify = "right"
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
    prices = price_lines([(each["hardware"]["name"], each["bill"]["price"]) for each in results if each.get("best")])
    console.print("\n".join([NOTE, *(["A GPU-hour:", *prices] if prices else [])]))
    if "out" in fixed:
        kept = [{"words": words, **result} for words, result in zip(jobs, results, strict=True)]
        write_file(fixed, "out", json.dumps(kept, indent=1) + "\n")
    if "html" in fixed:
        write_file(fixed, "html", sweep_page(head, rows, results, prices))
    if not any(result.get("best") for result in results):
        raise NotFit(f"none of the {len(results)} combinations can be planned; the last column of each says why")


def sweep_page(head: list[str], rows: list[list[str]], results: list[dict], prices: list[str]) -> str:
    """Cost against days, and against GPUs where their number differs, a line for each model on each kind of GPU, above
    the table and what a GPU-hour was taken to cost."""
    priced = [each for each in results if each.get("best") and each["bill"]["expected"]["usd"] is not None]
    sizes = [each["devices"] for each in priced]
    points, by_devices = ([(f"{each['model']}, {each['hardware']['name']}", x, each["bill"]["expected"]["usd"])
                           for each, x in zip(priced, xs, strict=True)]
                          for xs in ([each["bill"]["expected"]["days"] for each in priced], sizes))
    charts = [figure(f"Cost against {what}", "expected bill of every combination", cost_chart(found, x_label=what))
              for what, found in (("days", points), ("GPUs", by_devices)) if what == "days" or len(set(sizes)) > 1]
    cells = [[*map(escape, row), *[""] * (len(head) - len(row))] for row in rows]
    return document("What if - Sparing plan", [
        '<header><h1>What if</h1><p class="sub"><span class="status">predicted</span></p></header>',
        '<section class="grid">', *charts, "</section>",
        figure("Every combination", NOTE, table(head, cells, numeric_from=len(head) - len(HEAD) + 1)
               + "".join(f"<p>{escape(line)}</p>" for line in ["A GPU-hour:", *prices] * bool(prices)), wide=True)])


def _shown(word: str) -> str:
    """A value as its column has it: tokens that were given as 1e12 are no 1000000000000.0."""
    key, _, value = word.partition("=")
    return format_number(number(key, value)) if key == "tokens" else value


def _one(words: list[str]) -> dict:
    """plan.json of one combination, or `error`."""
    from orchestrator.show_plan import planned, split_words

    try:
        return planned(*split_words(words))[1]
    except BadRequest as error:
        return {"error": str(error)}


def _cells(result: dict) -> list[str]:
    if "error" in result:
        return [result["error"]]
    best = result["best"]
    if best is None:
        needs = [row["reason"] for row in result["refused"] if row["reason"].startswith("needs ")]
        return [f"no layout fits{f': {needs[0]}' if needs else ''}"]
    layout, bill, loss = best["layout"], result["bill"], result["dense"].get("equal_loss")
    words = f"pp={layout['pp']} dp={layout['dp']} ep={layout['ep']} {layout['schedule']}"
    dense = "-" if loss is None else (usd_range([loss[side]["usd"] for side in ("low", "high")])
                                      + ("" if loss["inside_fits"] else " *"))
    price = dollars(bill["price"]["usd_per_h"]) + " assumed" * assumed(bill["price"]["source"])
    return [words, f"{best['step_time_s']:.2f}", bill["made"], f"{best['mfu']:.1%}", price,
            days(bill["expected"]["days"]), dollars(bill["steady"]["usd"]), dollars(bill["expected"]["usd"]), dense]
