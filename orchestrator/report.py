"""One page about finished runs, made after the fact from what their directories hold; it works on unfinished ones too.

`write_report` leaves report.html (one file: no network, no script) and report.md. Figures come from summary.json and
metrics.jsonl alone; nothing is measured or guessed here, and what was predicted stands in a column of its own.
"""

import os
from dataclasses import replace
from html import escape

from orchestrator.arguments import check_writable
from orchestrator.errors import BadRequest
from orchestrator.plan.cost import BUCKETS
from orchestrator.report_plots import Series, format_number, line_chart, load_heatmap, smoothed, stacked_bar
from orchestrator.report_run import Run, Share, expert_load, headline_figures, interval_note, labelled, read_run, shares
from orchestrator.report_style import details, document, figure, table
from orchestrator.train import storage
from orchestrator.train.finish import format_usd, is_dense, since

MAX_EVENTS = 200


def write_report(run_dirs: list[str], out: str | None = None) -> str:
    """Write the page about one run, or several compared, and its Markdown twin; returns the page's path.

    out: path of the .html file; by default report.html in the (first) run directory.
    """
    if not run_dirs:
        raise BadRequest("report: no run directory was given; name one or more, as in `sparing report runs/NAME`")
    if out and not out.endswith(".html"):
        use = storage.join(out, "report.html") if os.path.isdir(out) else f"{out}.html"
        raise BadRequest(f"out={out}: must be the name of a file that ends in .html; use out={use}")
    check_writable({} if out is None else {"out": out}, "out")
    once = {os.path.realpath(storage.local_path(path) or path): path for path in run_dirs}
    runs = labelled([read_run(path) for path in once.values()])
    out = out or storage.join(run_dirs[0], "report.html")
    stem = out.removesuffix(".html")
    storage.write_bytes(f"{stem}.html", page(runs).encode())
    storage.write_bytes(f"{stem}.md", markdown(runs).encode())
    return f"{stem}.html"


def page(runs: list[Run]) -> str:
    """The whole HTML document."""
    title = " / ".join(run.label for run in runs)
    body = [_header(runs, title), _tiles(runs[0]) if len(runs) == 1 else _comparison(runs),
            '<section class="grid">', _loss(runs), _quality(runs), _throughput(runs), _cost(runs), _grad_norm(runs),
            _balance(runs), "</section>", _time(runs),
            *(_experts(run, many=len(runs) > 1) for run in runs),
            *(_dense(run, many=len(runs) > 1) for run in runs), *(_predicted(run) for run in runs),
            *(_events(run, many=len(runs) > 1) for run in runs), *(_config(run, many=len(runs) > 1) for run in runs),
            _footer(runs)]
    return document(f"{title} - Sparing", body)


def _header(runs: list[Run], title: str) -> str:
    lines = []
    for run in runs:
        s, parts = run.summary, []
        if s["model"]:
            parts.append(f"{s['model']['name']}: {format_number(s['model']['parameters'])} parameters, "
                         f"{format_number(s['model']['active_parameters'])} active")
        if s["layout"]:
            parts.append("pp {pp} x dp {dp} (ep {ep}), {schedule}".format(**s["layout"]))
        if s["hardware"]:
            spares = s["hardware"].get("spares")
            parts.append(f"{s['hardware']['devices']} x {s['hardware']['name'] or s['hardware']['device']}"
                         + (f" and {spares} to spare" if spares else ""))
        if s["attempts"]:
            parts.append(f"{s['attempts']} attempt" + "s" * (s["attempts"] != 1))
        if run.note:
            parts.append(run.note)
        name = f"<b>{escape(run.label)}</b> " if len(runs) > 1 else ""
        lines.append(f'<p class="sub">{name}<span class="status {escape(s["status"])}">{escape(s["status"])}</span> '
                     f"{escape('; '.join(parts))}</p>")
    return f"<header><h1>{escape(title)}</h1>{''.join(lines)}</header>"


def _tiles(run: Run) -> str:
    tiles = "".join(f"<div><dt>{escape(f.name)}</dt><dd>{escape(f.value)}</dd><small>{escape(f.note)}</small></div>"
                    for f in headline_figures(run.summary))
    return f'<dl class="tiles">{tiles}</dl>'


def _comparison(runs: list[Run]) -> str:
    columns = [headline_figures(run.summary) for run in runs]
    rows = [[f"<b>{escape(figures[0].name)}</b>",
             *(f"{escape(f.value)}<small>{escape(f.note)}</small>" for f in figures)]
            for figures in zip(*columns, strict=True)]
    head = [f'<i class="key line c{i % 8}"></i>{escape(run.label)}' for i, run in enumerate(runs)]
    return table(["", *head], rows, numeric_from=1, css="compare")


def _loss(runs: list[Run]) -> str:
    many = len(runs) > 1
    train = [replace(series, label=f"train, {series.label}") for series in _by_step(runs, "train/loss")]
    validation = [Series(f"validation, {run.label}" if many else "validation", run.column("step"),
                         run.column("validation/loss"), i if many else 1, "points") for i, run in enumerate(runs)]
    return figure("Loss", "next-token cross-entropy, nats per token",
                  line_chart(train + validation, x_label="step", y_label="nats / token"))


def _quality(runs: list[Run]) -> str:
    levels = {}
    for run in runs:
        for name in ("bigram", "gzip"):
            if (level := run.summary["bits_per_byte"].get(name)) is not None:
                levels[f"{name} {level:.3f}"] = (name, level)
    series = [Series(run.label if len(runs) > 1 else "validation", run.column("step"),
                     run.column("validation/bits_per_byte"), i if len(runs) > 1 else 1, "points")
              for i, run in enumerate(runs)]
    last = max((step for run in runs for step in run.column("step")), default=1)
    return figure("Held-out text", "validation bits per byte beside a bigram model and gzip on the same bytes",
                  line_chart(series, x_label="step", y_label="bits / byte", levels=list(levels.values()),
                             x_range=(0, last), y_format=lambda y: f"{y:.2f}"))


def _throughput(runs: list[Run]) -> str:
    return figure("Throughput", "tokens per second over all devices, by step",
                  line_chart(_by_step(runs, "tokens/per_s"), x_label="step", y_label="tokens / s", from_zero=True))


def _cost(runs: list[Run]) -> str:
    is_priced = all(any(v is not None for v in run.column("cost/usd_total")) for run in runs if run.rows)
    own, unit = ("cost/usd_total", "usd") if is_priced else ("cost/device_hours", "device_hours")
    series = [Series(run.label if len(runs) > 1 else "this run, all that was charged", run.column("tokens/total"),
                     run.column(own), i) for i, run in enumerate(runs)]
    beside_dense = len(runs) == 1 and not is_dense(runs[0].summary)
    if beside_dense:
        series += [Series(f"dense, equal {name} parameters", runs[0].column("tokens/total"),
                          runs[0].column(f"cost/dense_equal_{name}_{unit}"), colour, "dashed")
                   for name, colour in (("total", 2), ("active", 3))]
    subtitle = ("dollars" if is_priced else "device-hours (the price is unknown)") + " for the tokens so far"
    if beside_dense:
        subtitle += "; dense models at this run's own MFU, no overhead: the gap above 'equal active' is overhead"
    return figure("Cost", subtitle,
                  line_chart(series, x_label="tokens", y_label="US$" if is_priced else "device-hours",
                             y_format=_dollars if is_priced else None, from_zero=True))


def _grad_norm(runs: list[Run]) -> str:
    return figure("Gradient norm", "global norm before clipping",
                  line_chart(_by_step(runs, "train/grad_norm"), x_label="step", y_label="norm", from_zero=True))


def _balance(runs: list[Run]) -> str:
    series = []
    for i, run in enumerate(runs):
        layers = [key for key in (run.rows[-1] if run.rows else {}) if key.startswith("moe/load_max_over_mean/")]
        if len(runs) == 1:
            series += [Series("each layer", run.column("step"), run.column(key), 7, "faint", in_legend=key == layers[0])
                       for key in layers]
        series.append(Series(run.label if len(runs) > 1 else "mean over MoE layers", run.column("step"),
                             run.column("moe/load_max_over_mean"), i))
    return figure("Expert balance", "tokens of the busiest expert over the mean; 1 is perfect balance",
                  line_chart(series, x_label="step", y_label="max / mean"))


def _by_step(runs: list[Run], key: str) -> list[Series]:
    """A run's column, faint, and its running mean over a fiftieth of the run."""
    series = []
    for i, run in enumerate(runs):
        steps, values = run.column("step"), run.column(key)
        window = max(1, len(values) // 50)
        if window > 1:
            series.append(Series("each step", steps, values, i, "faint", in_legend=False))
        words = [*([run.label] if len(runs) > 1 else []), *([f"mean of {window} steps"] if window > 1 else [])]
        series.append(Series(", ".join(words) or "each step", steps, smoothed(values, window), i))
    return series


def _time(runs: list[Run]) -> str:
    """Of each run a bar and a table with a row a bucket."""
    closed = [(run, found) for run in runs if (found := shares(run.summary))]
    if not closed:
        none = '<p class="none">the ledger is closed when the run ends</p>'
        return figure("Where the time went", "", none, wide=True)
    css = {name: f"b{i}" for i, name in enumerate(BUCKETS)}
    head = ["bucket", "device-seconds", "share", "cost", "predicted at the optimal interval"]
    parts = []
    for run, found in closed:
        parts.append(f'<p class="bar-label">{escape(run.label)}</p>' * (len(closed) > 1))
        parts.append(stacked_bar([(each.bucket.replace("_", " "), each.device_s, css.get(each.bucket, "b7"))
                                  for each in found], "share of charged device time"))
        rows = [[f'<span class="named"><i class="key box {css.get(each.bucket, "b7")}"></i>'
                 f'{escape(each.bucket.replace("_", " "))}</span>', f"{each.device_s:,.1f}", f"{each.share:.1%}",
                 escape(format_usd(each.usd)), _optimum(each)] for each in found]
        total = f"{sum(each.device_s for each in found):,.1f}", "100%", escape(format_usd(run.summary["usd_total"]))
        rows.append([f"<b>{cell}</b>" for cell in ("charged", *total, "")])
        parts += [table(head, rows), f'<p class="bar-label">{escape(interval_note(run.summary))}</p>']
    return figure("Where the time went", "every device-second from placement to release, in one bucket each",
                  "".join(parts), wide=True)


def _optimum(share: Share) -> str:
    return "-" if share.at_optimum is None else f"{share.at_optimum:.2%}"


def _experts(run: Run, *, many: bool) -> str:
    loads, names, steps = expert_load(run)
    if not loads:
        return ""
    return figure("Expert load" + (f": {run.label}" if many else ""),
                  f"tokens of each expert over its layer's mean, last {steps} steps",
                  load_heatmap(loads, names), wide=True)


def _dense(run: Run, *, many: bool) -> str:
    summary = run.summary
    if summary["dense"]["equal_total"].get("device_hours") is None or is_dense(summary):
        return ""
    names = {"equal_total": "dense, equal total parameters", "equal_active": "dense, equal active parameters"}
    model = summary["model"]
    sizes = f"{format_number(model.get('parameters'))}, {format_number(model.get('active_parameters'))} active"
    rows = [["this run, all that was charged", sizes,
             format_number(summary["measured"].get("model_flops_total")), format_number(summary["device_hours"]),
             escape(format_usd(summary["usd_total"]))]]
    rows += [[name, format_number(twin.get("parameters")), format_number(twin.get("flops")),
              format_number(twin["device_hours"]), escape(format_usd(twin["usd"]))]
             for key, name in names.items() for twin in [summary["dense"][key]]]
    return figure("Beside dense training" + (f": {run.label}" if many else ""),
                  f"the same tokens; dense models computed at this run's own MFU{since(summary)}, productive time "
                  "only. Dense models usually reach a higher MFU, so their figures are upper bounds",
                  table(["", "parameters", "FLOPs", "device-hours", "cost"], rows), wide=True)


def _predicted(run: Run) -> str:
    predicted, measured = run.summary["predicted"], run.summary | run.summary["measured"]
    rows = []
    for key, value in predicted.items():
        if isinstance(value, int | float):
            actual = measured.get(key)
            error = f"{value / actual - 1:+.1%}" if isinstance(actual, int | float) and actual else "-"
            rows.append([escape(key), format_number(value),
                         format_number(actual) if isinstance(actual, int | float) else "-", error])
    if not rows:
        return ""
    how = escape(str(predicted.get("how", "plan")))
    number = measured.get("median_of_steps")
    of = (f"; times and tokens_per_s are medians of {number:,} kept steps{since(run.summary)}, of one "
          "batch size and behind a first one; steps_usd is all goodput") if number else ""
    return figure("Predicted and measured", f"forecast before the first step ({how}), and what the run did{of}",
                  table(["", "predicted", "measured", "error"], rows), wide=True)


def _events(run: Run, *, many: bool) -> str:
    if not run.events:
        return ""
    start = run.events[0].get("time") or 0.0
    shown = {"time", "kind", "rank", "node", "step", "cause"}
    rows = []
    for event in run.events[-MAX_EVENTS:]:
        more = ", ".join(f"{key} {format_number(value) if isinstance(value, float) or key.endswith('bytes') else value}"
                         for key, value in event.items() if key not in shown and value is not None)
        cells = [f"+{(event.get('time') or start) - start:,.1f} s", str(event.get("kind", "")).replace("_", " "),
                 *("" if event.get(key) is None else str(event[key]) for key in ("step", "rank", "node"))]
        rows.append([*(f'<span class="named">{escape(cell)}</span>' for cell in cells),
                     escape("; ".join(str(part) for part in (event.get("cause"), more) if part))])
    left_out = len(run.events) - len(rows)
    note = f"; {left_out} earlier ones left out" if left_out else ""
    events = table(["time", "event", "step", "rank", "node", ""], rows, numeric_from=9)
    return details(f"Events{f': {run.label}' if many else ''} ({len(run.events)}{note})", events,
                   is_open=len(rows) <= 20)


def _config(run: Run, *, many: bool) -> str:
    if not run.config:
        return ""
    return details("Configuration" + (f": {run.label}" if many else ""), f"<pre>{escape(run.config)}</pre>")


def _footer(runs: list[Run]) -> str:
    notes = [f"Run directory: <code>{escape(run.path)}</code>." for run in runs]
    notes += [f"Price: {escape(source)}." for source in
              dict.fromkeys(run.summary["hardware"].get("source") or "" for run in runs) if source]
    notes += [f"MFU: {escape(convention)}." for convention in
              dict.fromkeys(run.summary["measured"].get("mfu_convention") or "" for run in runs) if convention]
    notes.append("All figures are measured unless a column says predicted or a line says dense.")
    return f"<footer>{''.join(f'<p>{note}</p>' for note in notes)}</footer>"


def _dollars(usd: float) -> str:
    return "$0" if usd == 0 else f"${format_number(usd)}" if usd >= 1e-4 else f"${usd:.1e}"


def markdown(runs: list[Run]) -> str:
    """The figures as tables, one column a run."""
    columns = [headline_figures(run.summary) for run in runs]
    lines = [f"# {' / '.join(run.label for run in runs)}", "", _row(["", *(run.label for run in runs)]),
             _row(["---"] * (len(runs) + 1)), _row(["Status", *(run.summary["status"] for run in runs)])]
    for figures in zip(*columns, strict=True):
        lines.append(_row([figures[0].name, *(f"{f.value} ({f.note})" if f.note else f.value for f in figures)]))
    for run in runs:
        lines += ["", f"{run.label}: {run.note}."] if run.note else []
        lines += ["", f"## Where the time went: {run.label}", ""]
        lines += [_row(["bucket", "device-seconds", "share", "cost", "predicted at the optimal interval"]),
                  _row(["---", "---:", "---:", "---:", "---:"])]
        lines += [_row([s.bucket, f"{s.device_s:,.1f}", f"{s.share:.1%}", format_usd(s.usd), _optimum(s)])
                  for s in shares(run.summary)] or [_row(["not known until the run ends", "", "", "", ""])]
        lines += ["", interval_note(run.summary), "", f"Run directory: `{run.path}`"]
    convention = next((c for run in runs if (c := run.summary["measured"].get("mfu_convention"))), None)
    return "\n".join([*lines, *(["", f"MFU: {convention}."] if convention else []), ""])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
