"""Offers of a question, as they are printed and as plan.json has them. Days and dollars are of the expected bill."""

import sys
from datetime import date

from orchestrator.config import HardwareConfig
from orchestrator.plan.hardware import age_days
from orchestrator.plan.planner import V3_BATCH, V3_SEQ_LEN
from orchestrator.plan.questions import Offer, assumed, comparable, front
from orchestrator.plan_format import console, days, dollars
from orchestrator.plan_table import grid, layout_words, price_words
from orchestrator.report_plots import format_number

FOLLOWS = (f"The batch (tokens a step) follows the GPUs, 8 sequences each up to {V3_BATCH:,}, fewer of more than "
           f"{V3_SEQ_LEN:,} tokens: rows are different trainings. Give train.batch_size to compare one.")
BASIS = ("On the front: none here beats it in days and dollars both. Days, GPU-hours and USD of the expected bill: "
         "start-up, validation, checkpoints and failures included.")


def offer_words(each: Offer) -> str:
    return f"{each.request.devices:,} x {each.request.hardware.name}: {days(each.days)} days, {dollars(each.usd)}"


def question_of(offers: list[Offer], best: Offer, **asked) -> dict:
    """`question` of plan.json. asked: what was asked for; None is left out."""
    pareto = front(offers)
    rows = [{"hardware": each.request.hardware.name, "devices": each.request.devices,
             "batch_size": each.request.batch_size, "days": each.days, "band_days": each.band_days,
             "usd_total": each.usd, "price": price_of(each.request.hardware), "layout": each.best["layout"],
             "on_front": each in pareto, "chosen": each is best}
            if each.best else {"hardware": each.request.hardware.name, "devices": each.request.devices,
                               "reason": each.reason} for each in offers]
    return {key: value for key, value in asked.items() if value is not None} | {"bill": "expected", "offers": rows}


def price_of(hardware: HardwareConfig) -> dict:
    """What a GPU-hour was taken to cost, whence, how long ago (days), and whether anybody offers it at that."""
    price = {key: getattr(hardware, key) for key in ("usd_per_h", "market", "source", "date")}
    return price | {"age_days": age_days(price["date"], date.today()), "assumed": assumed(hardware.source)}


def price_lines(prices: list[tuple[str, dict]]) -> list[str]:
    """What a GPU-hour costs on which hardware, whence and how old; each once."""
    return list(dict.fromkeys(f"  {name:<10} {price_words(price)}" for name, price in prices))


class Told:
    """Offers as they come, for progress on stderr, and in the end as a table."""

    def __call__(self, each: Offer) -> None:
        if sys.stderr.isatty():
            print(f"  {offer_words(each) if each.best else each.reason}", file=sys.stderr)

    def show(self, offers: list[Offer], best: Offer | None) -> None:
        """The table of these by number of GPUs, with the price of each kind; below it what cannot be planned."""
        out = console(markup=False)
        table = grid("<hardware", "GPUs", "tokens\na step", "days", "P10-P90", "GPU-hours", "USD", "<layout", "<")
        pareto, compared = front(offers), comparable(offers)
        names = list(dict.fromkeys(each.request.hardware.name for each in offers))
        offers = sorted(offers, key=lambda each: (names.index(each.request.hardware.name), each.request.devices))
        for each in (each for each in offers if each.plan):
            name, devices = each.request.hardware.name, f"{each.request.devices:,}"
            batch = format_number(each.request.batch_size * each.request.seq_len)
            if each.best is None:
                table.add_row(name, devices, batch, "", "", "", "", each.reason, "")
                continue
            marks = ["on the front"] * (each in pareto)
            marks += ["price assumed, so not compared in dollars"] * (each.usd is not None and each not in compared)
            table.add_row(name, devices, batch, days(each.days), "-".join(map(days, each.band_days)),
                          f"{each.expected['gpu_hours']:,.0f}", dollars(each.usd), layout_words(each.best["layout"]),
                          ", ".join(marks + ["chosen"] * (each is best)))
        if table.row_count:
            out.print(table)
        lines = price_lines([(each.request.hardware.name, price_of(each.request.hardware))
                             for each in offers if each.best])
        follows = len({each.request.batch_size for each in offers}) > 1
        out.print("\n".join([*lacking_lines(offers), *[FOLLOWS] * follows,
                             *([f"{BASIS} All predicted. A GPU-hour:", *lines] if lines else []), ""]))


def lacking_lines(offers: list[Offer]) -> list[str]:
    """What cannot be planned and why, once for all numbers of GPUs."""
    found = {(each.request.hardware.name, each.reason.split("; ")[0].split(" for hardware=")[0]): None
             for each in offers if not each.plan}
    return [f"not planned: {name}: {reason}" for name, reason in found]
