"""`sparing plan -m ...`: what-if over every combination of the values that are separated by commas, in one table."""

import json
from pathlib import Path

from orchestrator.compose import combinations, compose_config
from orchestrator.errors import BadRequest
from orchestrator.plan_table import dollars


def plan_sweep(arguments: list[str]) -> None:
    """Print one row a combination; `out` keeps all plans, a JSON list. Bad words are told before any is planned."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from orchestrator.show_plan import split_words

    fixed, _ = split_words(arguments)
    for key in ("html", "explain"):
        if key in fixed:
            raise BadRequest(f"{key}={fixed[key]}: goes with one plan, not with -m; leave it out, or plan one of them")
    out = fixed.get("out")
    jobs = combinations([word for word in arguments if not word.startswith("out=")])
    for words in jobs:
        compose_config(split_words(words)[1])
    varied = [[word for word in words if any(word not in other for other in jobs)] for words in jobs]
    log = Console(stderr=True)
    shown = track(jobs, "planning", console=log, transient=True, disable=not log.is_terminal)
    results = [_one(words) for words in shown]
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(150, console.width) if console.is_terminal else 150
    table = Table(*[word.split("=", 1)[0] for word in varied[0]], "best layout", "step s", "MFU", "days", "steady",
                  "expected", "dense, equal loss", box=None, pad_edge=False)
    for column in table.columns[len(varied[0]) + 1 :]:
        column.justify = "right"
    for words, result in zip(varied, results, strict=True):
        table.add_row(*[word.split("=", 1)[1] for word in words], *_cells(result))
    console.print(table)
    console.print("All figures are predicted. Equal loss: range of two scaling laws, steady; * is outside their fits.")
    if out:
        kept = [{"words": words, **result} for words, result in zip(jobs, results, strict=True)]
        Path(out).write_text(json.dumps(kept, indent=1) + "\n")
        print(f"wrote     {out}")


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
    dense = "-" if loss is None else (f"{dollars(loss['low']['usd'])} - {dollars(loss['high']['usd'])}"
                                      + ("" if loss["inside_fits"] else " *"))
    return [words, f"{best['step_time_s']:.2f}", f"{best['mfu']:.1%}", f"{bill['expected']['days']:.1f}",
            dollars(bill["steady"]["usd"]), dollars(bill["expected"]["usd"]), dense]
