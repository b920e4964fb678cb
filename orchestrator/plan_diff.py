"""`sparing plan diff A B`: what a change of configuration does to days and dollars, by term, from two plan.json."""

import json
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import BadRequest
from orchestrator.plan_format import SEEN_S, dollars
from orchestrator.plan_format import console as console_of
from orchestrator.plan_request import TERMS, option_of
from orchestrator.report_plots import format_number

SMALL = 0.1
UNTOLD = ("match", "reserved", "spot", "source", "date")
REQUEST = {"model": "model", "devices": "gpus", "tokens": "tokens", "seq_len": "train.seq_len",
           "batch_size": "train.batch_size", "dtype": "dtype", "stack": "stack", "routing": "routing"}
"""What was asked for, by the key that asks for it."""


def plan_diff(a: str, b: str) -> None:
    """Print it."""
    print_diff(_read(a), _read(b), names=[a, b])


def difference(a: dict, b: dict) -> dict:
    """`changed` (key of the command: before, after), and `step`, `memory`, `bill`: rows of (term, before, after), in
    seconds, GiB and (GPU-hours, USD). The terms of a bill sum to its total, so the rows sum to the change."""
    changed = {asked: (a.get(key), b.get(key)) for key, asked in REQUEST.items() if a.get(key) != b.get(key)}
    changed |= _unequal("hardware.{}".format, *({key: value for key, value in plan["hardware"].items()
                                                 if key not in UNTOLD} for plan in (a, b)))
    changed |= _unequal(option_of, a["best"]["layout"], b["best"]["layout"])
    changed |= _unequal(_term_key, a["bill"]["terms"], b["bill"]["terms"])
    return {"changed": changed,
            "step": _paired(a["best"]["parts_s"] | {"step": a["best"]["step_time_s"]},
                            b["best"]["parts_s"] | {"step": b["best"]["step_time_s"]}, 0.0),
            "memory": _paired(a["best"]["memory_gib"], b["best"]["memory_gib"], 0.0),
            "bill": _paired(_bill(a["bill"]), _bill(b["bill"]), (0.0, 0.0))}


def print_diff(a: dict, b: dict, names: list[str]) -> None:
    from rich.table import Table

    found, console = difference(a, b), console_of(width=120)
    for key, (before, after) in found["changed"].items():
        note = " (multiples of each layout's dp x microbatches)" * (key == "train.validate_sequences")
        console.print(f"changed   {key}: {_told(before)} -> {_told(after)}{note}", markup=False)
    if not found["changed"] and a["bill"] == b["bill"]:
        console.print("no difference")
        return
    table = Table("", names[0], names[1], "change", "", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for title, unit in (("step", "s"), ("memory", "GiB")):
        for name, before, after in found[title]:
            if before or after:
                table.add_row(f"{title}, {name}" if name not in ("step", "total") else f"[bold]{title}, {unit}[/bold]",
                              *_numbers(before, after), _share(before, after))
        table.add_section()
    for name, (_, cost_before), (_, cost_after) in found["bill"]:
        bold = name.endswith(" bill")
        table.add_row(f"[bold]{name}[/bold]" if bold else name, dollars(cost_before), dollars(cost_after),
                      _signed(cost_before, cost_after), _share(cost_before, cost_after))
    for name, usd in by_cause(a["bill"], b["bill"]).items():
        table.add_row(f"  of it by {name}", "", "", _signed(0.0, usd))
    for side in ("steady", "expected"):
        before, after = a["bill"][side]["days"], b["bill"][side]["days"]
        table.add_row(f"[bold]{side} days[/bold]", *_numbers(before, after), _share(before, after))
    console.print(table)
    console.print(headline(a, b))


def by_cause(a: dict, b: dict) -> dict[str, float]:
    """The change of the expected bill as that of GPU-hours at the old price and of the price for the new hours; empty
    where a price is unknown."""
    old, new = a["price"]["usd_per_h"], b["price"]["usd_per_h"]
    if old is None or new is None:
        return {}
    before, after = a["expected"]["gpu_hours"], b["expected"]["gpu_hours"]
    return {"GPU-hours": (after - before) * old, "price": (new - old) * after}


def headline(a: dict, b: dict) -> str:
    """One line for a pull request: +$41,000 and +1.2 days, most of it where."""
    days = b["bill"]["expected"]["days"] - a["bill"]["expected"]["days"]
    usd = _signed(a["bill"]["expected"]["usd"], b["bill"]["expected"]["usd"])
    parts = [(name, after - before) for name, before, after in difference(a, b)["step"] if name != "step"]
    name, change = max(parts, key=lambda part: abs(part[1]))
    most = f"; of a step, {name} changes most ({_change(change)} s)" if abs(change) >= SEEN_S else ""
    return f"expected  {usd} and {_change(days)} days{most}"


def _bill(bill: dict) -> dict[str, tuple[float, float | None]]:
    steady = bill["steady"]["terms"]
    known = {term["name"] for term in steady}
    rows = {term["name"]: (term["gpu_hours"], term["usd"]) for term in steady}
    rows["steady bill"] = bill["steady"]["gpu_hours"], bill["steady"]["usd"]
    rows |= {term["name"]: (term["gpu_hours"], term["usd"]) for term in bill["expected"]["terms"]
             if term["name"] not in known}
    return rows | {"expected bill": (bill["expected"]["gpu_hours"], bill["expected"]["usd"])}


def _paired(a: dict, b: dict, absent) -> list[tuple]:
    return [(name, a.get(name, absent), b.get(name, absent)) for name in dict.fromkeys([*a, *b])]


def _unequal(key: Callable[[str], str], a: dict, b: dict) -> dict[str, tuple]:
    return {key(name): (before, after) for name, before, after in _paired(a, b, None) if before != after}


def _term_key(name: str) -> str:
    """What a term of the bill is set by."""
    return name if name in TERMS else f"train.{name.replace('ramp_steps', 'batch_ramp_steps')}"


def _told(value) -> str:
    """Whole numbers are not rounded."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() else format_number(value)


def _numbers(before: float, after: float) -> list[str]:
    """Both and the change."""
    return [_number(before), _number(after), _change(after - before)]


def _number(value: float) -> str:
    """In two decimals, or in three digits where these would show nothing."""
    return f"{value:.2f}" if value >= SMALL or not value else f"{value:.3g}"


def _change(value: float) -> str:
    return f"{'-' if value < 0 else '+'}{_number(abs(value))}"


def _signed(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "unknown"
    return f"{'-' if after < before else '+'}{dollars(abs(after - before))}"


def _share(before: float | None, after: float | None) -> str:
    return f"{after / before - 1:+.1%}" if before and after is not None else ""


def _read(path: str) -> dict:
    try:
        data = json.loads((Path(path) / "plan.json" if Path(path).is_dir() else Path(path)).read_text())
        if isinstance(data, list):
            raise BadRequest(f"plan diff: {path}: holds several plans, as `sparing plan -m` writes them; give a file "
                             "of one, written without -m")
        if data["best"] is None:
            raise BadRequest(f"plan diff: {path}: is a plan in which no layout fits; give one with a best layout")
        data["bill"]["terms"]
    except BadRequest:
        raise
    except OSError as error:
        raise BadRequest(f"plan diff: {path}: cannot be read ({error.strerror}); give two files that `sparing plan ... "
                         "out=FILE` wrote, or the directories of runs") from None
    except (ValueError, KeyError, TypeError):
        raise BadRequest(f"plan diff: {path}: is no plan.json of this version; write one with `sparing plan ... "
                         "out=FILE`") from None
    return data
