"""`sparing plan` with a question: words with several values, or a limit, become one plan and a table of what was asked.

    hardware=h100,h200  cluster=a,b  gpus=64,128     one offer each, and the front of dollars against days
    hardware=all                                     every entry of conf/hardware; objective=dollars: the cheapest type
    gpus=fit                                         the smallest cluster that holds the model
    deadline_days=30                                 GPUs needed
    budget_usd=1e6                                   with tokens: the fastest within it; with gpus alone: tokens

The last three go with several hardware= too: the best of what each of them offers. A deadline, a budget and what is
cheapest go by the expected bill.
"""

from dataclasses import dataclass, replace
from itertools import product

from orchestrator.errors import BadRequest, NotFit
from orchestrator.own_files import is_own
from orchestrator.plan.hardware import MARKETS, catalogue, hardware_named
from orchestrator.plan.questions import (
    Offer,
    chosen,
    for_budget,
    for_deadline,
    offer,
    smallest,
    tokens_for,
)
from orchestrator.plan.request import Request
from orchestrator.plan_format import dollars
from orchestrator.plan_offers import Told, offer_words, question_of
from orchestrator.plan_request import compose_plan, number, read_request
from orchestrator.report_plots import format_number

NOT_HELD = "no cluster holds it"
OPTIONS = ("objective", "deadline_days", "budget_usd")
MANY = ("hardware", "cluster", "gpus")
MOST_HOURS = 1e12
"""That a budget may buy: more is a price of nothing, or a slip of the keyboard, and would be counted to."""


@dataclass(frozen=True)
class Answer:
    """The words of the one plan that answers, and what plan.json says of the question."""

    options: dict[str, str]
    overrides: list[str]
    question: dict | None = None


def settle(options: dict[str, str], overrides: list[str]) -> Answer:
    """Words of one plan stay as they are; of a question, the table is printed and the words of its answer returned."""
    objective = options.get("objective", "dollars" if "deadline_days" in options else "time")
    if objective not in ("time", "dollars"):
        raise BadRequest(f"objective={objective}: must be time or dollars; use objective=dollars")
    words = {key: options.get(key) or _value(overrides, key) for key in MANY}
    deadline, budget = (number(key, options[key], least=1e-6, example=example) if key in options else None
                        for key, example in (("deadline_days", "30"), ("budget_usd", "1e6")))
    several = [key for key in MANY if words[key] and ("," in words[key] or (key, words[key]) == ("hardware", "all"))]
    rest = {key: value for key, value in options.items() if key not in OPTIONS}
    if not several and deadline is None and budget is None and words["gpus"] != "fit":
        return Answer(rest, overrides)
    if deadline is not None and budget is not None:
        raise BadRequest(f"deadline_days={deadline:g}: does not go with budget_usd; ask one at a time")
    own = deadline is not None or budget is not None or words["gpus"] == "fit"
    if several and not (own and several == ["hardware"]):
        for key in ("deadline_days", "budget_usd"):
            if key in options:
                raise BadRequest(f"{key}={options[key]}: finds the number of GPUs itself, for one or several "
                                 f"hardware=; it does not go with {several[0]}={words[several[0]]}")
        return _compared(rest, overrides, words, objective)
    tokens_asked = budget is not None and "tokens" not in options
    if own and not tokens_asked and words["gpus"] not in (None, "fit"):
        limit = "deadline_days" if deadline is not None else "budget_usd"
        tokens = ", or tokens, to ask for them" if deadline is None else ""
        raise BadRequest(f"gpus={words['gpus']}: does not go with {limit}={options[limit]}, which finds the number of "
                         f"GPUs; leave one of them out{tokens}")
    if tokens_asked and several:
        raise BadRequest(f"budget_usd={options['budget_usd']}: buys tokens on one kind of GPU; give tokens too, or one "
                         f"of hardware={words['hardware']}")
    if tokens_asked:
        return _tokens_for(rest, overrides, budget)
    return _limited(rest, overrides, words["hardware"], _Limit(deadline, budget, objective))


@dataclass(frozen=True)
class _Limit:
    deadline: float | None
    budget: float | None
    objective: str

    def __str__(self) -> str:
        if self.deadline is None and self.budget is None:
            return "gpus=fit"
        return f"budget_usd={self.budget:g}" if self.deadline is None else f"deadline_days={self.deadline:g}"

    def keeps(self, each: Offer) -> bool:
        usd = float("inf") if each.usd is None else each.usd
        return each.days <= (self.deadline or float("inf")) and (self.budget is None or usd <= self.budget)


def _compared(options: dict[str, str], overrides: list[str], words: dict, objective: str) -> Answer:
    """An offer for every combination of the values."""
    values = {key: _listed(word or "") or [None] for key, word in words.items()}
    if words["hardware"]:
        values["hardware"] = _names(words["hardware"])
    told, offers = Told(), {}
    fixed = [word for word in overrides if word.split("=", 1)[0] not in MANY]
    for combination in product(*(values[key] for key in MANY)):
        picked = {key: value for key, value in zip(MANY, combination, strict=True) if value}
        gpus = picked.pop("gpus", None)
        each = options | ({"gpus": gpus} if gpus else {}), [*(f"{k}={v}" for k, v in picked.items()), *fixed]
        found = _offer(*each)
        offers[found] = each
        told(found)
    everyone = list(offers)
    best = chosen(everyone, objective)
    told.show(everyone, best)
    if best is None:
        _priceless(everyone, objective)
        _lacking(everyone)
        raise NotFit(f"model={everyone[0].request.model.name}: fits on none of them; use more GPUs, or larger ones")
    return Answer(*offers[best], question_of(everyone, best, objective=objective))


def _tokens_for(options: dict[str, str], overrides: list[str], budget: float) -> Answer:
    one = offer(_request(options | {"tokens": "1e12"}, overrides))
    _check_buys(one.request, budget)
    if one.best is None:
        raise NotFit(f"gpus={one.request.devices}: {one.reason or 'no layout fits'}")
    tokens = tokens_for(one, budget)
    if not tokens:
        raise NotFit(f"budget_usd={budget:g}: does not pay for start-up and one step on {one.request.devices:,} x "
                     f"{one.request.hardware.name}; use more money, fewer GPUs or a smaller train.batch_size")
    print(f"{dollars(budget)} buy {format_number(tokens)} tokens on {one.request.devices:,} x "
          f"{one.request.hardware.name}, by the expected bill\n")
    return Answer(options | {"tokens": repr(tokens)}, overrides, {"budget_usd": budget, "tokens": tokens})


def _limited(options: dict[str, str], overrides: list[str], asked: str | None, limit: _Limit) -> Answer:
    """GPUs for a deadline, the fastest for a budget, the smallest cluster that fits; of one kind of GPU or the best of
    several."""
    told, known, fixed = Told(), {}, _sized(overrides)
    names = _names(asked) if asked else [None]
    for name in names:
        words = [f"hardware={name}" if name and word.startswith("hardware=") else word for word in fixed]
        try:
            start = _request(options | {"gpus": "8"}, words, sized=False)
        except BadRequest as error:
            if len(names) == 1 or not _no_market(error, options):
                raise
            lacking = Offer(_unpriced(options | {"gpus": "8"}, words, sized=False), None, str(error))
            told(lacking)
            known[lacking] = words
            continue
        if len(names) == 1 and str(limit) == "gpus=fit":
            return _fit(options, words, start)
        if limit.budget is not None and (len(names) == 1 or start.hardware.usd_per_h is not None):
            _check_buys(start, limit.budget)
        for each in _offers(start, limit, told):
            known[each] = words
    offers = list(known)
    able = [each for each in offers if limit.keeps(each)]
    unpriced = limit.deadline is not None and all(each.usd is None for each in able)
    best = chosen(able, "time" if unpriced else limit.objective)
    if len(offers) > 1 or offers and (best is None or limit.objective == "dollars"):
        told.show(offers, best)
    if best is None:
        _priceless(able, limit.objective)
        _lacking(offers)
        near = [each for each in offers if each.best]
        nearest = min(near, key=lambda each: each.days if limit.deadline else each.usd or float("inf"), default=None)
        least = f"; the nearest is {offer_words(nearest)}" if nearest else ""
        of = start.hardware.name if len(names) == 1 else ", ".join(names)
        raise NotFit(f"{limit}: no number of {of} that was tried, up to {start.most_devices:,}, meets it{least}")
    question = {"deadline_days": limit.deadline, "budget_usd": limit.budget}
    if limit.deadline is None and limit.budget is None:
        question["smallest"] = best.request.devices
    return Answer(options | {"gpus": str(best.request.devices)}, known[best],
                  question_of(offers, best, **question))


def _fit(options: dict[str, str], words: list[str], start: Request) -> Answer:
    try:
        least = smallest(start)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    if least is None:
        raise NotFit(f"gpus=fit: no cluster up to {start.most_devices:,} x {start.hardware.name} holds "
                     f"model={start.model.name}; {start.more_memory}")
    return Answer(options | {"gpus": str(least.devices)}, words, {"smallest": least.devices})


def _offers(start: Request, limit: _Limit, told: Told) -> list[Offer]:
    """Of one kind of GPU; one that lacks a figure is an offer with its reason."""
    try:
        if limit.deadline is not None:
            return for_deadline(start, limit.deadline, told)
        if limit.budget is not None:
            return for_budget(start, limit.budget, told)
        least = smallest(start)
        found = Offer(start, None, NOT_HELD) if least is None else offer(least)
    except BadRequest:
        raise
    except ValueError as error:
        found = Offer(start, None, str(error))
    told(found)
    return [found]


def _names(asked: str) -> list[str]:
    """Hardware entries of a list, or all with a data sheet of a GPU."""
    if asked == "all":
        return [name for name, entry in catalogue().items() if entry.device == "cuda"]
    names = _listed(asked)
    for name in names:
        if not is_own("hardware", name):
            hardware_named(name)
    return names


def _listed(text: str) -> list[str]:
    """Values that commas separate, each once."""
    return list(dict.fromkeys(each for each in text.strip("[]").split(",") if each))


def _request(options: dict[str, str], overrides: list[str], *, sized: bool = True) -> Request:
    return read_request(options, *compose_plan(overrides), sized=sized)


def _offer(options: dict[str, str], overrides: list[str]) -> Offer:
    """A device that has no price of the market that was asked for is an offer with that reason."""
    try:
        return offer(_request(options, overrides))
    except BadRequest as error:
        if not _no_market(error, options):
            raise
        return Offer(_unpriced(options, overrides), None, str(error))


def _no_market(error: BadRequest, options: dict[str, str]) -> bool:
    return str(error).startswith("market=") and options.get("market", MARKETS[0]) in MARKETS


def _unpriced(options: dict[str, str], overrides: list[str], *, sized: bool = True) -> Request:
    """The same request without the price that is not known."""
    config, given = compose_plan(overrides)
    free = replace(config, hardware=replace(config.hardware, usd_per_h=0.0))
    found = read_request({key: value for key, value in options.items() if key != "market"}, free, given, sized=sized)
    return replace(found, hardware=replace(config.hardware, usd_per_h=None))


def _sized(overrides: list[str]) -> list[str]:
    """Without a cluster, which is a number of GPUs, but with its hardware."""
    cluster = _value(overrides, "cluster")
    if cluster is None:
        return overrides
    kept = [word for word in overrides if word.split("=", 1)[0] != "cluster"]
    return kept if _value(kept, "hardware") else [*kept, f"hardware={compose_plan(overrides)[0].hardware.name}"]


def _value(overrides: list[str], key: str) -> str | None:
    return next((word.split("=", 1)[1] for word in overrides if word.split("=", 1)[0] == key), None)


def _need_price(request: Request, key: str) -> None:
    if request.hardware.usd_per_h is None:
        raise BadRequest(f"hardware.usd_per_h: is not known for hardware={request.hardware.name}, and {key} needs it; "
                         "set hardware.usd_per_h=DOLLARS, or choose one that has a price of "
                         f"market={request.hardware.market}: {', '.join(_with_price(request.hardware.market))}")


def _check_buys(request: Request, budget: float) -> None:
    _need_price(request, "budget_usd")
    price = request.hardware.usd_per_h
    if budget > MOST_HOURS * price:
        raise BadRequest(f"budget_usd={budget:g}: buys more than {MOST_HOURS:g} GPU-hours at hardware.usd_per_h="
                         f"{price:g}; set that to what one costs, or give less money")


def _with_price(market: str) -> list[str]:
    """GPUs of the catalogue that have one."""
    return [name for name, each in catalogue().items() if each.device == "cuda" and None is not (
        each if each.market == market else getattr(each, market)).usd_per_h]


def _priceless(offers: list[Offer], objective: str) -> None:
    if objective == "dollars":
        for each in offers:
            if each.best:
                _need_price(each.request, "objective=dollars")


def _lacking(offers: list[Offer]) -> None:
    """Where every offer lacks a figure, that is the answer."""
    if offers and all(each.plan is None and each.reason != NOT_HELD for each in offers):
        raise BadRequest(offers[0].reason)
