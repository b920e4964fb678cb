"""One self-contained HTML page about a plan: no network, no script. All figures but the published are predicted."""

import shlex
from html import escape

from orchestrator.config import Schedule
from orchestrator.plan.cost import MFU_CONVENTION
from orchestrator.plan.estimate import estimate
from orchestrator.plan.memory import rank_memory_gib
from orchestrator.plan.money import ITSELF
from orchestrator.plan.search import Plan
from orchestrator.plan.trace import held_over_time
from orchestrator.plan.workload import Workload, pipeline_of
from orchestrator.plan_format import days, dollars, first_runnable, gib, hours, train_note, usd_range
from orchestrator.plan_plots import STYLE as PLOT_STYLE
from orchestrator.plan_plots import cost_chart, memory_chart, timeline_chart
from orchestrator.plan_table import band_words, layout_words, mfu_words, peak_words, price_words
from orchestrator.report_plots import format_number, stacked_bar
from orchestrator.report_style import details, document, figure, marked, table

SHOWN, ZOOM_SLOTS = 12, 45
NUMBERED_CELLS = 78
"""That fit beside each other with a number of two digits each."""


def page(plan: Plan, data: dict) -> str:
    """The whole document, of a plan in which at least one layout fits."""
    request, work = plan.request, plan.candidates[0].work
    title = f"{request.model.name} on {request.devices:,} {request.hardware.name}"
    return document(f"{title} - Sparing plan", [
        _header(data, title), _tiles(data), *_timelines(data, work), _memory(data),
        '<section class="grid">', _memory_over_time(data, work), _cost(data), "</section>", _layouts(data),
        _bills(data["bill"]), _dense(data), _published(data), _refused(data), _assumptions(data), _footer()],
        style=PLOT_STYLE)


def _header(data: dict, title: str) -> str:
    what = (f"{format_number(data['tokens'])} tokens, {data['batch_size']:,} sequences of {data['seq_len']:,} a step, "
            f"{data['dtype']}; {data['considered']:,} layouts considered")
    return (f'<header><h1>{escape(title)}</h1><p class="sub"><span class="status">predicted</span> {escape(what)}</p>'
            f'<p class="sub">best: <b>{escape(layout_words(data["best"]["layout"]))}</b></p></header>')


def _tiles(data: dict) -> str:
    best, bill = data["best"], data["bill"]
    tiles = [("step", f"{best['step_time_s']:.2f} s", f"ranks idle {best['bubble_fraction']:.0%} of the pipeline"),
             ("MFU", f"{best['mfu']:.1%}", f"{peak_words(data)}, causal attention"),
             ("steady bill", dollars(bill["steady"]["usd"]), f"{hours(bill['steady']['gpu_hours'])} GPU-hours, "
              f"{days(bill['steady']['days'])} days; {band_words(bill)}"),
             ("expected bill", dollars(bill["expected"]["usd"]), f"{days(bill['expected']['days'])} days; production "
              f"factor {bill['production_factor']:.3f}")]
    return '<dl class="tiles">' + "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>"
        for name, value, note in tiles) + "</dl>"


def _timelines(data: dict, work: Workload) -> list[str]:
    """The whole step, and its beginning near enough to read microbatches."""
    timeline = estimate(work).timeline
    parts = data["best"]["parts_s"]
    tail = [(name, seconds) for name, seconds in parts.items() if name not in ("pipeline", "bubble")]
    runs = "that is executed" if work.schedule in Schedule.__members__ else "of its paper, which `train` does not run"
    found = [figure("One step, rank by rank", f"{work.schedule} over {work.pp} pipeline ranks, {work.microbatches} "
                    f"microbatches: the action table {runs}, on a simulated clock",
                    timeline_chart(timeline, tail=tail, numbers=work.microbatches <= 24), wide=True)]
    slots = sum(span.rank == 0 for span in timeline.spans)
    if slots > ZOOM_SLOTS:
        end = timeline.step_time * ZOOM_SLOTS / slots
        narrowest = min(span.end - span.start for span in timeline.spans if span.actions[0].kind == "F")
        near = min(end, max(end / 4, narrowest * NUMBERED_CELLS))
        found += [figure(title, "the same clock; numbers are microbatches",
                         timeline_chart(timeline, start=start, end=until, numbers=True), wide=True)
                  for title, start, until in (("Its beginning", 0.0, near), ("How it goes on", near, end))
                  if start < until]
    return found


def _memory(data: dict) -> str:
    sizes, have = data["best"]["memory_gib"], data["hardware"]["memory_gib"]
    colours = ["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b8"]
    parts = [(name, sizes[name], css) for name, css in zip([name for name in sizes if name != "total"], colours,
                                                           strict=True)]
    free = max(0.0, have - sizes["total"])
    rows = [[f'<i class="key box {css}"></i>{escape(name)}', gib(size), f"{size / have:.0%}"]
            for name, size, css in [*parts, ("free", free, "b7")]]
    bar = stacked_bar([*parts, ("free", free, "b7")], "share of the device's memory")
    bar = f'<div class="whole">{bar}</div>'
    return figure("Memory of the fullest rank", f"{gib(sizes['total'])} of {gib(have)} GiB",
                  bar + table(["", "GiB", "of the device"], rows), wide=True)


def _memory_over_time(data: dict, work: Workload) -> str:
    """Every rank's own components; its activations follow the layers and microbatches in flight up to their peak."""
    ranges, _, _ = pipeline_of(work)
    held = held_over_time(estimate(work).timeline, [float(len(layers)) for layers in ranges])
    curves = []
    for points, sizes in zip(held, rank_memory_gib(work), strict=True):
        most, rest = max(layers for _, layers in points) or 1.0, sizes["total"] - sizes["activations"]
        curves.append([(time, rest + layers / most * sizes["activations"]) for time, layers in points])
    return figure("Memory over a step", "what does not change, and activations by microbatches in flight",
                  memory_chart(curves, [("device", data["hardware"]["memory_gib"])]))


def _layouts(data: dict) -> str:
    rows = []
    for row in data["candidates"][:SHOWN]:
        rows.append([f"{escape(layout_words(row['layout']))}<small>{marked(row['why'])}</small>",
                     f"{row['step_time_s']:.2f}",
                     f"{row['bubble_fraction']:.0%}", gib(row["memory_gib"]["total"]), f"{row['mfu']:.1%}",
                     days(row["days"]), dollars(row["usd_total"])])
    return figure("The best layouts", "fastest first, steady bill", table(
        ["layout, and why it is here", "step s", "idle", "GiB", "MFU", "days", "USD"], rows), wide=True)


def _bills(bill: dict) -> str:
    steady = {term["name"] for term in bill["steady"]["terms"]}
    rows = []
    for term in bill["expected"]["terms"]:
        kind = "steady" if term["name"] in steady else "expected"
        rows.append([escape(term["name"].replace("_", " ")), kind, escape(term["equation"]), escape(term["source"]),
                     hours(term["gpu_hours"]), dollars(term["usd"])])
    for name in ("steady", "expected"):
        side = bill[name]
        rows.append([f"<b>{name} bill</b>", "", "", f"{days(side['days'])} days", f"<b>{hours(side['gpu_hours'])}</b>",
                     f"<b>{dollars(side['usd'])}</b>"])
    energy = "" if bill["energy_kwh"] is None else (f"; {bill['energy_kwh']:,.0f} kWh at "
                                                    f"{bill['power_kw']:,.0f} kW ({bill['energy_equation']})")
    return figure("Two bills, never one", f"at {price_words(bill['price'])}{energy}", table(
        ["term", "bill", "equation", "source", "GPU-hours", "USD"], rows, numeric_from=4), wide=True)


def dense_rows(data: dict) -> list[tuple[str, list[dict], str]]:
    """(name, one entry or a low and a high one, how it came about) of every dense equivalent."""
    dense, rows = data["dense"], []
    for key in ("equal_active", "equal_total") if dense["equal_active"]["how"] != ITSELF else ():
        twin = dense[key]
        rows.append((f"dense, {key.replace('_', ' ')} parameters ({format_number(twin['parameters'])})", [twin],
                     "; ".join([f"{twin['how']}, {mfu_words(twin['mfu'], data)}",
                                *([twin["refused"]] if "refused" in twin else [])])))
    loss = dense.get("equal_loss")
    if loss:
        for law in loss["laws"]:
            rows.append((f"dense, equal loss by {law['law']}", [law], f"{law['multiplier']:.2f} x the FLOPs "
                         f"at {law['mfu']:.1%} MFU, between the twins' by log FLOPs; "
                         + ("inside its fit" if law["inside_fit"] else f"OUTSIDE its fit: {law['fit']}")))
        if loss["measured"]:
            rows.append(("dense, equal loss, multiplier measured by `compare`",
                         [loss["measured"]["low"], loss["measured"]["high"]], loss["measured"]["note"]))
        elif "measured_not" in loss:
            rows.append(("dense, equal loss, multiplier measured by `compare`", [], loss["measured_not"]))
    return rows


def _dense(data: dict) -> str:
    steady = data["bill"]["steady"]["terms"][0]
    rows = [["<b>this plan, pre-training</b>", f"<b>{hours(steady['gpu_hours'])}</b>",
             f"<b>{dollars(steady['usd'])}</b>", "1.00"]]
    for name, entries, how in dense_rows(data):
        rows.append([f"{marked(name)}<small>{marked(how)}</small>",
                     " to ".join(hours(each["device_hours"]) for each in entries),
                     " to ".join(dollars(each["usd"]) for each in entries),
                     " to ".join(f"{each['device_hours'] / steady['gpu_hours']:.2f}" for each in entries)])
    if len(rows) == 1:
        return ""
    return figure("Beside dense models", "steady pre-training on the same devices; laws are a range, never one number",
                  table(["", "GPU-hours", "USD", "x this plan"], rows), wide=True)


def _cost(data: dict) -> str:
    """Of the offers of a question, else of the best layout on fewer and more replicas."""
    offers = data.get("question", {}).get("offers", [])
    note = "expected bills of every offer, a line for each kind of GPU" if offers else (
        "expected bills of the best layout on fewer and more replicas, the same batch")
    points = [(row.get("hardware", data["hardware"]["name"]), row["days"], row["usd_total"])
              for row in offers or data.get("scaling", []) if row.get("usd_total") is not None]
    return figure("Cost against days", note, cost_chart(points)) if points else ""


def _published(data: dict) -> str:
    rows = []
    for row in data["published"]:
        usd = usd_range(sorted(row["usd"]), between=" to ") if "usd" in row else "-"
        taken = f"{row['gpu_hours']:,} {row.get('device', '')}" if "gpu_hours" in row else "-"
        rows.append([f"{escape(row['name'])}<small>{escape(row['source'])}, {escape(row['date'])}</small>",
                     escape(row["kind"]), taken, format_number(row.get("flops")), usd])
    return details("Published budgets, for scale", table(["", "kind", "device-hours", "FLOPs", "USD"], rows,
                                                         numeric_from=2))


def _refused(data: dict) -> str:
    rows = [[escape(layout_words(row["layout"])), escape(row["reason"])] for row in data["refused"][:60]]
    return details(f"Refused layouts ({len(rows)} of {data['considered'] - len(data['candidates']):,} shown)",
                   table(["layout", "reason"], rows, numeric_from=9)) if rows else ""


def _plainly(value: object) -> str:
    if isinstance(value, dict):  # a price with its source and day, of which some may be unknown
        known = [f"{key} {_plainly(item)}" for key, item in value.items() if item not in (None, "")]
        return ", ".join(known) or "unknown"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _assumptions(data: dict) -> str:
    groups = (data["assumptions"], data["bill"]["terms"], data["hardware"])
    rows = [[escape(name), escape(_plainly(value))] for group in groups for name, value in group.items()]
    runs = first_runnable(data["candidates"])
    command = "" if runs is None else details("The best layout that `sparing train` runs",
                                              f"<p>{marked(train_note(data))}</p>"
                                              f"<pre>sparing train {escape(shlex.join(runs['train']))}</pre>")
    return details("What was assumed", table(["", ""], rows)) + command


def _footer() -> str:
    return f"<footer><p>MFU: {escape(MFU_CONVENTION)}.</p></footer>"
