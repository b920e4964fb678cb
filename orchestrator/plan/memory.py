"""How much memory a rank needs, by component: predicted, from the layout and the schedule's own order; no clock.

State is counted parameter by parameter, activations tensor by tensor (`activations`), the number of microbatches in
flight is read off the schedule's table. The peak is the largest sum over a rank's actions.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from model.config import ModelConfig
from orchestrator.config import HardwareConfig, Schedule
from orchestrator.plan.activations import (
    backward_bytes,
    block_bytes,
    first_head_bytes,
    gradient_bytes,
    head_bytes,
    loss_bytes,
    stream,
)
from orchestrator.plan.keeping import PLANNED
from orchestrator.plan.layout import stages_of
from orchestrator.plan.schedule import actions, dualpipe
from orchestrator.plan.workload import Workload, is_last, largest_block, shares, stage_layers, tables, whole_parameters

GIB = 2**30
FULL = "needs {total:,.1f} GiB of {have:,.1f} usable, {most:,.1f} of them {component}"


def memory_gib(work: Workload) -> dict[str, float]:
    """By component, with `total`, of the pipeline rank that needs most."""
    return max(group_memory_gib(work, activation_peaks(work)), key=lambda parts: parts["total"])


def rank_memory_gib(work: Workload) -> list[dict[str, float]]:
    """Of every pipeline rank, each by what it holds itself."""
    return group_memory_gib(work, activation_peaks(work, alone=True), alone=True)


def too_large(work: Workload, peaks: list[tuple[float, float, float]] | None = None) -> str | None:
    """Why it does not fit, or None if it does: the fullest rank against the usable share of the device.

    peaks: `activation_peaks`, if known.
    """
    have = work.hardware.memory_gib * work.assumptions.usable_memory
    need = max(group_memory_gib(work, peaks or activation_peaks(work)), key=lambda parts: parts["total"])
    if need["total"] <= have:
        return None
    component = max((name for name in need if name != "total"), key=need.get)
    return FULL.format(total=need["total"], have=have, most=need[component], component=component)


def group_memory_gib(work: Workload, peaks: list[tuple[float, float, float]], *,
                     alone: bool = False) -> list[dict[str, float]]:
    """Of every group of ranks that have as many parameters, with the peak of the fullest; alone: of every rank."""
    found = []
    for group, (held, logits, absent) in zip(_groups(work, alone), peaks, strict=True):
        dense, routed = shares(work, *group.parameters)
        parts = state_bytes(work, dense, routed)
        multiplied = dense - (group.looked_up + group.heads) / work.tp + routed
        parts["weights"] += work.keeping.cast * multiplied + work.keeping.head_cast * group.heads / work.tp
        parts["gradients"] -= absent
        buffers = _buffer_bytes(work, moe=routed > 0, reducing=not absent)
        parts |= {"activations": held, "logits": logits, "buffers": buffers}
        gib = {name: size / GIB for name, size in parts.items()} | {"framework": work.keeping.framework_gib}
        found.append(gib | {"total": sum(gib.values())})
    return found


def activation_peaks(work: Workload, *, alone: bool = False) -> list[tuple[float, float, float]]:
    """Per group of ranks (alone: per rank), bytes of activations, of logits and of gradients that are not there yet, at
    the action where most is held. It depends on the layout and on recompute, and where gradients are made late on the
    ZeRO stage."""
    groups = _groups(work, alone)
    kinds = {kind for group in groups for case in group.cases for kind in case.running}
    block = {moe: block_bytes(work, moe) for moe in kinds}
    backward = {moe: backward_bytes(work, moe) for moe in kinds}
    split = {moe: gradient_bytes(work, moe) for moe in (False, True)} if work.keeping.eager else {}
    head, loss = head_bytes(work), loss_bytes(work)
    gone = first_head_bytes(work)
    output = work.microbatch_tokens * stream(work) * work.keeping.element
    peaks = []
    for group in groups:
        best = 0.0, 0.0, 0.0, 0.0
        for case in group.cases:
            absent = state_bytes(work, *shares(work, *case.absent))["gradients"] if any(case.absent) else 0.0
            bodies = case.dense * block.get(False, 0.0) + case.moe * block.get(True, 0.0)
            bodies += case.split_dense * split.get(False, 0.0) + case.split_moe * split.get(True, 0.0)
            bodies += case.outputs * output
            heads = case.heads * head
            # A stage's backward begins with the loss, whose logits are gone when the blocks' turn comes.
            at_loss = heads + case.last * loss
            after_loss = heads - gone if case.last and not case.split_heads else heads
            in_block = bodies + max([backward[kind] for kind in case.running], default=0.0)
            best = max(best, (bodies + at_loss - absent, bodies, at_loss, absent),
                       (in_block + after_loss - absent, in_block, after_loss, absent))
        peaks.append(best[1:])
    return peaks


def stages_on(work: Workload, rank: int) -> list[int]:
    """Stages of a pipeline rank."""
    if work.pp == 1:
        return [0]
    if work.schedule == "dualpipe":
        return [rank, 2 * work.pp - 1 - rank]
    return stages_of(rank, work.pp, Schedule[work.schedule], work.stages_per_rank)


def state_bytes(work: Workload, dense: float, experts: float) -> dict[str, float]:
    """Of a rank's parameters outside the routed experts and of its routed ones, by component."""
    keep, total = work.keeping, {"weights": 0.0, "gradients": 0.0, "masters": 0.0, "moments": 0.0}
    reduced = 1 if keep.eager and work.microbatches == 1 else 2  # nothing to add up: reduced as they are made
    for number, replicas in ((dense, work.replicas), (experts, work.expert_replicas)):
        master = 0.0 if keep.master_is_weight and replicas == 1 else keep.master
        for stage, name, each in ((3, "weights", keep.weight), (reduced, "gradients", keep.gradient),
                                  (1, "masters", master), (1, "moments", keep.moments)):
            total[name] += number * each / (replicas if work.zero >= stage else 1)
    return total


@dataclass(frozen=True)
class _Case:
    """What a rank holds while one of its stages runs."""

    dense: int
    """Microbatches in flight, each as often as its stage has dense blocks."""
    moe: int
    heads: int
    last: bool
    """The stage that runs has the head."""
    running: tuple[bool, ...]
    """Kinds of its blocks: routed or not."""
    split_dense: int = 0
    """As `dense`, of microbatches between the parts of their backward; 0 where nothing more is kept for them."""
    split_moe: int = 0
    split_heads: int = 0
    outputs: int = 0
    """Outputs of stages that are kept beside their blocks' own."""
    absent: tuple[float, float, float] = (0, 0, 0)
    """Parameters, as `shares` takes them, that have no gradient yet; 0 where gradients are always there."""


@dataclass(frozen=True)
class _Group:
    """Ranks with as many parameters, or one alone, and the fullest cases."""

    parameters: tuple[float, float, float]
    """As `shares` takes them."""
    looked_up: float
    """Of the first, as `tables` has them."""
    heads: float
    cases: tuple[_Case, ...]


def _groups(work: Workload, alone: bool) -> list[_Group]:
    schedule = work.schedule if work.pp > 1 else "1f1b"
    return _groups_of(work.model, work.seq_len, work.pp, schedule, work.stages_per_rank,
                      work.even_stages, _enough(schedule, work.microbatches, work.pp), work.keeping.eager, alone)


@lru_cache(maxsize=512)
def _groups_of(model: ModelConfig, seq_len: int, pp: int, schedule: str, stages_per_rank: int, even: bool,
               microbatches: int, eager: bool, alone: bool) -> list[_Group]:
    work = Workload(model, HardwareConfig(), seq_len, 1, pp, 1, 1, schedule, microbatches, stages_per_rank,
                    even_stages=even, keeping=replace(PLANNED, eager=eager))
    ranges, groups = stage_layers(work), {}
    for rank, cases in enumerate(in_flight(work)):
        stages = stages_on(work, rank)
        sizes = {stage: whole_parameters(work, stage, ranges) for stage in stages}
        blocks = {stage: _blocks(work, stage, ranges) for stage in stages}
        last = {stage: is_last(work, stage, len(ranges)) for stage in stages}
        key = _sum(sizes.values()), *_sum(tables(work, stage, ranges) for stage in stages)
        found = groups.setdefault((key, rank if alone else None), set())

        def number(counts: tuple[tuple[int, int], ...], kind: bool, blocks=blocks) -> int:
            return sum(times * blocks[stage].count(kind) for stage, times in counts)

        for running, counts, halfway, started in cases:
            if not eager:
                if running is None:
                    continue
                halfway, started = (), stages
            absent = _sum([(0, 0, 0), *(size for stage, size in sizes.items() if stage not in started)])
            heads, split_heads = (sum(times * last[stage] for stage, times in which) for which in (counts, halfway))
            outputs = sum(times for stage, times in counts if not last[stage]) if eager else 0
            kinds = tuple(sorted(set(blocks.get(running, ()))))
            found.add(_Case(number(counts, False), number(counts, True), heads, last.get(running, False), kinds,
                            number(halfway, False), number(halfway, True), split_heads, outputs, absent))
    return [_Group(*key, tuple(case for case in cases if not any(_more(other, case) for other in cases)))
            for (key, _), cases in groups.items()]


def _sum(sizes: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*sizes, strict=True)))


def _blocks(work: Workload, stage: int, ranges: list[range]) -> list[bool]:
    """Kind of every block of a stage, MTP's included."""
    layers = list(ranges[stage])
    if is_last(work, stage, len(ranges)):
        layers += range(work.model.n_layers, work.model.n_layers + work.model.n_mtp_layers)
    return [work.model.is_moe(layer) for layer in layers]


def _more(other: _Case, case: _Case) -> bool:
    """Whether `other` is another case that needs at least as much, whatever the sizes."""
    more = ("dense", "moe", "heads", "split_dense", "split_moe", "outputs")
    return (other != case and other.last == case.last and other.split_heads == case.split_heads
            and set(case.running) <= set(other.running)
            and all(getattr(other, name) >= getattr(case, name) for name in more)
            and all(a <= b for a, b in zip(other.absent, case.absent, strict=True)))


def in_flight(work: Workload) -> list[list[tuple]]:
    """Per rank, every case of: a stage that runs (None between two actions), how many microbatches of each stage are
    held then, how many of these are between the parts of their backward, and the stages that have gradients."""
    if work.pp == 1:
        return [_cases([[("F", 0, 0)], [("B", 0, 0)]] * min(work.microbatches, 2))]
    if work.schedule == "dualpipe":
        table = dualpipe(work.pp, work.microbatches)
    else:
        table = actions(Schedule[work.schedule], work.pp, work.microbatches, requested_stages=work.stages_per_rank)
    return [_cases(row) for row in table]


def _enough(schedule: str, microbatches: int, pp: int) -> int:
    """As many microbatches as show every case: beyond three rounds a schedule only repeats itself; gpipe does not."""
    return 3 * pp if microbatches > 3 * pp and microbatches % pp == 0 and schedule != "gpipe" else microbatches


def _cases(row: list[tuple]) -> list[tuple]:
    """Up with a forward; down with a full backward or a weight part, which still see what they free."""
    now, halfway, started = Counter(), Counter(), frozenset()
    seen: set[tuple] = set()

    def see(running: int | None) -> None:
        seen.add((running, tuple(sorted(now.items())), tuple(sorted(halfway.items())), started))

    for slot in row:
        for kind, stage, _ in slot:
            now[stage] += kind == "F"
            halfway[stage] += kind == "I"
            see(stage)
            now[stage] -= kind in "BW"
            halfway[stage] -= kind == "W"
            if kind in "BW":
                started |= {stage}
                see(None)
    return list(seen)


def _buffer_bytes(work: Workload, *, moe: bool, reducing: bool) -> float:
    """In transit: rows of one all-to-all there and back, a microbatch to the next stage, one block's gradients where
    they are not reduced in place and are there to be reduced, and with ZeRO stage 3 two blocks' weights."""
    model, keep = work.model, work.keeping
    tokens = work.microbatch_tokens * stream(work) * keep.element
    rows = 2 * tokens * model.n_activated_experts * work.imbalance if moe and work.ep > 1 else 0.0
    sends = 2 * tokens if work.pp > 1 else 0.0
    gathered = 2 * keep.weight if work.zero >= 3 else 0.0
    reduced = keep.gradient if reducing and (work.zero >= 2 or keep.eager) else 0.0
    return rows + sends + (largest_block(work) * (gathered + reduced) if gathered + reduced else 0.0)
