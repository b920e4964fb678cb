"""A plan's pictures as inline SVG: the pipeline's timeline rank by rank, memory over time, cost against days.

They draw the simulated clock (`plan/simulate.py`), whose action table is the one that the runtime executes.
"""

from collections.abc import Sequence
from html import escape

from orchestrator.plan.simulate import Span, Timeline
from orchestrator.report_plots import Series, format_number, legend, line_chart, nice_ticks

WIDTH, LEFT, BOTTOM = 1080, 58, 34
MAX_TITLED = 1500
COLOURS = {"F": "b2", "B": "b4", "I": "b1", "W": "b0"}
NAMES = {"F": "forward", "B": "backward", "I": "backward for the input", "W": "backward for the weights"}
TAIL = "b7"
STYLE = """
.micro { font-size: 8.5px; fill: #14161a !important; } .slot { fill: var(--bg); --k: var(--bg); }
.key.pair { background: linear-gradient(var(--b2) 50%, var(--b4) 50%); }
"""


def timeline_chart(timeline: Timeline, *, tail: Sequence[tuple[str, float]] = (), start: float = 0.0,
                   end: float | None = None, numbers: bool = False) -> str:
    """One row a rank, time to the right. An overlapped pair is a cell of two colours, a bubble is empty.

    tail: (name, seconds) after the pipeline, the same on all ranks. start, end: a window in seconds. numbers: cells
    that are wide enough carry their microbatch.
    """
    ranks, whole = len(timeline.busy), timeline.step_time + sum(seconds for _, seconds in tail)
    end = whole if end is None else min(end, whole)
    row = min(24.0, max(9.0, 380 / ranks))
    scale = (WIDTH - LEFT - 4) / (end - start)
    shown = [span for span in timeline.spans if span.end > start and span.start < end]
    titled, boxes = len(shown) <= MAX_TITLED, {}
    parts = [f'<svg viewBox="0 0 {WIDTH} {ranks * row + BOTTOM:.0f}" role="img" aria-label="pipeline timeline">']
    parts += [f'<rect class="slot" x="{LEFT}" y="{rank * row:.1f}" width="{WIDTH - LEFT - 4}" height="{row - 2:.1f}"/>'
              f'<text class="tick" x="{LEFT - 8}" y="{(rank + 0.5) * row + 3:.1f}" text-anchor="end">rank {rank}</text>'
              for rank in range(ranks)]
    texts = []
    for span in shown:
        x = LEFT + (max(span.start, start) - start) * scale
        width = (min(span.end, end) - max(span.start, start)) * scale
        drawn = max(0.3, width - (0.6 if width > 4 else 0.0))
        height = (row - 2) / len(span.actions)
        for i, action in enumerate(span.actions):
            y = span.rank * row + i * height
            if titled:
                parts.append(f'<rect class="{COLOURS[action.kind]}" x="{x:.1f}" y="{y:.1f}" width="{drawn:.1f}" '
                             f'height="{height:.1f}"><title>{_title(span)}</title></rect>')
            else:
                boxes.setdefault(COLOURS[action.kind], []).append(
                    f"M{x:.1f} {y:.1f}h{drawn:.1f}v{height:.1f}h-{drawn:.1f}z")
            if numbers and width > 5 * len(str(action.microbatch)) + 2 and height > 7:
                texts.append(f'<text class="micro" x="{x + width / 2:.1f}" y="{y + height / 2 + 3:.1f}" '
                             f'text-anchor="middle">{action.microbatch}</text>')
    at = timeline.step_time
    for name, seconds in tail:
        if seconds > 0 and at + seconds > start and at < end:
            left, right = (LEFT + (min(max(edge, start), end) - start) * scale for edge in (at, at + seconds))
            parts += [f'<rect class="{TAIL}" x="{left:.1f}" y="{rank * row:.1f}" width="{max(0.3, right - left):.1f}" '
                      f'height="{row - 2:.1f}"><title>{escape(name)}: {seconds:.3g} s</title></rect>'
                      for rank in range(ranks)]
        at += seconds
    parts += [f'<path class="{css}" d="{"".join(cells)}"/>' for css, cells in boxes.items()]
    parts += texts + _time_axis(start, end, ranks * row, scale)
    return "".join(parts) + "</svg>" + _timeline_legend(timeline, tail)


def memory_chart(held: list[list[tuple[float, float]]], levels: list[tuple[str, float]]) -> str:
    """GiB over a step's seconds of the first, a middle and the last rank. held: per rank (time, GiB from then on)."""
    ranks = sorted({0, len(held) // 2, len(held) - 1})
    series = []
    for colour, rank in enumerate(ranks):
        xs, ys = [], []
        for (time, gib), (following, _) in zip(held[rank], held[rank][1:] + held[rank][-1:], strict=True):
            xs, ys = [*xs, time, following], [*ys, gib, gib]
        series.append(Series(f"rank {rank}", xs, ys, colour))
    return line_chart(series, x_label="seconds into the step", y_label="GiB", from_zero=True,
                      levels=levels)


def cost_chart(points: list[tuple[str, float, float]], *, x_label: str = "days") -> str:
    """Dollars over days; points: (group, days, USD), a line for each group."""
    groups = list(dict.fromkeys(name for name, _, _ in points))
    series = []
    for colour, group in enumerate(groups):
        pairs = sorted((days, usd) for name, days, usd in points if name == group)
        series.append(Series(group, [days for days, _ in pairs], [usd for _, usd in pairs], colour % 8, "points"))
    xs = [x for _, x, _ in points] or [0.0]
    ticks = nice_ticks(min(xs), max(xs), 6)  # which enclose the points, so that none lies on the frame
    return line_chart(series, x_label=x_label, y_label="USD", y_format=format_number, x_range=(ticks[0], ticks[-1]))


def _title(span: Span) -> str:
    each = " with ".join(f"{NAMES[a.kind]}, stage {a.stage}, microbatch {a.microbatch}" for a in span.actions)
    return escape(f"rank {span.rank}: {each}, {span.start:.3f} to {span.end:.3f} s")


def _time_axis(start: float, end: float, top: float, scale: float) -> list[str]:
    parts = [f'<line class="base" x1="{LEFT}" x2="{WIDTH - 4}" y1="{top + 1:.1f}" y2="{top + 1:.1f}"/>']
    for tick in nice_ticks(start, end, 10):
        if start <= tick <= end:
            x = LEFT + (tick - start) * scale
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top + 1:.1f}" y2="{top + 5:.1f}"/>'
                         f'<text class="tick" x="{x:.1f}" y="{top + 18:.1f}" text-anchor="middle">{tick:g} s</text>')
    return parts


def _timeline_legend(timeline: Timeline, tail: Sequence[tuple[str, float]]) -> str:
    kinds = {action.kind for span in timeline.spans for action in span.actions}
    entries = [(NAMES[kind], COLOURS[kind], "box") for kind in "FBIW" if kind in kinds]
    if any(len(span.actions) > 1 for span in timeline.spans):
        entries.append(("forward and backward overlapped", "pair", "box"))
    entries.append(("bubble", "slot", "box"))
    if tail:
        entries.append((", ".join(name for name, _ in tail), TAIL, "box"))
    return legend(entries)
