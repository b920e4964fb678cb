"""Plots as inline SVG, drawn here: nothing to download, nothing to run, readable in any browser and offline.

Every function returns text. Colours are classes (`c0`..`c7`, `h0`..`h8`) that the page's style sheet defines for
light and dark; hovering shows the numbers (SVG `<title>`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
MAX_POINTS, MAX_TITLES = 800, 50
AXIS_TITLE, TICK_CHARACTER = 26, 6.6
"""Width of the upright title of an axis with its gaps, and of a character in a tick's label (11 px)."""
LABEL_WIDTH, LABEL_HEIGHT = 80, 13
"""Room of a level's label."""
IN_BAR_CHARACTER = 7.5
"""Width of a character in a bar's label (13 px, bold), so that a part too narrow for its label has none."""
LOAD_EDGES = (0.25, 0.5, 0.7, 0.9, 1.1, 1.4, 2.0, 4.0)
"""Classes of an expert's load over the mean; the fifth, around 1, is balance."""


@dataclass(frozen=True)
class Series:
    """One line or a set of points. `colour` 0-7; `style`: line, faint, dashed, points."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int = 0
    style: str = "line"
    in_legend: bool = True


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, levels: Sequence[tuple[str, float]] = (),
               y_format: Callable[[float], str] | None = None, x_range: tuple[float, float] | None = None,
               from_zero: bool = False) -> str:
    """Lines over a common axis; `levels` are labelled horizontal lines. An empty chart says so."""
    series = [_finite(s) for s in series]
    drawn = [s for s in series if len(s.xs)]
    if not drawn:
        return '<p class="none">no data in this run</p>'
    y_format = y_format or format_number
    xs = [x for s in drawn for x in s.xs]
    ys = [y for s in drawn for y in s.ys] + [level for _, level in levels]
    low, high = x_range or (min(xs), max(xs))
    x_ticks = nice_ticks(low, high, 6)
    y_ticks = nice_ticks(0.0 if from_zero else min(ys), _clipped_high(drawn, levels), 5)
    left = max(LEFT, AXIS_TITLE + TICK_CHARACTER * max(len(y_format(y)) for y in y_ticks))
    x_scale = _scale(low, high, left, WIDTH - RIGHT)
    y_scale = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{y_label} over {x_label}")}">',
             _axes(left, x_ticks, y_ticks, x_scale, y_scale, x_label, y_label, y_format)]
    ends = [y_scale(y) for s in drawn for x, y in zip(s.xs, s.ys, strict=True)
            if x_scale(x) > WIDTH - RIGHT - LABEL_WIDTH]
    parts += _levels(levels, left, ends, y_scale, y_format)
    parts += [*(_draw(s, x_scale, y_scale) for s in drawn),
              *(_titles(s, x_scale, y_scale, x_label, y_format) for s in drawn if s.style != "faint"), "</svg>"]
    return "".join(parts) + legend([(s.label, f"c{s.colour}", s.style) for s in drawn if s.in_legend])


def load_heatmap(loads: Sequence[Sequence[float]], row_labels: Sequence[str]) -> str:
    """Expert load over the layer's mean, one row a MoE layer, one column an expert. loads: [layers][experts]."""
    rows, columns = len(loads), max(len(row) for row in loads)
    width, left = WIDTH * 2 - 40, 74
    cell_w, cell_h = (width - left) / columns, min(26.0, max(4.0, 420 / rows))
    height = rows * cell_h + 30
    parts = [f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="expert load by layer and expert">']
    gap = 1 if cell_w > 6 and cell_h > 6 else 0
    has_titles = rows * columns <= 4096
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(loads):
        for j, load in enumerate(row):
            x, y = left + j * cell_w, i * cell_h
            kind = sum(load >= edge for edge in LOAD_EDGES)
            if has_titles:
                parts.append(f'<rect class="h{kind}" x="{x:.1f}" y="{y:.1f}" width="{cell_w - gap:.2f}" '
                             f'height="{cell_h - gap:.2f}"><title>{escape(row_labels[i])}, expert {j}: '
                             f'{load:.2f} x mean</title></rect>')
            else:
                paths.setdefault(kind, []).append(f"M{x:.1f} {y:.1f}h{cell_w:.2f}v{cell_h:.1f}h-{cell_w:.2f}z")
    parts += [f'<path class="h{kind}" d="{"".join(cells)}"/>' for kind, cells in sorted(paths.items())]
    every = max(1, math.ceil(14 / cell_h))
    parts += [_text("tick", left - 8, (i + 0.5) * cell_h + 4, label, anchor="end")
              for i, label in enumerate(row_labels) if i % every == 0]
    step = max(1, round(nice_ticks(0, columns, 16)[1]))
    parts += [_text("tick", left + (j + 0.5) * cell_w, rows * cell_h + 14, str(j)) for j in range(0, columns, step)]
    parts.append(_text("axis", left + (width - left) / 2, height - 2, "expert") + "</svg>")
    names = [f"< {LOAD_EDGES[0]}", *(f"{low} - {high}" for low, high in zip(LOAD_EDGES, LOAD_EDGES[1:], strict=False)),
             f"> {LOAD_EDGES[-1]:.0f}"]
    return "".join(parts) + legend([(name, f"h{i}", "box") for i, name in enumerate(names)])


def stacked_bar(parts: Sequence[tuple[str, float, str]], what: str) -> str:
    """Shares of a whole as one bar over a wide figure. parts: (label, value, css class)."""
    total = math.fsum(value for _, value, _ in parts) or 1.0
    width, height, x = WIDTH * 2 - 40, 34, 0.0
    drawn = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(what)}">']
    for label, value, css in parts:
        span = value / total * width
        drawn.append(f'<rect class="{css}" x="{x:.2f}" y="0" width="{max(0.0, span - 1.5):.2f}" height="{height}">'
                     f"<title>{escape(label)}: {value / total:.1%}</title></rect>")
        told = f"{label} {value / total:.0%}"
        if span > 16 + IN_BAR_CHARACTER * len(told):
            drawn.append(f'<text class="inbar" x="{x + 8:.1f}" y="22">{escape(told)}</text>')
        x += span
    return "".join(drawn) + "</svg>"


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """entries: (label, css class, style of the key)."""
    items = "".join(f'<li><i class="key {style} {css}"></i>{escape(label)}</li>' for label, css, style in entries)
    return f'<ul class="legend">{items}</ul>'


def smoothed(ys: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last `window` known values."""
    means, recent = [], []
    for y in ys:
        if y is not None:
            recent = [*recent[-window + 1 :], y] if window > 1 else [y]
        means.append(math.fsum(recent) / len(recent) if recent else None)
    return means


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Ticks at 1, 2 or 5 times a power of ten that enclose [low, high]."""
    if high <= low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def format_number(value: float | None) -> str:
    """Three to four significant digits; K, M, B, T above ten thousand."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'K' else limit):.4g}{suffix}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def _finite(series: Series) -> Series:
    pairs = [(x, y) for x, y in zip(series.xs, series.ys, strict=True)
             if x is not None and y is not None and math.isfinite(y)]
    return Series(series.label, [x for x, _ in pairs], [y for _, y in pairs], series.colour, series.style,
                  series.in_legend)


def _clipped_high(drawn: Sequence[Series], levels: Sequence[tuple[str, float]]) -> float:
    """The top of the axis: the maximum, but a few outliers of a faint raw line are cut off."""
    tops = [level for _, level in levels]
    for s in drawn:
        ordered = sorted(s.ys)
        tops.append(ordered[-1] if s.style != "faint" else ordered[int(0.99 * (len(ordered) - 1))])
    return max(tops)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _axes(left: float, x_ticks, y_ticks, x_scale, y_scale, x_label: str, y_label: str, y_format) -> str:
    bottom, right, parts = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for y in y_ticks:
        parts += [_line("grid", left, right, y_scale(y), y_scale(y)),
                  _text("tick", left - 7, y_scale(y) + 3.5, y_format(y), anchor="end")]
    for x in x_ticks:
        if left - 0.5 <= x_scale(x) <= right + 0.5:
            parts += [_line("mark", x_scale(x), x_scale(x), bottom, bottom + 4),
                      _text("tick", x_scale(x), bottom + 16, format_number(x))]
    parts += [_line("base", left, right, bottom, bottom), _text("axis", (left + right) / 2, HEIGHT - 6, x_label),
              _text("axis", -(TOP + bottom) / 2, 12, y_label, more=' transform="rotate(-90)"')]
    return "".join(parts)


def _levels(levels: Sequence[tuple[str, float]], left: float, ends: Sequence[float], y_scale, y_format) -> list[str]:
    """Lines from the top down, labelled on the right, or on the left where a curve ends; the label of one that is close
    to the one before goes below it. ends: heights that curves have on the right."""
    parts, lowest = [], -math.inf
    for label, y in sorted(levels, key=lambda level: -level[1]):
        at = y_scale(y)
        lowest = max(at - 5, lowest + LABEL_HEIGHT)
        covered = any(abs(lowest - LABEL_HEIGHT / 2 - end) < LABEL_HEIGHT for end in ends)
        x, anchor = (left + 4, "start") if covered else (WIDTH - RIGHT - 2, "end")
        parts += [_line("level", left, WIDTH - RIGHT, at, at),
                  _text("level-label", x, lowest, f"{label} {y_format(y)}", anchor=anchor)]
    return parts


def _line(css: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(css: str, x: float, y: float, text: str, *, anchor: str = "middle", more: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _draw(series: Series, x_scale, y_scale) -> str:
    xs, ys = _thinned(series.xs, series.ys)
    points = [(x_scale(x), max(TOP - 6, y_scale(y))) for x, y in zip(xs, ys, strict=True)]
    dots = "".join(f'<circle class="dot c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points)
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    if series.style == "points":
        return f'<path class="line thin c{series.colour}" d="{path}"/>{dots if len(points) <= MAX_TITLES else ""}'
    return dots if len(points) == 1 else f'<path class="line {series.style} c{series.colour}" d="{path}"/>'


def _titles(series: Series, x_scale, y_scale, x_label: str, y_format) -> str:
    every = max(1, math.ceil(len(series.xs) / MAX_TITLES))
    picked = list(zip(series.xs, series.ys, strict=True))[::-every]
    return "".join(f'<circle class="hit c{series.colour}" cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="6"><title>'
                   f"{escape(series.label)}\n{escape(x_label)} {format_number(x)}: {y_format(y)}</title></circle>"
                   for x, y in picked)


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS: of each stretch its lowest and highest, so that spikes stay visible."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    stretch = math.ceil(2 * len(xs) / MAX_POINTS)
    kept = set()
    for start in range(0, len(xs), stretch):
        indices = range(start, min(start + stretch, len(xs)))
        kept |= {min(indices, key=ys.__getitem__), max(indices, key=ys.__getitem__)}
    ordered = sorted(kept | {0, len(xs) - 1})
    return [xs[i] for i in ordered], [ys[i] for i in ordered]
