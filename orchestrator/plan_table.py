"""A plan as it is printed: the best layouts and why each is there, memory, both bills, what dense models would take."""

import shlex
from datetime import date

from orchestrator.plan.hardware import GIVEN, age_days
from orchestrator.plan.money import ITSELF
from orchestrator.plan.search import Plan
from orchestrator.plan_format import console as console_of
from orchestrator.plan_format import days, dollars, first_runnable, usd_range
from orchestrator.report_plots import format_number

SHOWN = 8
USUAL = {"tp": 1, "cp": 1, "zero": 1, "recompute": "none", "dtype": "bf16"}
BUDGETS_SHOWN = ("GPT-4", "Llama 3.1 405B", "DeepSeek-V3")
BAR = 36
OLD_DAYS = 365
SEEN_S = 0.005
"""A difference of steps that two digits show."""


def print_plan(plan: Plan, data: dict) -> None:
    from rich.markup import escape

    request, console = plan.request, console_of()
    console.print(f"{escape(request.model.name)} on {request.devices:,} x {escape(request.hardware.name)}, "
                  f"{format_number(request.tokens)} tokens, {request.batch_size:,} sequences of {request.seq_len:,} a "
                  f"step, {request.dtype}, stack {request.stack.name}{escape(_routed(request))}. "
                  "[bold]All figures are predicted.[/bold]")
    console.print(f"{plan.considered:,} layouts considered, {len(plan.candidates):,} kept, with days and USD of the "
                  "steady bill; the rest is refused at the end\n")
    if plan.candidates:
        table = grid("<layout", "step s", "idle", "GiB", "MFU", "days", "USD", "<why it is here")
        for row in data["candidates"][:SHOWN]:
            table.add_row(layout_words(row["layout"]),
                          f"{row['step_time_s']:.2f}", f"{row['bubble_fraction']:.0%}",
                          f"{row['memory_gib']['total']:.0f}", f"{row['mfu']:.1%}", days(row["days"]),
                          dollars(row["usd_total"]), row["why"])
        console.print(table)
        _print_step(console, data)
        _print_bills(console, data["bill"])
        _print_dense(console, data)
        _print_train(console, data)
    for refused in _telling(plan):
        console.print(f"refused   {refused}")


def _routed(request) -> str:
    return f", routing {request.routing.name}" if request.model.n_routed_experts else ""


def reasons(rows: list[dict]) -> list[str]:
    """What each layout wins, and the part of its step on which it loses most to the fastest; rows are fastest first."""
    best = rows[0]
    wins = [("least memory", min(rows, key=lambda row: row["memory_gib"]["total"])),
            ("least idle", min(rows, key=lambda row: row["bubble_fraction"])),
            ("fastest that `train` runs", first_runnable(rows))]
    found = []
    for row in rows:
        won = ["fastest"] * (row is best) + [name for name, winner in wins if winner is row]
        if row is not best:
            part = max(row["parts_s"], key=lambda name: row["parts_s"][name] - best["parts_s"].get(name, 0.0))
            loss = row["parts_s"][part] - best["parts_s"].get(part, 0.0)
            won.append(f"{loss:+.2f} s {part}" if loss >= SEEN_S else "as fast to 0.01 s")
        elif len(rows) > 1:
            second = rows[1]["parts_s"]
            part = max(second, key=lambda name: second[name] - row["parts_s"].get(name, 0.0))
            gain = second[part] - row["parts_s"].get(part, 0.0)
            won += [f"{gain:.2f} s less {part} than the next"] * (gain >= SEEN_S)
        found.append(", ".join(won))
    return found


def price_words(price: dict) -> str:
    """Price, market, source and date; one older than a year says how old it is."""
    if price["usd_per_h"] is None:
        return "a price that is unknown; set hardware.usd_per_h to see dollars"
    age = age_days(price["date"], date.today())
    old = f"; OLD: {age:,} days" if (age or 0) > OLD_DAYS else ""
    market = price["market"].replace("_", " ")
    day = price["date"] or ("" if price["source"] == GIVEN else "no date")
    return f"${price['usd_per_h']:.2f} a GPU-hour, {market} ({price['source']}{', ' * bool(day)}{day}{old})"


def band_words(bill: dict) -> str:
    """How the step was predicted, and where eight of ten published runs of its kind lay."""
    usd = "" if bill["band_usd"] is None else " (P10-P90 {} to {})".format(*map(dollars, bill["band_usd"]))
    return f"{bill['made']}{usd}"


def mfu_words(mfu: float, data: dict) -> str:
    """MFU is over the bf16 peak, which products in FP8 may pass."""
    return f"{mfu:.1%} MFU" + " of the bf16 peak" * (data["best"]["layout"].get("dtype", "bf16") != "bf16")


def mfu_line(data: dict) -> str:
    """What MFU means here, and the best layout's by the other conventions in print."""
    others = "; ".join(f"{value:.1%} of the {name}" for name, value in data["mfu_conventions"].items()
                       if value is not None)
    peak = "bf16 peak" if data["hardware"]["device"] == "cuda" else "the calibrating run's GEMM for a peak"
    return f"MFU       {peak}, causal attention, MTP modules counted, recompute not; without MTP modules: {others}"


def _print_step(console, data: dict) -> None:
    best, have = data["best"], data["hardware"]["memory_gib"]
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in best["parts_s"].items())
    whose = "; pipeline and bubble are the busiest rank's, idle above is all ranks' share"
    console.print(f"\nstep      {parts} s{whose * (best['layout']['pp'] > 1)}")
    console.print(mfu_line(data), markup=False)
    used = 0.0
    for name, size in best["memory_gib"].items():
        start = 0.0 if name == "total" else used
        used = size if name == "total" else used + size
        begin, end = (min(BAR, round(edge / have * BAR)) for edge in (start, used))
        bar = " " * begin + "\u2588" * (end - begin) + "\u2591" * (BAR - end) * (name == "total")
        note = f"  of {have:.0f} GiB, fullest rank" if name == "total" else ""
        console.print(f"{'memory' if start == 0 and name != 'total' else '':10}{name:12}{size:7.1f}  {bar}{note}")


def _print_bills(console, bill: dict) -> None:
    price, steady, expected = bill["price"], bill["steady"], bill["expected"]
    console.print(f"\nat {price_words(price)}", markup=False)
    table = grid("<bill", "GPU-hours", "days", "USD", "<what it counts")
    own = {term["name"]: term for term in expected["terms"]}
    table.add_row("steady", *_sums(steady), f"step time x steps, as DeepSeek's published bill; {band_words(bill)}")
    for name in [term["name"] for term in steady["terms"]][1:]:
        table.add_row(f"  of it {name}", f"{own[name]['gpu_hours']:,.0f}", "", dollars(own[name]["usd"]),
                      own[name]["equation"])
    steady_names = {term["name"] for term in steady["terms"]}
    for term in expected["terms"]:
        if term["name"] not in steady_names:
            table.add_row(f"  + {term['name']}", f"{term['gpu_hours']:,.0f}", "", dollars(term["usd"]), term["source"])
    often = "" if bill["mtbf_h"] is None else (f", a failure every {bill['mtbf_h']:,.1f} h, a checkpoint every "
                                               f"{bill['checkpoint_every_s'] / 60:.0f} min")
    table.add_row("expected", *_sums(expected),
                  f"production factor {bill['production_factor']:.3f}, goodput {bill['goodput']:.1%}{often}")
    console.print(table)
    if bill["energy_kwh"] is not None:
        console.print(f"energy    {bill['energy_kwh']:,.0f} kWh at {bill['power_kw']:,.0f} kW")
    if price["market"] == "spot" and not bill["terms"]["preemptions"]:
        console.print("          spot: no preemption is charged, since no rate is in print; give preemptions=N per "
                      "1,000 node-days")


def _sums(side: dict) -> list[str]:
    return [f"{side['gpu_hours']:,.0f}", days(side["days"]), dollars(side["usd"])]


def _print_dense(console, data: dict) -> None:
    table = grid("<beside it, steady", "parameters", "GPU-hours", "USD", "x", "<how")
    steady = data["bill"]["steady"]["terms"][0]

    def line(name: str, low: dict, high: dict, how: str, parameters: str = "") -> None:
        both = [low] if low is high else [low, high]
        table.add_row(name, parameters, " - ".join(f"{each['device_hours']:,.0f}" for each in both),
                      " - ".join(dollars(each["usd"]) for each in both),
                      " - ".join(f"{each['device_hours'] / steady['gpu_hours']:.2f}" for each in both), how)

    for key in ("equal_active", "equal_total") if data["dense"]["equal_active"]["how"] != ITSELF else ():
        twin = data["dense"][key]
        why = f" (an upper bound; {twin['refused']})" if "refused" in twin else ""
        how = f"{twin['how']}, {twin['mfu']:.1%}{why}" if why else f"{twin['how']}, {mfu_words(twin['mfu'], data)}"
        line(f"dense, {key.replace('_', ' ')}", twin, twin, how, format_number(twin["parameters"]))
    loss = data["dense"].get("equal_loss")
    if loss:
        outside = "" if loss["inside_fits"] else "[bold] outside their fits[/bold]"
        line("dense, equal loss", loss["low"], loss["high"], "range of " + " and ".join(
            law["law"] for law in loss["laws"]) + outside + f"; {between_words(loss)}")
        found = loss["measured"]
        if found:
            line("dense, equal loss, measured", found["low"], found["high"], found["note"])
    console.print()
    if table.row_count:
        console.print(table)
    if loss and "measured_not" in loss:
        console.print(f"measured  nothing: {loss['measured_not']}", markup=False)
    table = grid("<published", "<kind", "GPU-hours", "USD", "<source")
    for row in data["published"]:
        if row["name"] in BUDGETS_SHOWN:
            usd = usd_range(sorted(row["usd"])) if "usd" in row else ""
            hours = f"{row['gpu_hours']:,} {row['device']}" if "gpu_hours" in row else ""
            table.add_row(row["name"], row["kind"], hours, usd, row["source"])
    console.print()
    console.print(table)


def between_words(loss: dict) -> str:
    """At which MFU a dense model of equal loss is priced."""
    edges = dict.fromkeys(f"{loss[side]['mfu']:.1%}" for side in ("low", "high"))
    return f"at {' to '.join(edges)} MFU, between the twins' by log FLOPs"


def _print_train(console, data: dict) -> None:
    runs = first_runnable(data["candidates"])
    best = data["candidates"][0]
    if runs is None:
        console.print(f"\ntrain     cannot run what fits: {best['train_not']}")
    else:
        aside = "" if runs is best else f"  ({runs['step_time_s']:.2f} s a step; of the fastest: {best['train_not']})"
        console.print(f"\ntrain     {shlex.join(runs['train'])}{aside}", markup=False)


def _telling(plan: Plan) -> list[str]:
    """One refusal of each kind, the commonest first."""
    lines = []
    for items in sorted(plan.kinds_refused().values(), key=lambda items: -sum(item.number for item in items))[:5]:
        number = sum(item.number for item in items)
        lines.append(f"{number:,} layouts, such as {layout_words(items[-1].layout)}: {items[-1].reason}")
    return lines


def layout_words(layout: dict) -> str:
    """A layout in a line; degrees of 1 and what is as usual are not said."""
    short = {"microbatches": "m", "stages_per_rank": "stages"}
    return " ".join(str(value) if key == "schedule" else f"{short.get(key, key)}={value}"
                    for key, value in layout.items()
                    if USUAL.get(key) != value and not (key == "stages_per_rank" and value <= 2))


def grid(*headers: str):
    """A table without lines; a header that starts with < is left-aligned; only the last column may wrap."""
    from rich.table import Table

    table = Table(*(header.lstrip("<") for header in headers), box=None, pad_edge=False)
    for column, header in zip(table.columns, headers, strict=True):
        column.no_wrap, column.justify = header != headers[-1], "left" if header.startswith("<") else "right"
    return table
