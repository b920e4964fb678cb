"""Questions that turn a plan round: how many GPUs, which type, how many tokens, what is the fastest for the money.

Each is answered by searches over numbers of GPUs and hardware entries, on the expected bill: what an invoice would
show, start-up, validation, checkpoints and failures included. All of it is predicted.

Numbers of GPUs are whole nodes, or some GPUs of one. They are tried on a coarse grid (`sizes`), and then between the
last that fails and the first that does. Whether a model fits is arithmetic without a clock, so every number in between
is tried; days and dollars take a search each, so that these are halved (`_first`), as if more GPUs were always faster.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, lcm

from orchestrator.config import Recompute
from orchestrator.plan.bill import make_bill
from orchestrator.plan.confidence import band
from orchestrator.plan.estimate import check_hardware, estimate
from orchestrator.plan.hardware import MACHINE, TRAY
from orchestrator.plan.memory import too_large
from orchestrator.plan.money import bill_of, terms_for
from orchestrator.plan.planner import default_batch, price
from orchestrator.plan.request import Request
from orchestrator.plan.search import Candidate, Plan, layouts, least_step_s, search, variants_of
from orchestrator.plan.workload import SPLIT, Workload, illegal

DEARER = 3
"""Sizes in a row that are dearer than a smaller one or than the budget, after which no cheaper one is looked for."""


@dataclass(frozen=True, eq=False)
class Offer:
    """The best plan for one hardware entry and one number of GPUs, or why there is none."""

    request: Request
    plan: Plan | None
    reason: str = ""
    expected: dict | None = None
    """The bill on which offers are compared: all that an invoice would show."""

    @cached_property
    def best(self) -> dict | None:
        return price(self.plan.candidates[0], self.request) if self.plan and self.plan.candidates else None

    @property
    def days(self) -> float:
        return self.expected["days"] if self.expected else inf

    @property
    def band_days(self) -> list[float]:
        """P10 and P90, as far as the step goes."""
        return [self.days * edge for edge in band(self.plan.candidates[0].work)]

    @property
    def usd(self) -> float | None:
        return self.expected["usd"] if self.expected else None


def offer(request: Request) -> Offer:
    """A hardware entry that lacks a figure is an offer with a reason, not an error."""
    try:
        plan = search(request)
        if not plan.candidates:
            return Offer(request, plan, "no layout fits")
        best = plan.candidates[0]
        return Offer(request, plan, expected=bill_of(request, best, terms_for(request, best.work))["expected"])
    except ValueError as error:
        return Offer(request, None, str(error))


def assumed(source: str) -> bool:
    """Whether nobody offers a device at a price of this source, which calls it an assumption."""
    return "assum" in source.lower()


def comparable(offers: list[Offer]) -> list[Offer]:
    """Those whose dollars say which is cheaper: with a price, and not an assumed one where others are on offer."""
    priced = [each for each in offers if each.usd is not None]
    return [each for each in priced if not assumed(each.request.hardware.source)] or priced


def front(offers: list[Offer]) -> list[Offer]:
    """Those that nothing beats in days and dollars both, fastest first, of `comparable` ones."""
    found: list[Offer] = []
    for each in sorted(comparable(offers), key=lambda each: (each.days, each.usd)):
        if not found or each.usd < found[-1].usd:
            found.append(each)
    return found


def chosen(offers: list[Offer], objective: str) -> Offer | None:
    """The fastest, of equally fast ones the cheapest; or the cheapest of `comparable` ones, then the fastest."""
    if objective == "dollars":
        return min(comparable(offers), key=lambda each: (each.usd, each.days), default=None)
    able = [each for each in offers if each.best]
    return min(able, key=lambda each: (each.days, inf if each.usd is None else each.usd), default=None)


def sizes(request: Request) -> Iterator[Request]:
    """The same question on 1, 2, 4, ... GPUs of a node, then on 1, 2, 3, 4, 6, 8, 12, ... nodes; where degrees were
    asked for, on such multiples of what they take."""
    node, unit = request.hardware.scale_up_devices, _unit(request)
    inside = [unit * 2**power for power in range(12) if unit * 2**power < node]
    whole = lcm(node, unit)
    for devices in [*inside, *sorted({whole * factor * 2**power for power in range(16) for factor in (1, 3)})]:
        each = resized(request, devices)
        if devices <= request.most_devices and each.batch_size * each.seq_len <= each.tokens:
            yield each


def between(low: int, high: Request) -> list[Request]:
    """The numbers of GPUs above `low` and below `high` that `sizes` leaves out: in a machine any, in a rack machines,
    else by nodes."""
    node, unit = high.hardware.scale_up_devices, _unit(high)
    step = unit if high.devices <= min(node, MACHINE) else lcm(TRAY if high.devices <= node else node, unit)
    return [resized(high, devices) for devices in range(low // step * step + step, high.devices, step)]


def _unit(request: Request) -> int:
    """GPUs that the degrees which were asked for take; others are a multiple."""
    pinned = dict(request.pinned)
    pp = pinned.get("pp", 1)
    return lcm(pp * pinned.get("dp", 1), pp * pinned.get("ep", 1))


def resized(request: Request, devices: int) -> Request:
    """On so many GPUs. A batch that was not asked for follows their number, and so does a CPU rank's share of its
    machine."""
    request = replace(request, devices=devices,
                      batch_size=request.batch_size if request.batch_asked else default_batch(devices, request.seq_len))
    if request.cpus is None:
        return request
    hardware, assumptions, calibration = request.cpus.shared_by(devices)
    return replace(request, hardware=hardware, calibration=calibration,
                   assumptions=replace(assumptions, overlap_cost=request.assumptions.overlap_cost))


def fits(request: Request) -> bool:
    """Whether some layout fits at all: the thriftiest ways, without a clock. ValueError if the hardware entry lacks a
    figure."""
    pinned = dict(request.pinned)
    for work in layouts(request):
        check_hardware(work)
        if not request.asks(work, "pp", "dp", "ep", "microbatches"):
            continue
        for each in variants_of(work, request) if {"schedule", "stages_per_rank"} & set(pinned) else (work,):
            thrifty = replace(each, recompute=_thriftiest(each, pinned), zero=3 if work.replicas > 1 else 1)
            if illegal(thrifty) is None and too_large(thrifty) is None:
                return True
    return False


def _thriftiest(work: Workload, pinned: dict) -> Recompute:
    if "recompute" in pinned:
        return Recompute[pinned["recompute"]]
    return Recompute.selective if work.pp > 1 and work.schedule in (*SPLIT, "dualpipe") else Recompute.full


def smallest(request: Request) -> Request | None:
    """The fewest GPUs that hold the model: whole nodes, or GPUs of one node."""
    low = 0
    for each in sizes(request):
        if fits(each):
            return next(filter(fits, between(low, each)), each)
        low = each.devices
    return None


def for_deadline(request: Request, days: float, tell: Callable[[Offer], None]) -> list[Offer]:
    """Offers on more and more GPUs; the last one, if any, is the smallest found that is done in time, and where none
    can be the one that may come nearest. `tell` is called with each, those above it too."""
    fitting: list[tuple[float, int]] = []

    def tried(each: Request) -> Offer | None:
        if not fits(each):
            return None
        fitting.append((least_bill(each)["days"], each.devices))
        if fitting[-1][0] > days:
            return None
        found = offer(each)
        tell(found)
        return found

    def in_time(found: Offer | None) -> bool:
        return found is not None and found.days <= days

    offers, low = [], 0
    for each in sizes(request):
        offers.append(tried(each))
        if in_time(offers[-1]):
            offers += _halved(between(low, each), tried, in_time)
            break
        low = each.devices
    offers = sorted(filter(None, offers), key=lambda each: each.request.devices)
    if not offers and fitting:
        offers = [offer(resized(request, min(fitting)[1]))]
        tell(offers[0])
    enough = next((number for number, each in enumerate(offers) if in_time(each)), len(offers))
    return offers[: enough + 1]


def for_budget(request: Request, usd: float, tell: Callable[[Offer], None]) -> list[Offer]:
    """Offers on more and more GPUs, until `DEARER` in a row are above the budget, and on some in between the largest
    that is within it and the next that is not. The smallest clusters may be dearer than larger ones, which have more
    memory; a number in between, which divides badly, dearer than its neighbours. Start-up grows with the number.
    """
    def tried(each: Request) -> Offer | None:
        if offers and least_bill(each)["usd"] > usd:
            return None
        offers.append(offer(each))
        tell(offers[-1])
        return offers[-1]

    def within(found: Offer | None) -> bool:
        return found is not None and found.usd is not None and found.usd <= usd

    offers: list[Offer] = []
    most = above = None
    last, dearer, least_usd = 0, 0, inf
    for each in sizes(request):
        if most and each.devices < 2 * last or not fits(each):
            continue
        found, last = tried(each), each.devices
        if within(found):
            most, above, dearer = each, None, 0
        elif most:
            above, dearer = above or each, dearer + 1
        elif found is not None and found.usd is not None:
            dearer = dearer + 1 if found.usd >= least_usd else 0
            least_usd = min(least_usd, found.usd)
        if dearer == DEARER:
            break
    if above:
        inner = between(most.devices, above)
        _halved(inner[:: max(1, len(inner) // 7)], tried, lambda found: not within(found))
    return offers


def least_bill(request: Request) -> dict:
    """Lower bound of the expected bill on so many devices: `days` and `usd`, 0 without a price."""
    terms = replace(request.terms, validate_every=0, batch_start=0, extension=())
    step_tokens = request.batch_size * request.seq_len
    try:
        return make_bill(devices=request.devices, tokens=request.tokens, batch_tokens=step_tokens, terms=terms,
                         step_time_s=least_step_s(request), usd_per_h=request.hardware.usd_per_h or 0.0)["expected"]
    except ValueError:  # which the offer will tell
        return {"days": 0.0, "usd": 0.0}


def _halved(requests: list[Request], tried: Callable, does: Callable) -> list:
    """What was tried of them to find the first that does, as if all after it did."""
    found = []

    def key(each: Request) -> bool:
        found.append(tried(each))
        return does(found[-1])

    bisect_right(requests, False, key=key)
    return found


def scaled(best: Candidate, request: Request) -> list[dict]:
    """The same layout on fewer and more replicas, the batch unchanged: what other numbers of GPUs make of days and
    dollars, without a search of their own. `devices`, `days` and `usd_total` of the expected bill; those that fit and
    that can run."""
    work, found = best.work, []
    for power in range(-3, 4):
        dp, microbatches = work.dp * 2**power, work.microbatches / 2**power
        if dp != int(dp) or microbatches != int(microbatches) or dp * work.cp * work.tp % work.ep:
            continue
        each = replace(work, dp=int(dp), microbatches=int(microbatches))
        if illegal(each) is None and too_large(each) is None:
            try:
                bill = bill_of(replace(request, devices=each.devices), Candidate(each, estimate(each)),
                               terms_for(request, each))["expected"]
            except ValueError:  # its ramp would cut sequences, or failures leave it no time
                continue
            found.append({"devices": each.devices, "days": bill["days"], "usd_total": bill["usd"]})
    return found


def tokens_for(found: Offer, usd: float) -> float | None:
    """Tokens that the budget buys by the expected bill, whole steps; None without a price."""
    if found.usd is None:
        return None
    request, best = found.request, found.plan.candidates[0]
    step = request.batch_size * request.seq_len
    terms = terms_for(request, best.work)
    per_step = found.best["usd_total"] / request.tokens * step

    def usd_for(steps: int) -> float:
        return bill_of(replace(request, tokens=steps * step), best, terms)["expected"]["usd"]

    return float(bisect_right(range(1, int(usd / per_step) + 1), usd, key=usd_for) * step)
