"""How long a training step takes and how much memory a rank needs, from shapes and a device's data sheet: predicted.

Compute: every layer's products at the achievable share of the peak of their dtype, its attention core apart, its
memory-bound operators by bytes. Communication: expert all-to-all by the nodes a token reaches, pipeline sends, and the
collectives of `comm`. These become stage times, `simulate` runs the schedule's own table over them, and what is left
(reduction, optimizer) is added. An assumption names what it was read from; a share or two of some GPUs are fitted to
published runs (`conf/hardware`, `benchmarks/fit_planner.py`).
"""

from dataclasses import dataclass, replace
from math import inf

from orchestrator.config import HardwareConfig, Recompute
from orchestrator.plan.block import LayerTime, head_time, layer_time
from orchestrator.plan.comm import reduce_s
from orchestrator.plan.exchange import all_to_all_s, scale_up_bytes_per_s
from orchestrator.plan.memory import memory_gib
from orchestrator.plan.simulate import StageTime, Timeline, simulate
from orchestrator.plan.workload import Workload, is_last, pipeline_of, rank_parameters


@dataclass(frozen=True)
class Estimate:
    """Predicted; seconds, GiB."""

    step_time_s: float
    parts_s: dict[str, float]
    """pipeline (busiest rank at work), bubble (the same rank idle), reduce, optimizer; they sum to the step."""
    bubble_fraction: float
    memory_gib: dict[str, float]
    """Of the fullest rank, by component, with `total`."""
    timeline: Timeline


def estimate(work: Workload) -> Estimate:
    """Predict one step. ValueError if the hardware entry lacks a figure that this needs."""
    parts, timeline = step_parts(work)
    return Estimate(sum(parts.values()), parts, timeline.bubble_fraction, memory_gib(work), timeline)


def step_parts(work: Workload) -> tuple[dict[str, float], Timeline]:
    """The parts of a step's time, and its clock."""
    work = replace(work, hardware=linked(work.hardware, work.devices))
    check_hardware(work)
    ranges, table, chains = pipeline_of(work)
    times = stage_times(work, ranges)
    cores = work.cores * work.pp / work.devices if work.cores else None  # of one pipeline; its replicas keep step
    if work.crowding > 1:
        cores *= work.assumptions.crowded
    timeline = simulate(table, times, transfer=send_s(work) if work.pp > 1 else 0.0, chains=chains, cores=cores)
    busiest = max(timeline.busy)
    reduce = reduction_s(work, ranges, table, busiest)
    optimizer = work.calibration.optimizer * work.crowding * _optimizer_s(work, ranges, table)
    parts = {"pipeline": busiest, "bubble": timeline.step_time - busiest, "reduce": reduce, "optimizer": optimizer}
    return parts, timeline


def reduction_s(work: Workload, ranges: list[range], table: list, busiest_s: float) -> float:
    """`reduce_s` behind so many seconds of the busiest rank, as calibrated."""
    return work.calibration.forward_backward * work.crowding * reduce_s(work, ranges, table, busiest_s)


def stage_times(work: Workload, ranges: list[range]) -> list[StageTime]:
    """Of every stage, for one microbatch. A run overlaps in every pair or in none: the multiprocessors that it gives to
    communication are missing in a stage without experts too."""
    layers = {moe: layer_time(work, moe) for moe in {work.model.is_moe(i) for i in range(work.model.n_layers)}}
    found, known = [], {}
    for stage, layers_of in enumerate(ranges):
        kinds = tuple(work.model.is_moe(layer) for layer in layers_of), is_last(work, stage, len(ranges))
        if kinds not in known:
            head = head_time(work) if kinds[1] else LayerTime()
            known[kinds] = _stage_time(work, sum((layers[moe] for moe in kinds[0]), head))
        # The first stage has no input gradient: its backward is whole wherever the schedule puts it.
        found.append(known[kinds] if stage else replace(known[kinds], again=0.0))
    in_turn = [time.forward + time.backward + time.weight for time in found]
    if sum(time.overlapped for time in found) < sum(in_turn):
        return found
    return [replace(time, overlapped=each) for time, each in zip(found, in_turn, strict=True)]


PHASES = {"F": "1F", "I": "1B", "B": "1B", "W": "1W"}


def phases_s(timeline: Timeline, rank: int) -> dict[str, float]:
    """Seconds that a rank spends in forwards, backwards and weight parts alone, in overlapped pairs (1F1B), and idle:
    the parts of the ISCA paper's table 4."""
    found = dict.fromkeys((*PHASES.values(), "1F1B"), 0.0)
    for span in timeline.spans:
        if span.rank == rank:
            found["1F1B" if len(span.actions) == 2 else PHASES[span.actions[0].kind]] += span.end - span.start
    return found | {"bubble": timeline.step_time - timeline.busy[rank]}


def _stage_time(work: Workload, total: LayerTime) -> StageTime:
    """Alone, communication follows computation; in an overlapped slot both run, each slowed by the other."""
    alone = all_to_all_s(work, total.sent_bytes, total.up_bytes, work.assumptions.network)
    alone *= 1 - work.stack.exchange_hidden
    alone += total.exchanges * work.assumptions.exchange_s
    both = 2 * all_to_all_s(work, total.sent_bytes, total.up_bytes, work.assumptions.network_overlapped)
    beside = total.forward + total.backward + total.weight
    if work.hardware.multiprocessors:
        beside *= work.hardware.multiprocessors / (work.hardware.multiprocessors - work.assumptions.communication_sms)
    overlapped = max(beside, both) * work.assumptions.overlap_cost
    again = alone if work.recompute is Recompute.full else 0.0
    scale = work.calibration.forward_backward
    return StageTime(scale * (total.forward + alone), scale * (total.backward + alone + again), scale * total.weight,
                     again=scale * total.again, overlapped=scale * overlapped)


def _optimizer_s(work: Workload, ranges: list[range], table: list) -> float:
    """AdamW is bound by memory: weights, gradients, moments read and written, 34 bytes a parameter that the rank owns;
    every local gradient is read for its norm and set to zero."""
    dense, experts = max((rank_parameters(work, ranges, row) for row in table), key=sum)
    owned = dense / work.replicas + experts / work.expert_replicas if work.zero else dense + experts
    local = owned if work.zero >= 2 else dense + experts
    moved = owned * 34 + local * 8
    return moved / (work.hardware.memory_gb_per_s * 1e9 * work.assumptions.memory)


def send_s(work: Workload) -> float:
    """Seconds of a microbatch's way to the next stage, over the slower link: between nodes where some stages lie on
    several."""
    crossing = work.devices > work.hardware.scale_up_devices
    link = work.hardware.scale_out_gb_per_s * 1e9 if crossing else scale_up_bytes_per_s(work.hardware, 2)
    payload = work.microbatch_tokens / work.tp * work.model.dim * 2
    return work.calibration.forward_backward * payload / (link * work.assumptions.network)


def linked(hardware: HardwareConfig, devices: int) -> HardwareConfig:
    """A link that so few devices do not use is not a figure that a plan lacks: unknown, it counts as endless."""
    unused = ["scale_up_gb_per_s"] * (devices == 1) + ["scale_out_gb_per_s"] * (devices <= hardware.scale_up_devices)
    unknown = {key: inf for key in unused if not getattr(hardware, key)}
    return replace(hardware, **unknown) if unknown else hardware


def check_hardware(work: Workload) -> None:
    """Of the figures that so many devices need; `ValueError` for one that the hardware entry lacks."""
    needed = ["bf16_tflops", "memory_gb_per_s", "memory_gib", "scale_up_gb_per_s", "scale_out_gb_per_s"]
    needed += ["fp8_tflops"] if work.dtype != "bf16" else []
    missing = [key for key in needed if not getattr(work.hardware, key)]
    if missing:
        raise ValueError(f"hardware.{missing[0]}: is not known for hardware={work.hardware.name}, and a plan needs it; "
                         f"set hardware.{missing[0]}, or choose one that has it")
