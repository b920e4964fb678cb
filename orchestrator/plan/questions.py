"""Questions that turn a plan round: how many GPUs, which type, how many tokens, what is the fastest for the money.

Each is answered by searches over numbers of GPUs and hardware entries, on the steady bill. All of it is predicted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

from orchestrator.config import Recompute
from orchestrator.plan.cost import model_flops
from orchestrator.plan.estimate import check_hardware, estimate
from orchestrator.plan.memory import too_large
from orchestrator.plan.planner import Candidate, Plan, Request, default_batch, make_plan, price
from orchestrator.plan.search import illegal, layouts

MOST_DEVICES = 16384


@dataclass(frozen=True)
class Offer:
    """The best plan for one hardware entry and one number of GPUs, or why there is none."""

    request: Request
    plan: Plan | None
    reason: str = ""

    @property
    def best(self) -> dict | None:
        return price(self.plan.candidates[0], self.request) if self.plan and self.plan.candidates else None

    @property
    def days(self) -> float:
        return self.best["days"] if self.best else inf

    @property
    def usd(self) -> float | None:
        return self.best["usd_total"] if self.best else None


def offer(request: Request) -> Offer:
    """A hardware entry that lacks a figure is an offer with a reason, not an error."""
    try:
        plan = make_plan(request)
    except ValueError as error:
        return Offer(request, None, str(error))
    return Offer(request, plan, "" if plan.candidates else "no layout fits")


def front(offers: list[Offer]) -> list[Offer]:
    """Those that nothing beats in days and dollars both, fastest first; without a price an offer is on no front."""
    priced = sorted((each for each in offers if each.usd is not None), key=lambda each: (each.days, each.usd))
    found: list[Offer] = []
    for each in priced:
        if not found or each.usd < found[-1].usd:
            found.append(each)
    return found


def chosen(offers: list[Offer], objective: str) -> Offer | None:
    """The fastest, or the cheapest of those with a price."""
    able = [each for each in offers if each.best and (objective == "time" or each.usd is not None)]
    return min(able, key=lambda each: each.days if objective == "time" else (each.usd, each.days), default=None)


def sizes(request: Request, most: int = MOST_DEVICES) -> Iterator[Request]:
    """The same question on 1, 2, 4, ... GPUs of a node, then on 1, 2, 3, 4, 6, 8, 12, ... nodes."""
    node = request.hardware.scale_up_devices
    inside = [2**power for power in range(12) if 2**power < node]
    nodes = sorted({factor * 2**power for power in range(16) for factor in (1, 3)})
    for devices in [*inside, *(node * number for number in nodes)]:
        each = resized(request, devices)
        if devices <= most and each.batch_size * each.seq_len <= each.tokens:
            yield each


def resized(request: Request, devices: int) -> Request:
    """On so many GPUs. A batch that was not asked for follows their number."""
    asked = request.batch_size != default_batch(request.devices)
    return replace(request, devices=devices, batch_size=request.batch_size if asked else default_batch(devices))


def fits(request: Request) -> bool:
    """Whether some layout fits at all: the thriftiest ways, without a clock. ValueError if the hardware entry lacks a
    figure."""
    for work in layouts(request):
        check_hardware(work)
        if not request.asks(work, "pp", "dp", "ep", "microbatches"):
            continue
        thrifty = replace(work, recompute=Recompute.full, zero=3 if work.replicas > 1 else 1)
        if illegal(thrifty) is None and too_large(thrifty) is None:
            return True
    return False


def smallest(request: Request) -> Request | None:
    """The least of `sizes` that holds the model."""
    return next((each for each in sizes(request) if fits(each)), None)


def for_deadline(request: Request, days: float, tell: Callable[[Offer], None]) -> list[Offer]:
    """Offers on more and more GPUs up to the first that is done in time. `tell` is called with each."""
    offers = []
    for each in sizes(request):
        flops = model_flops(each.model, each.tokens, each.seq_len)
        peak = max(each.hardware.bf16_tflops or inf, each.hardware.fp8_tflops or 0) * 1e12
        if flops / (peak * each.devices) > days * 86400 or not fits(each):
            continue
        offers.append(offer(each))
        tell(offers[-1])
        if offers[-1].days <= days:
            break
    return offers


def for_budget(request: Request, usd: float, tell: Callable[[Offer], None]) -> list[Offer]:
    """Offers on ever twice as many GPUs, from the smallest cluster that fits, while the bill is within the budget."""
    offers, least = [], smallest(request)
    devices = least.devices if least else MOST_DEVICES + 1
    while devices <= MOST_DEVICES:
        offers.append(offer(resized(request, devices)))
        tell(offers[-1])
        if offers[-1].usd is None or offers[-1].usd > usd:
            break
        devices *= 2
    return offers


def scaled(best: Candidate, request: Request) -> list[dict]:
    """The same layout on fewer and more replicas, the batch unchanged: what other numbers of GPUs make of days and
    dollars, without a search of their own. `devices`, `days` and `usd_total`; those that fit and that can run."""
    work, found = best.work, []
    for power in range(-3, 4):
        dp, microbatches = work.dp * 2**power, work.microbatches / 2**power
        if dp != int(dp) or microbatches != int(microbatches) or dp * work.cp * work.tp % work.ep:
            continue
        each = replace(work, dp=int(dp), microbatches=int(microbatches))
        if illegal(each) is None and too_large(each) is None:
            row = price(Candidate(each, estimate(each)), request)
            found.append({"devices": each.devices} | {key: row[key] for key in ("days", "usd_total")})
    return found


def tokens_for(found: Offer, usd: float) -> float | None:
    """Tokens that the budget buys at the steady bill, whole steps; None without a price."""
    if found.usd is None:
        return None
    step = found.request.batch_size * found.request.seq_len
    return usd / found.usd * found.request.tokens // step * step
