"""How a plan's figures are written: dollars and days, one console, which of the layouts `train` runs."""

import os
import re
import sys

from orchestrator.train.finish import format_usd

SEEN_S = 0.005
"""A difference of steps that two digits show."""


def dollars(usd: float | None) -> str:
    """Whole dollars, cents below $100, three digits below $1; an unknown cost is said to be unknown."""
    return format_usd(usd) if usd is None or usd < 100 else f"${usd:,.0f}"


def usd_range(values: list[float | None], *, between: str = " - ") -> str:
    """Different values once each, in their order."""
    return between.join(dict.fromkeys(map(dollars, values)))


def days(number: float) -> str:
    """A run of less than a day in two digits, so that it never takes 0.0."""
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def hours(number: float) -> str:
    """Device-hours: whole ones, and of less than ten two digits."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def gib(size: float) -> str:
    """One digit after the point, two of what is less than 1 GiB."""
    return f"{size:.1f}" if size >= 1 else f"{size:.2f}"


def first_runnable(rows: list[dict]) -> dict | None:
    """Of plan.json's candidates that `train` runs the one that is fastest under it."""
    return min((row for row in rows if row["train"]), key=lambda row: row["train_step_s"], default=None)


def train_note(data: dict) -> str:
    """What the printed command takes as this program runs it, by its own expected bill, which limits it misses, and why
    it is not the plan's fastest."""
    runs, best, asked = first_runnable(data["candidates"]), data["candidates"][0], data.get("question", {})
    note = f"{runs['train_step_s']:.2f} s a step"
    if abs(runs["train_step_s"] - runs["step_time_s"]) >= SEEN_S:
        note += f" by its own stack ({runs['step_time_s']:.2f} by {data['stack']})"
    if bill := runs.get("expected"):
        note += f", {days(bill['days'])} days and {dollars(bill['usd'])} by the expected bill"
        missed = [f"{key}={asked[key]:.12g}" for key, side in (("deadline_days", "days"), ("budget_usd", "usd"))
                  if key in asked and (bill[side] or 0.0) > asked[key]]
        note += f", which MISSES {missed[0]}" if missed else ""
    if runs is best:
        return note
    return f"{note}; not the fastest layout: " + (best["train_not"] or f"that takes train {best['train_step_s']:.2f} s")


def console(*, width: int = 150, markup: bool = True):
    """As wide as the terminal or COLUMNS say, and so many columns where neither does."""
    from rich.console import Console

    made = Console(highlight=False, soft_wrap=True, markup=markup, file=_Trimmed())
    if not (made.is_terminal or os.environ.get("COLUMNS", "").isdecimal()):
        made.width = width
    return made


class _Trimmed:
    """Standard output, without blanks at the ends of lines."""

    def __getattr__(self, name: str):
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        return sys.stdout.write(re.sub(r" +((?:\x1b\[[0-9;]*m)*)$", r"\1", text, flags=re.MULTILINE))
