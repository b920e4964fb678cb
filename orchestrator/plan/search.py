"""Every layout of a model on so many devices: refused with its reason, or put on the clock if it can be among the best.

The degrees (pp, tp, cp, ep, what is left is dp), the microbatch and the precision make a cell; cells are visited in the
order of a lower bound of their step time, so that the search ends where the rest cannot be better. In a cell, every
schedule takes the cheapest recompute and ZeRO stage that fits: what costs more time for memory that is not needed is
refused. `train` keeps more than a plan assumes: where that does not fit, its own cheapest recompute is looked at, too.
Predicted, all of it.
"""

import re
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import islice
from math import inf

from model.config import divisors
from orchestrator.config import Recompute, Schedule
from orchestrator.plan.block import LayerTime, head_time, layer_time
from orchestrator.plan.bound import clock_s, floor_s
from orchestrator.plan.estimate import Estimate, check_hardware, estimate, linked
from orchestrator.plan.layout import LOOPED_SCHEDULES, ramp_fault
from orchestrator.plan.memory import activation_peaks, too_large
from orchestrator.plan.request import DEGREES, SCHEDULES, Request, divides_heads, layout_of
from orchestrator.plan.runs import cannot_grow, cannot_run, not_run
from orchestrator.plan.workload import UNSCHEDULED, Workload, illegal

VIRTUAL_STAGES = (2, 3, 4)
MICROBATCH_SEQUENCES = (1, 2, 4, 8)
MAX_PP, MIN_CONTEXT = 64, 4096
NUMBER = r"\d[\d.,e+]*"
PARTICULAR = re.compile("|".join([*SCHEDULES, r", \S+ of them \w+", NUMBER]))
"""What two reasons of one rule may differ in: schedules, the largest part of memory, numbers."""
SLOWER = "slower: takes at least {seconds:.3g} s a step"


@dataclass(frozen=True)
class Candidate:
    work: Workload
    found: Estimate


@dataclass(frozen=True)
class Refused:
    layout: dict
    reason: str
    number: int = 1
    """Layouts that this stands for: the same but for what the reason does not depend on."""


@dataclass(frozen=True)
class Plan:
    request: Request
    candidates: list[Candidate]
    """That fit, fastest first."""
    refused: list[Refused]
    considered: int

    def kinds_refused(self) -> dict[str, list[Refused]]:
        """By the rule that refused them, those first that missed by least: of the smallest number in its words."""
        kinds: dict[str, list[Refused]] = {}
        for item in self.refused:
            kinds.setdefault(PARTICULAR.sub("", item.reason), []).append(item)
        return {kind: sorted(items, key=_missed_by) for kind, items in kinds.items()}


def _missed_by(item: Refused) -> float:
    number = re.search(NUMBER, item.reason)
    return float(number[0].replace(",", "").rstrip(".")) if number else 0.0


@dataclass(frozen=True)
class _Cell:
    work: Workload
    floor_s: float
    """No schedule is quicker: products and attention, shared evenly by the pipeline's ranks."""


def search(request: Request) -> Plan:
    """Enumerate, refuse or price, rank. `ValueError` if the hardware entry lacks a figure.

    Always the least lower bound next: a cell is opened into its layouts, a layout is put on the clock.
    """
    uncut = _uncut(request)
    best, refused, considered, number = _Best(request.keep), [*uncut], len(uncut), 0
    queue: list[tuple] = []
    for cell in _cells(request):
        variants = list(variants_of(cell.work, request))
        considered += len(variants) * len(SAVINGS)
        while queue and queue[0][0] <= cell.floor_s:
            _clock_next(queue, best, refused)
        if best.out_of_reach(cell.floor_s, _kinds(not_run(cell.work) is None)):
            refused.append(_slower(cell.work, cell.floor_s, len(variants) * len(SAVINGS)))
            continue
        for work in variants:
            for floor, each, kinds in _fitting(work, best, refused, request):
                heappush(queue, (floor, number, each, kinds))
                number += 1
    while queue:
        _clock_next(queue, best, refused)
    kept, slower = best.kept()
    refused += [_slower(work, seconds, 1) for work, seconds in slower]
    found = [Candidate(work, estimate(work)) for work in kept]
    found.sort(key=lambda candidate: (candidate.found.step_time_s, candidate.found.memory_gib["total"]))
    return Plan(request, found, refused, considered)


def _clock_next(queue: list[tuple], best: "_Best", refused: list[Refused]) -> None:
    floor, _, work, kinds = heappop(queue)
    if best.out_of_reach(floor, kinds):
        refused.append(_slower(work, floor, 1))
    else:
        best.add(work, kinds)


def least_step_s(request: Request) -> float:
    """Lower bound of a step on so many devices, in any layout that was asked for; infinite where there is none."""
    return min((cell.floor_s for cell in _cells(request)), default=inf)


def _cells(request: Request) -> list[_Cell]:
    layers: dict[tuple, float] = {}
    for work in islice(layouts(request), 1):
        check_hardware(work)
    cells = [_Cell(work, _even_s(work, layers)) for work in layouts(request)
             if request.asks(work, "pp", "dp", "ep", "microbatches", *DEGREES)]
    return sorted(cells, key=lambda cell: cell.floor_s)


def layouts(request: Request) -> Iterator[Workload]:
    """Degrees, microbatch and precision, before schedule, recompute and ZeRO stage; all divisors, not powers of two."""
    model, devices, pinned = request.model, request.devices, dict(request.pinned)
    hardware = linked(request.hardware, devices)
    experts = model.n_routed_experts or 1
    uneven = {ep: request.routing.imbalance(ep) for ep in divisors(experts)}
    dtypes = (request.dtype,)
    if request.dtype == "any":
        dtypes = ("bf16", "fp8") if request.hardware.fp8_tflops else ("bf16",)
    for pp in (pp for pp in divisors(devices) if pp <= min(model.n_layers, max(MAX_PP, pinned.get("pp", 1)))):
        for tp in (tp for tp in divisors(devices // pp) if tp <= request.most_tp
                   and divides_heads(model, tp)):
            for cp in (cp for cp in divisors(devices // (pp * tp)) if not _not_cut(request.seq_len, cp)):
                dp = devices // (pp * tp * cp)
                if _cannot_begin(request, dp):
                    continue
                for ep in (ep for ep in divisors(dp * cp * tp) if experts % ep == 0):
                    for microbatches in _microbatches(request.batch_size, dp, pinned.get("microbatches")):
                        for dtype in dtypes:
                            yield Workload(model, hardware, request.seq_len, request.batch_size, pp, dp, ep,
                                           UNSCHEDULED, microbatches, tp=tp, cp=cp, dtype=dtype, imbalance=uneven[ep],
                                           stack=request.stack, assumptions=request.assumptions,
                                           calibration=request.calibration, keeping=request.keeping)


def _microbatches(batch_size: int, dp: int, asked: int | None) -> list[int]:
    """Of so many sequences on each of dp ranks: what was asked for, else by the usual sizes."""
    numbers = [asked] if asked else [batch_size // (dp * sequences) for sequences in MICROBATCH_SEQUENCES
                                     if batch_size % (dp * sequences) == 0]
    return [number for number in numbers if batch_size % (dp * number) == 0]


def variants_of(work: Workload, request: Request) -> Iterator[Workload]:
    """The cell's schedules, and virtual stages where they loop: all of them, or those that were asked for."""
    pinned = dict(request.pinned)
    name, stages = pinned.get("schedule"), pinned.get("stages_per_rank", 2)
    if work.pp == 1:
        if name in (None, UNSCHEDULED):
            yield work
        return
    for each in request.schedules if name is None else (name,):
        looped = each != "dualpipe" and Schedule[each] in LOOPED_SCHEDULES
        for virtual in sorted({*VIRTUAL_STAGES, max(2, stages)}) if looped else (2,):
            found = replace(work, schedule=each, stages_per_rank=virtual)
            if request.asks(found, "stages_per_rank") or not looped and name:  # another schedule does not read it
                yield found


SAVINGS = tuple((recompute, zero) for recompute in Recompute for zero in (1, 2, 3))
"""Ways to need less memory, dearer from left to right in both; a recompute may beat a ZeRO stage above 1. Stages 2 and
3 are looked at where memory wants them, although summing and clearing fewer gradients may save 4% of a step."""
UNNEEDED = "saves memory that is not needed"


def _kinds(runs: bool) -> tuple[str, ...]:
    return (PLANNED, RUNNING) if runs else (PLANNED,)


def _fitting(work: Workload, best: "_Best", refused: list[Refused],
             request: Request) -> Iterator[tuple[float, Workload, tuple[str, ...]]]:
    """The ways of this layout that are worth a clock: lower bound, itself, among whom it may be the fastest; why the
    others are not goes to `refused`."""
    reason = illegal(work)
    floor = floor_s(replace(work, zero=3)) if reason is None else 0.0  # sums fewer gradients than stage 1
    if reason is None and best.out_of_reach(floor, _kinds(not_run(work) is None)):
        reason = SLOWER.format(seconds=floor)
    if reason is not None:
        refused.append(Refused(layout_of(work), reason, len(SAVINGS)))
        return
    tried, peaks, enough, runs = 0, {}, None, False
    for recompute, zero in SAVINGS:
        each = replace(work, recompute=recompute, zero=zero)
        tried += 1
        if recompute is enough:
            refused.append(Refused(layout_of(each), UNNEEDED))
            continue
        reason = illegal(each)
        if reason is None and zero > 1 and work.replicas == work.expert_replicas == 1:
            reason = f"ZeRO stage {zero} shards over data-parallel replicas, and this layout has none"
        if not request.asks(each, "recompute", "zero"):
            reason = "another recompute was asked for"
        if reason is None:
            if recompute not in peaks:
                peaks[recompute] = activation_peaks(each)
            reason = too_large(each, peaks[recompute])
        if reason is not None:
            refused.append(Refused(layout_of(each), reason))
            continue
        runs = not (cannot_run(each) or cannot_grow(each, request.terms.batch_start))
        yield floor if recompute is Recompute.none and zero > 1 else floor_s(each), each, _kinds(runs)
        enough = recompute
        if zero == 1:
            break
    unneeded = len(SAVINGS) - tried
    if unneeded and not runs and (each := _needed_to_run(work, enough, best, request)):
        yield floor_s(each), each, (RUNNING,)
        unneeded -= 1
    if unneeded:
        refused.append(Refused(layout_of(replace(work, recompute=Recompute.full)), UNNEEDED, unneeded))


def _needed_to_run(work: Workload, enough: Recompute, best: "_Best", request: Request) -> Workload | None:
    """This layout with the least recompute beyond `enough` with which it fits as `train` keeps it, if it is in reach.
    """
    if not_run(work) or cannot_grow(work, request.terms.batch_start):
        return None
    for recompute in list(Recompute)[list(Recompute).index(enough) + 1:]:
        each = replace(work, recompute=recompute)
        if illegal(each) or not request.asks(each, "recompute", "zero"):
            continue
        if not best.out_of_reach(floor_s(each), (RUNNING,)) and not cannot_run(each):
            return each
    return None


def _uncut(request: Request) -> list[Refused]:
    """Context parallelism of up to 8 ranks that does not suit the sequences, replicas that do not suit the ramp."""
    reasons = {("cp", cp): _not_cut(request.seq_len, cp) for cp in range(2, 9) if request.devices % cp == 0}
    reasons |= {("dp", dp): _cannot_begin(request, dp) for dp in divisors(request.devices)}
    return [Refused({key: degree}, reason) for (key, degree), reason in reasons.items() if reason]


def _not_cut(seq_len: int, cp: int) -> str | None:
    """Why so many ranks do not share a sequence, or None. Under a causal mask each has an early and a late part of it,
    which evens the work out, and a ring passes equal ones."""
    if cp > 1 and seq_len < MIN_CONTEXT * cp:
        return (f"leaves a rank {seq_len // cp} tokens of a sequence; data parallelism takes whole ones for the same "
                "time")
    if cp > 1 and seq_len % (2 * cp):
        return f"a sequence of {seq_len} tokens has no {2 * cp} equal parts"
    return None


def _cannot_begin(request: Request, dp: int) -> str | None:
    """Why the ramp does not begin on so many replicas, or None; one that begins above the batch suits no number."""
    start, batch = request.terms.batch_start, request.batch_size
    fault = ramp_fault(start, batch, dp, f"dp={dp}") if start <= batch else None
    return f"train.batch_start={start}: {fault[0]}" if fault else None


def _even_s(work: Workload, layers: dict) -> float:
    """Lower bound of a step in this cell: every rank an equal share of all layers, no communication, no bubble.

    layers: seconds of blocks and head, by what they depend on; filled here.
    """
    key, work = (work.tp, work.cp, work.ep, work.dtype, work.microbatch_tokens), replace(work, zero=3)  # the quickest
    if key not in layers:
        model = work.model
        moe = sum(model.is_moe(layer) for layer in range(model.n_layers))
        parts = [(moe, lambda: layer_time(work, True)), (model.n_layers - moe, lambda: layer_time(work, False)),
                 (1, lambda: head_time(work))]
        layers[key] = sum(number * _compute_s(time()) for number, time in parts if number)
    return work.calibration.forward_backward * layers[key] * work.microbatches / work.pp


def _compute_s(time: LayerTime) -> float:
    return time.forward + time.backward + time.weight


PLANNED, RUNNING = "planned", "running"
"""What a layout may be among the fastest of: those that fit as a plan counts memory, those that `train` runs."""


class _Best:
    """The fastest layouts of each kind met so far, by the clock."""

    def __init__(self, keep: int):
        self.keep = keep
        self.met: list[tuple[float, int, Workload]] = []
        self.fastest: dict[str, list[tuple[float, int, Workload]]] = {PLANNED: [], RUNNING: []}

    def out_of_reach(self, floor_s: float, kinds: tuple[str, ...]) -> bool:
        """Whether a layout that takes at least so long can be among the kept ones no more."""
        return self._limit(kinds) <= floor_s

    def _limit(self, kinds: tuple[str, ...]) -> float:
        """What is slower is not kept."""
        fastest = [self.fastest[kind] for kind in kinds]
        return max(kept[self.keep - 1][0] if len(kept) >= self.keep else inf for kept in fastest)

    def add(self, work: Workload, kinds: tuple[str, ...]) -> None:
        timed = clock_s(work, below=self._limit(kinds)), len(self.met), work
        for kept in (self.met, *(self.fastest[kind] for kind in kinds)):
            insort(kept, timed)

    def kept(self) -> tuple[list[Workload], list[tuple[Workload, float]]]:
        """Those that are kept, and the others with their time."""
        numbers = {number for fastest in self.fastest.values() for _, number, _ in fastest[: self.keep]}
        return ([work for _, number, work in self.met if number in numbers],
                [(work, seconds) for seconds, number, work in self.met if number not in numbers])


def _slower(work: Workload, seconds: float, number: int) -> Refused:
    return Refused(layout_of(work), SLOWER.format(seconds=seconds), number)
