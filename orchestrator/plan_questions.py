"""`sparing plan` with a question: words with several values, or a limit, become one plan and a table of what was asked.

    hardware=h100,h200  cluster=a,b  gpus=64,128     one offer each, and the front of dollars against days
    hardware=all                                     every entry of conf/hardware; objective=dollars: the cheapest type
    gpus=fit                                         the smallest cluster that holds the model
    deadline_days=30                                 GPUs needed
    budget_usd=1e6                                   with tokens: the fastest within it; with gpus alone: tokens
"""

import sys
from dataclasses import dataclass
from itertools import product

from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest, NotFit
from orchestrator.plan.hardware import catalogue, hardware_named
from orchestrator.plan.planner import Request
from orchestrator.plan.questions import Offer, chosen, for_budget, for_deadline, front, offer, smallest, tokens_for
from orchestrator.plan_request import compose_plan, number, read_request
from orchestrator.plan_table import dollars, grid, layout_words

OPTIONS = ("objective", "deadline_days", "budget_usd")
MANY = ("hardware", "cluster", "gpus")


@dataclass(frozen=True)
class Answer:
    """The words of the one plan that answers, and what plan.json says of the question."""

    options: dict[str, str]
    overrides: list[str]
    question: dict | None = None


def settle(options: dict[str, str], overrides: list[str]) -> Answer:
    """Words of one plan stay as they are; of a question, the table is printed and the words of its answer returned."""
    objective = options.get("objective", "time")
    if objective not in ("time", "dollars"):
        raise BadRequest(f"objective={objective}: must be time or dollars; use objective=dollars")
    words = {key: options.get(key) or _value(overrides, key) for key in MANY}
    deadline, budget = (number(key, options[key]) if key in options else None for key in OPTIONS[1:])
    several = [key for key in MANY if words[key] and ("," in words[key] or (key, words[key]) == ("hardware", "all"))]
    rest = {key: value for key, value in options.items() if key not in OPTIONS}
    if not several and deadline is None and budget is None and words["gpus"] != "fit":
        return Answer(rest, overrides)
    if deadline is not None and budget is not None:
        raise BadRequest(f"deadline_days={deadline:g}: does not go with budget_usd; ask one at a time")
    if several:
        for key in ("deadline_days", "budget_usd"):
            if key in options:
                raise BadRequest(f"{key}={options[key]}: goes with one kind of GPU and one number, not with "
                                 f"{several[0]}={words[several[0]]}; leave one of them out")
        return _compared(rest, overrides, words, objective)
    return _limited(rest, overrides, deadline, budget)


def _compared(options: dict[str, str], overrides: list[str], words: dict, objective: str) -> Answer:
    """An offer for every combination of the values."""
    values = {key: [text for text in (word or "").strip("[]").split(",") if text] or [None]
              for key, word in words.items()}
    if values["hardware"] == ["all"]:
        values["hardware"] = [name for name, entry in catalogue().items() if entry.device == "cuda"]
    for name in values["hardware"]:
        if name:
            hardware_named(name)
    told, offers = _Told(), {}
    fixed = [word for word in overrides if word.split("=", 1)[0] not in MANY]
    for combination in product(*(values[key] for key in MANY)):
        picked = {key: value for key, value in zip(MANY, combination, strict=True) if value}
        gpus = picked.pop("gpus", None)
        each = options | ({"gpus": gpus} if gpus else {}), [*(f"{k}={v}" for k, v in picked.items()), *fixed]
        found = offer(_request(*each))
        offers[id(found)] = found, each
        told(found)
    everyone = [found for found, _ in offers.values()]
    best = chosen(everyone, objective)
    told.show(front(everyone), best)
    if best is None:
        _priceless(everyone, objective)
        raise NotFit(f"model={everyone[0].request.model.name}: fits on none of them; use more GPUs, or larger ones")
    return Answer(*offers[id(best)][1], _question(everyone, front(everyone), best, objective=objective))


def _limited(options: dict[str, str], overrides: list[str], deadline: float | None, budget: float | None) -> Answer:
    """GPUs for a deadline, the fastest for a budget, tokens for a budget, the smallest cluster that fits."""
    told, fixed = _Told(), _sized(overrides)
    if budget is not None and "tokens" not in options:
        one = offer(_request(options | {"tokens": "1e12"}, overrides))
        _need_price(one.request, "budget_usd")
        if one.best is None:
            raise NotFit(f"gpus={one.request.devices}: {one.reason or 'no layout fits'}")
        tokens = tokens_for(one, budget)
        print(f"{dollars(budget)} buy {tokens:.4g} tokens on {one.request.devices:,} x {one.request.hardware.name}\n")
        return Answer(options | {"tokens": repr(tokens)}, overrides, {"budget_usd": budget, "tokens": tokens})
    start = _request(options | {"gpus": "8"}, fixed)
    if deadline is None and budget is None:
        least = smallest(start)
        if least is None:
            raise NotFit(f"gpus=fit: no cluster up to 16,384 x {start.hardware.name} holds "
                         f"model={start.model.name}; use larger devices")
        return Answer(options | {"gpus": str(least.devices)}, fixed, {"smallest": least.devices})
    if budget is not None:
        _need_price(start, "budget_usd")
    offers = for_deadline(start, deadline, told) if deadline else for_budget(start, budget, told)
    able = [each for each in offers if each.days <= (deadline or float("inf"))
            and (budget is None or (each.usd or float("inf")) <= budget)]
    best = chosen(able, "time")
    told.show(front(offers), best)
    if best is None:
        asked = f"deadline_days={deadline:g}" if deadline else f"budget_usd={budget:g}"
        least = f"; the nearest is {_words(offers[-1] if deadline else offers[0])}" if offers else ""
        raise NotFit(f"{asked}: no number of {start.hardware.name} up to 16,384 meets it{least}")
    return Answer(options | {"gpus": str(best.request.devices)}, fixed,
                  _question(offers, front(offers), best, deadline_days=deadline, budget_usd=budget))


def too_small(request: Request) -> NotFit:
    """A cluster that holds the model in no layout, and the smallest that does."""
    least = smallest(request)
    remedy = (f"the smallest that holds it is gpus={least.devices}" if least else
              f"nor does it on any number up to 16,384 of {request.hardware.name}; use larger devices")
    return NotFit(f"gpus={request.devices}: no layout of model={request.model.name} fits on {request.devices} x "
                  f"{request.hardware.name}; {remedy}")


def _request(options: dict[str, str], overrides: list[str]) -> Request:
    return read_request(options, *compose_plan(overrides))


def _sized(overrides: list[str]) -> list[str]:
    """Without a cluster, which is a number of GPUs, but with its hardware."""
    cluster = _value(overrides, "cluster")
    if cluster is None:
        return overrides
    kept = [word for word in overrides if word.split("=", 1)[0] != "cluster"]
    return kept if _value(kept, "hardware") else [*kept, f"hardware={compose_config(overrides).hardware.name}"]


def _value(overrides: list[str], key: str) -> str | None:
    return next((word.split("=", 1)[1] for word in overrides if word.split("=", 1)[0] == key), None)


def _need_price(request: Request, key: str) -> None:
    if request.hardware.usd_per_h is None:
        raise BadRequest(f"hardware.usd_per_h: is not known for hardware={request.hardware.name}, and {key} needs it; "
                         "set hardware.usd_per_h=DOLLARS, or choose a device that has a price (`sparing plan prices`)")


def _priceless(offers: list[Offer], objective: str) -> None:
    if objective == "dollars":
        for each in offers:
            if each.best:
                _need_price(each.request, "objective=dollars")


def _words(each: Offer) -> str:
    return f"{each.request.devices} x {each.request.hardware.name}: {each.days:.1f} days, {dollars(each.usd)}"


def _question(offers: list[Offer], pareto: list[Offer], best: Offer, **asked) -> dict:
    """As plan.json has it."""
    rows = [{"hardware": each.request.hardware.name, "devices": each.request.devices, "days": each.best["days"],
             "usd_total": each.usd, "layout": each.best["layout"], "on_front": each in pareto, "chosen": each is best}
            if each.best else {"hardware": each.request.hardware.name, "devices": each.request.devices,
                               "reason": each.reason} for each in offers]
    return {key: value for key, value in asked.items() if value is not None} | {"offers": rows}


class _Told:
    """Offers as they come, for progress on stderr, and in the end as a table."""

    def __init__(self):
        self.offers: list[Offer] = []

    def __call__(self, each: Offer) -> None:
        self.offers.append(each)
        if sys.stderr.isatty():
            print(f"  {_words(each) if each.best else each.reason}", file=sys.stderr)

    def show(self, pareto: list[Offer], best: Offer | None) -> None:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True, width=150)
        table = grid("<hardware", "GPUs", "days", "GPU-hours", "USD", "<layout", "<")
        for each in self.offers:
            name, devices = each.request.hardware.name, f"{each.request.devices:,}"
            if each.best is None:
                table.add_row(name, devices, "", "", "", each.reason.split("; ")[0], "")
                continue
            marks = ["on the front of dollars against days"] * (each in pareto) + ["chosen"] * (each is best)
            table.add_row(name, devices, f"{each.days:.1f}", f"{each.best['gpu_hours']:,.0f}", dollars(each.usd),
                          layout_words(each.best["layout"]), ", ".join(marks))
        console.print(table)
        console.print("Steady bills, predicted.\n")
