"""A plan as it is printed: the best layouts and why each is there, memory, both bills, what dense models would take."""

import shlex
from datetime import date

from orchestrator.plan.hardware import GIVEN, age_days
from orchestrator.plan.money import ITSELF
from orchestrator.plan.search import PARTICULAR, Plan
from orchestrator.plan_format import SEEN_S, days, dollars, first_runnable, gib, hours, train_note, usd_range
from orchestrator.plan_format import console as console_of
from orchestrator.report_plots import format_number

SHOWN = 8
USUAL = {"tp": 1, "cp": 1, "zero": 1, "recompute": "none", "dtype": "bf16"}
BUDGETS_SHOWN = ("GPT-4", "Llama 3.1 405B", "DeepSeek-V3")
BAR = 36
OLD_DAYS = 365
BESIDE_BAR = 72
SEEN_GIB = 0.005
"""What two digits show."""


def print_plan(plan: Plan, data: dict) -> None:
    from rich.markup import escape

    request, console = plan.request, console_of()
    console.print(f"{escape(request.model.name)} on {request.devices:,} x {escape(request.hardware.name)}, "
                  f"{format_number(request.tokens)} tokens, {request.batch_size:,} sequences of {request.seq_len:,} a "
                  f"step, {request.computes_in}, stack {request.stack.name}{escape(_routed(request))}. "
                  "[bold]All figures are predicted.[/bold]")
    rows, runs = data["candidates"][:SHOWN], first_runnable(data["candidates"])
    rows += [runs] * (runs is not None and runs not in rows)
    console.print(f"{plan.considered:,} layouts considered, {len(plan.candidates):,} kept and {len(rows)} of them "
                  "here, with days and USD of the steady bill; the rest is refused at the end\n")
    if plan.candidates:
        table = grid("<layout", "step s", "idle", "GiB", "MFU", "days", "USD", "<why it is here")
        table.columns[0].min_width = max(len(word) for row in rows for word in layout_words(row["layout"]).split())
        for row in rows:
            table.add_row(layout_words(row["layout"]),
                          f"{row['step_time_s']:.2f}", f"{row['bubble_fraction']:.0%}",
                          gib(row["memory_gib"]["total"]), f"{row['mfu']:.1%}", days(row["days"]),
                          dollars(row["usd_total"]), row["why"])
        console.print(table)
        _print_step(console, data, mtp=request.model.n_mtp_layers > 0)
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
    return f"{dollars(price['usd_per_h'])} a GPU-hour, {market} ({price['source']}{', ' * bool(day)}{day}{old})"


def band_words(bill: dict) -> str:
    """How the step was predicted, and where eight of ten published runs of its kind lay."""
    usd = "" if bill["band_usd"] is None else ", {} to {}".format(*map(dollars, bill["band_usd"]))
    low, high = (bill["steady"]["days"] * edge for edge in bill["band"])
    return f"{bill['made']} (P10-P90 {days(low)} to {days(high)} days{usd})"


def mfu_words(mfu: float, data: dict) -> str:
    """MFU is over the bf16 peak, which products in FP8 may pass."""
    return f"{mfu:.1%} MFU" + " of the bf16 peak" * (data["best"]["layout"].get("dtype", "bf16") != "bf16")


def peak_words(data: dict) -> str:
    return "bf16 peak" if data["hardware"]["device"] == "cuda" else "the calibrating run's GEMM for a peak"


def mfu_line(data: dict, *, mtp: bool) -> str:
    """What MFU means here, and the best layout's by the other conventions in print: of peaks that its products use, and
    without MTP modules where there are some."""
    low, on_gpus = data["best"]["layout"].get("dtype", "bf16") != "bf16", data["hardware"]["device"] == "cuda"
    others = "; ".join(f"{value:.1%} of the {name if on_gpus else name.replace('bf16 ', '')}"
                       for name, value in data["mfu_conventions"].items()
                       if value is not None and (low or name.startswith("bf16")) and (mtp or low or "whole" in name))
    counted, without = (", MTP modules counted", "without MTP modules: ") if mtp else ("", "")
    return f"MFU       {peak_words(data)}, causal attention{counted}, recompute not; {without}{others}"


def _print_step(console, data: dict, *, mtp: bool) -> None:
    best, have, usable = data["best"], data["hardware"]["memory_gib"], data["assumptions"]["usable_memory"]
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in best["parts_s"].items())
    whose = "; pipeline and bubble are the busiest rank's, idle above is all ranks' share"
    console.print(f"\nstep      {parts} s{whose * (best['layout']['pp'] > 1)}")
    console.print(mfu_line(data, mtp=mtp), markup=False)
    used, width = 0.0, max(8, min(BAR, console.width - BESIDE_BAR))
    for number, (name, size) in enumerate(best["memory_gib"].items()):
        long = min(width, max(size >= SEEN_GIB, round(size / have * width)))
        begin = 0 if name == "total" else min(width - long, round(used / have * width))
        used += size
        bar = " " * begin + "\u2588" * long + "\u2591" * (width - long) * (name == "total")
        note = f"  of {gib(have)} GiB, {gib(have * usable)} usable, fullest rank" if name == "total" else ""
        console.print(f"{'' if number else 'memory':10}{name:12}{gib(size):>7}  {bar}{note}")


def _print_bills(console, bill: dict) -> None:
    price, steady, expected = bill["price"], bill["steady"], bill["expected"]
    console.print(f"\nat {price_words(price)}", markup=False)
    table = grid("<bill", "GPU-hours", "days", "USD", "<what it counts")
    own = {term["name"]: term for term in expected["terms"]}
    table.add_row("steady", *_sums(steady), f"step time x steps, as DeepSeek's published bill; {band_words(bill)}")
    for name in [term["name"] for term in steady["terms"]][1:]:
        table.add_row(f"  of it {name}", hours(own[name]["gpu_hours"]), "", dollars(own[name]["usd"]),
                      own[name]["equation"])
    steady_names = {term["name"] for term in steady["terms"]}
    for term in expected["terms"]:
        if term["name"] not in steady_names:
            table.add_row(f"  + {term['name']}", hours(term["gpu_hours"]), "", dollars(term["usd"]), term["source"])
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
    return [hours(side["gpu_hours"]), days(side["days"]), dollars(side["usd"])]


def _print_dense(console, data: dict) -> None:
    table = grid("<beside it, steady", "parameters", "GPU-hours", "USD", "x", "<how")
    steady = data["bill"]["steady"]["terms"][0]

    def line(name: str, low: dict, high: dict, how: str, parameters: str = "") -> None:
        both = [low] if low is high else [low, high]
        table.add_row(name, parameters, " - ".join(hours(each["device_hours"]) for each in both),
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
            taken = f"{row['gpu_hours']:,} {row['device']}" if "gpu_hours" in row else ""
            table.add_row(row["name"], row["kind"], taken, usd, row["source"])
    console.print()
    console.print(table)


def between_words(loss: dict) -> str:
    """At which MFU a dense model of equal loss is priced."""
    edges = dict.fromkeys(f"{loss[side]['mfu']:.1%}" for side in ("low", "high"))
    return f"at {' to '.join(edges)} MFU, between the twins' by log FLOPs"


def _print_train(console, data: dict) -> None:
    runs = first_runnable(data["candidates"])
    if runs is None:
        console.print("\ntrain     cannot run what fits, for these reasons:")
        kinds: dict[str, dict] = {}
        for row in [*filter(None, [data.get("but_for_ramp")]), *data["candidates"]]:
            kinds.setdefault(PARTICULAR.sub("", row["train_not"]), row)
        for row in kinds.values():
            console.print(f"          {layout_words(row['layout'])}: {row['train_not']}", markup=False)
        console.print()
    else:
        console.print(f"\ntrain     {train_note(data)}\nsparing train {shlex.join(runs['train'])}\n", markup=False)


def _telling(plan: Plan) -> list[str]:
    """The nearest miss of each kind, the commonest kind first."""
    lines = []
    for items in sorted(plan.kinds_refused().values(), key=lambda items: -sum(item.number for item in items))[:5]:
        number = sum(item.number for item in items)
        lines.append(f"{number:,} layouts, such as {layout_words(items[0].layout)}: {items[0].reason}")
    return lines


def layout_words(layout: dict) -> str:
    """A layout in a line; degrees of 1 and what is as usual are not said."""
    short = {"microbatches": "m", "stages_per_rank": "stages"}
    return " ".join(str(value) if key == "schedule" else f"{short.get(key, key)}={value}"
                    for key, value in layout.items()
                    if USUAL.get(key) != value and not (key == "stages_per_rank" and value <= 2))


def grid(*headers: str):
    """A table without lines; a header that starts with < is left-aligned and may wrap where a terminal is narrow, the
    last column before others."""
    from rich.table import Table

    table = Table(*(header.lstrip("<") for header in headers), box=None, pad_edge=False)
    for column, header in zip(table.columns, headers, strict=True):
        column.justify = "left" if header.startswith("<") else "right"
        column.no_wrap, column.overflow = column.justify == "right", "fold"
    return table
