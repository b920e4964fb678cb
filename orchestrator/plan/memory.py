"""How much memory a rank needs, by component: predicted, from the layout and the schedule's own order; no clock.

State is counted parameter by parameter, activations tensor by tensor (`activations`), the number of microbatches in
flight is read off the schedule's table. The peak is the largest sum over a rank's actions.
"""

from functools import lru_cache

from orchestrator.config import Schedule
from orchestrator.plan.activations import backward_bytes, block_bytes, head_bytes, loss_bytes, stream
from orchestrator.plan.layout import stages_of
from orchestrator.plan.schedule import actions, dualpipe
from orchestrator.plan.workload import Workload, is_last, largest_block, stage_layers, stage_parameters

GIB = 2**30
FULL = "needs {total:.0f} GiB of {have:.0f} usable, {most:.0f} of them {component}"


def memory_gib(work: Workload) -> dict[str, float]:
    """By component, with `total`, of the pipeline rank that needs most."""
    return max(rank_memory_gib(work), key=lambda parts: parts["total"])


def rank_memory_gib(work: Workload) -> list[dict[str, float]]:
    """Of every pipeline rank."""
    ranges = stage_layers(work)
    return [_rank_gib(work, ranges, rank) for rank in range(work.pp)]


def too_large(work: Workload) -> str | None:
    """Why it does not fit, or None if it does: the fullest rank against the usable share of the device."""
    have = work.hardware.memory_gib * work.assumptions.usable_memory
    need = memory_gib(work)
    if need["total"] <= have:
        return None
    component = max((name for name in need if name != "total"), key=need.get)
    return FULL.format(total=need["total"], have=have, most=need[component], component=component)


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
    for number, replicas in ((dense, work.replicas), (experts, work.expert_replicas)):
        master = 0.0 if keep.master_is_weight and replicas == 1 else keep.master
        for stage, name, each in ((3, "weights", keep.weight), (2, "gradients", keep.gradient),
                                  (1, "masters", master), (1, "moments", keep.moments)):
            total[name] += number * each / (replicas if work.zero >= stage else 1)
    return total


def _rank_gib(work: Workload, ranges: list[range], rank: int) -> dict[str, float]:
    stages = stages_on(work, rank)
    sizes = [stage_parameters(work, stage, ranges) for stage in stages]
    parts = state_bytes(work, sum(size[0] for size in sizes), sum(size[1] for size in sizes))
    held, logits = _peak(work, ranges, rank)
    parts |= {"activations": held, "logits": logits, "buffers": _buffer_bytes(work, ranges, stages)}
    found = {name: size / GIB for name, size in parts.items()} | {"framework": work.keeping.framework_gib}
    return found | {"total": sum(found.values())}


def _peak(work: Workload, ranges: list[range], rank: int) -> tuple[float, float]:
    """Activations held and what the loss needs, at the action of this rank where their sum is largest."""
    kept, during = {}, {}
    for stage in stages_on(work, rank):
        blocks = [work.model.is_moe(layer) for layer in ranges[stage]]
        last = is_last(work, stage, len(ranges))
        if last:
            blocks += [work.model.is_moe(work.model.n_layers + depth) for depth in range(work.model.n_mtp_layers)]
        body = sum(block_bytes(work, moe) for moe in blocks)
        block = max(backward_bytes(work, moe) for moe in set(blocks))
        head = head_bytes(work) if last else 0.0
        kept[stage] = body, head
        # A stage's backward begins with the loss, whose logits are gone when the blocks' turn comes.
        during[stage] = [(block, -head)] + ([(0.0, loss_bytes(work))] if last else [])
    best = 0.0, 0.0
    for running, counts in in_flight(work)[rank]:
        bodies = sum(number * kept[stage][0] for stage, number in counts)
        heads = sum(number * kept[stage][1] for stage, number in counts)
        best = max([best, *((bodies + block, heads + loss) for block, loss in during[running])], key=sum)
    return best


def in_flight(work: Workload) -> list[list[tuple[int, tuple[tuple[int, int], ...]]]]:
    """Per rank: a stage that runs, and how many microbatches of each stage are held then; the largest such cases."""
    if work.pp == 1:
        return [[(0, ((0, 1),))]]
    return _in_flight(work.schedule, work.pp, _enough(work.microbatches, work.pp), work.stages_per_rank)


def _enough(microbatches: int, pp: int) -> int:
    """As many microbatches as show every case: beyond four rounds a schedule only repeats itself (gpipe: no)."""
    return 4 * pp if microbatches > 4 * pp and microbatches % pp == 0 else microbatches


@lru_cache(maxsize=512)
def _in_flight(schedule: str, pp: int, microbatches: int, requested_stages: int) -> list[list[tuple]]:
    if schedule == "dualpipe":
        table = dualpipe(pp, microbatches)
    else:
        table = actions(Schedule[schedule], pp, microbatches, requested_stages=requested_stages)
    return [_cases(row) for row in table]


def _cases(row: list[tuple]) -> list[tuple]:
    """Up with a forward; down with a full backward or a weight part, which still see what they free."""
    now: dict[int, int] = {}
    seen: set[tuple] = set()
    for slot in row:
        for kind, stage, _ in slot:
            if kind == "F":
                now[stage] = now.get(stage, 0) + 1
            seen.add((stage, tuple(sorted(now.items()))))
            if kind in "BW":
                now[stage] -= 1
    return [case for case in seen if not any(_covers(other, case) for other in seen)]


def _covers(other: tuple, case: tuple) -> bool:
    """Whether `other` holds as much of every stage while the same stage runs, and is another case."""
    if other == case or other[0] != case[0]:
        return False
    counts = dict(other[1])
    return all(counts.get(stage, 0) >= number for stage, number in case[1])


def _buffer_bytes(work: Workload, ranges: list[range], stages: list[int]) -> float:
    """In transit: rows of one all-to-all there and back, a microbatch to the next stage, one block's gradients where
    they are not reduced in place, and with ZeRO stage 3 two blocks' weights."""
    model, keep = work.model, work.keeping
    tokens = work.microbatch_tokens * stream(work) * keep.element
    moe = any(model.is_moe(layer) for stage in stages for layer in ranges[stage])
    rows = 2 * tokens * model.n_activated_experts if moe and work.ep > 1 else 0.0
    sends = 2 * tokens if work.pp > 1 else 0.0
    if work.replicas == 1:
        return rows + sends
    gathered = 2 * keep.weight if work.zero >= 3 else 0.0
    reduced = keep.gradient if work.zero >= 2 or keep.reduce_copy else 0.0
    return rows + sends + largest_block(work) * (gathered + reduced)
