"""How a plan's figures are written: dollars and days, one console, which of the layouts `train` runs."""


def dollars(usd: float | None) -> str:
    """Whole dollars, cents below $100; an unknown cost is said to be unknown."""
    return "unknown" if usd is None else f"${usd:,.0f}" if usd >= 100 else f"${usd:.2f}"


def usd_range(values: list[float | None], *, between: str = " - ") -> str:
    """Different values once each, in their order."""
    return between.join(dict.fromkeys(map(dollars, values)))


def days(number: float) -> str:
    """A run of less than a day in two digits, so that it never takes 0.0."""
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def first_runnable(rows: list[dict]) -> dict | None:
    """The fastest of plan.json's candidates that `train` runs."""
    return next((row for row in rows if row["train"]), None)


def console(*, width: int = 150, markup: bool = True):
    """At least so many columns, and so many where no terminal says how wide it is."""
    from rich.console import Console

    made = Console(highlight=False, soft_wrap=True, markup=markup)
    made.width = max(width, made.width) if made.is_terminal else width
    return made
