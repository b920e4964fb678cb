"""How long a training step takes and how much memory a rank needs, from shapes and a device's data sheet: predicted.

Compute: every layer's products at the achievable share of the peak of their dtype, its attention core apart, its
memory-bound operators by bytes. Communication: expert all-to-all by the nodes a token reaches, pipeline sends, gradient
reduction. These become stage times, `simulate` runs the schedule's own table over them, and what is left (reduction,
optimizer) is added. An assumption names what it was read from; two shares of some GPUs are fitted to published runs
(`conf/hardware`, `benchmarks/validate_planner.py --fit`).
"""

from dataclasses import dataclass, field

from model import count
from model.config import Attention, ModelConfig
from orchestrator.config import HardwareConfig, Recompute, Schedule
from orchestrator.plan.layout import split_stages, stages_per_rank
from orchestrator.plan.schedule import Action, actions, dualpipe
from orchestrator.plan.simulate import StageTime, Timeline, held, simulate

GIB = 2**30
PROFILE = "DeepSeek's profile-data trace of V3 training (H800, EP64)"


@dataclass(frozen=True)
class Assumptions:
    """Shares of a data-sheet figure that real kernels reach."""

    gemm_bf16: float = 0.70
    """Of the bf16 peak. Best matmuls reach 0.80 on H100 (stas00/ml-engineering), shapes of a model less."""
    gemm_fp8: float = 0.48
    """Of the FP8 peak, quantisation apart. MLP forward of PROFILE."""
    attention_forward: float = 0.55
    """Of the bf16 peak: FlashAttention forward of PROFILE, 1.24 ms a layer."""
    attention_backward: float = 0.84
    """Of the forward's share: 3.7 ms a layer for 2.5 times the FLOPs."""
    memory: float = 0.80
    """Of memory bandwidth."""
    small_gemm_rows: float = 96.0
    """Rows of an expert's product at which it reaches half of the achievable rate."""
    network: float = 0.80
    """Of link bandwidth, alone: 160 of 200 and 40 of 50 GB/s (V3 report, section 3.2)."""
    network_overlapped: float = 0.45
    """Of link bandwidth while computing on the same device (dispatch and combine of PROFILE)."""
    overlap_cost: float = 1.09
    """An overlapped pair against the longer of its computation and its communication: 32.25 of 29.5 ms in PROFILE."""
    usable_memory: float = 0.92
    """Of a device's memory; the rest is context, fragmentation and communication buffers."""


@dataclass(frozen=True)
class Workload:
    """What is trained, how it is laid out, and on what."""

    model: ModelConfig
    hardware: HardwareConfig
    seq_len: int
    batch_size: int
    """Sequences per step."""
    pp: int
    dp: int
    ep: int
    schedule: str
    """Name of a `Schedule`, or `dualpipe`."""
    microbatches: int
    stages_per_rank: int = 2
    recompute: Recompute = Recompute.none
    dtype: str = "bf16"
    """`bf16` or `fp8`: of the layers' products; attention core, head and router are bf16 always."""
    assumptions: Assumptions = field(default_factory=Assumptions)

    @property
    def devices(self) -> int:
        return self.pp * self.dp

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one microbatch on one rank."""
        return self.batch_size * self.seq_len // (self.dp * self.microbatches)


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


@dataclass(frozen=True)
class LayerTime:
    """One layer, one microbatch, one rank; seconds. Communication is what the layer's all-to-alls take alone."""

    forward: float = 0.0
    backward: float = 0.0
    weight: float = 0.0
    sent_bytes: float = 0.0
    """Scale-out bytes of forward; backward sends as many."""
    up_bytes: float = 0.0

    def __add__(self, other: "LayerTime") -> "LayerTime":
        return LayerTime(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def estimate(work: Workload) -> Estimate:
    """Predict one step. ValueError if the hardware entry lacks a figure that this needs."""
    _check_hardware(work)
    ranges, table, chains = _pipeline(work)
    stages = len(ranges)
    layers = {moe: layer_time(work, moe) for moe in {work.model.is_moe(i) for i in range(work.model.n_layers)}}
    times = []
    for stage, layers_of in enumerate(ranges):
        total = sum((layers[work.model.is_moe(i)] for i in layers_of), LayerTime())
        if _is_last(work, stage, stages):
            total += head_time(work)
        times.append(_stage_time(work, total))
    link = _link_bytes_per_s(work, crossing_nodes=work.dp >= work.hardware.scale_up_devices)
    transfer = work.microbatch_tokens * work.model.dim * 2 / (link * work.assumptions.network)
    timeline = simulate(table, times, transfer=transfer if work.pp > 1 else 0.0, chains=chains)
    reduce, optimizer = _reduce_s(work, ranges, table), _optimizer_s(work, ranges, table)
    busiest = max(timeline.busy)
    parts = {"pipeline": busiest, "bubble": timeline.step_time - busiest, "reduce": reduce, "optimizer": optimizer}
    return Estimate(sum(parts.values()), parts, timeline.bubble_fraction, memory_gib(work), timeline)


def memory_gib(work: Workload) -> dict[str, float]:
    """By component, of the rank that needs most; needs no clock.

    Dense parameters are whole while a step runs (bf16 copy, fp32 gradient) and sharded over dp at rest (fp32 master,
    two moments); experts are sharded over ep, their state over dp / ep too.
    """
    ranges, table, _ = _pipeline(work)
    _, activations = held(table, [_activation_bytes(work, layers) for layers in ranges])
    return _memory(work, ranges, table, activations)


def _pipeline(work: Workload) -> tuple[list[range], list, int]:
    """Layers of every stage, the table, and how many copies of the pipeline it holds."""
    if work.pp == 1:
        table = [[(Action(kind, 0, micro),) for micro in range(work.microbatches) for kind in "FB"]]
        return split_stages(work.model, 1, work.seq_len), table, 1
    if work.schedule == "dualpipe":
        return split_stages(work.model, work.pp, work.seq_len) * 2, dualpipe(work.pp, work.microbatches), 2
    schedule = Schedule[work.schedule]
    stages = work.pp * stages_per_rank(schedule, work.stages_per_rank)
    table = actions(schedule, work.pp, work.microbatches, requested_stages=work.stages_per_rank)
    return split_stages(work.model, stages, work.seq_len), table, 1


def _is_last(work: Workload, stage: int, stages: int) -> bool:
    return stage == stages - 1 or (work.schedule == "dualpipe" and stage == work.pp - 1)


def _is_first(work: Workload, stage: int) -> bool:
    return stage == 0 or (work.schedule == "dualpipe" and stage == work.pp)


def layer_time(work: Workload, moe: bool) -> LayerTime:
    """Compute seconds and all-to-all bytes of one block."""
    model, tokens, peak = work.model, work.microbatch_tokens, work.hardware.bf16_tflops * 1e12
    layer = model.n_layers - 1 if moe else 0
    parts = count.layer_parameters(model, layer)
    rate = _gemm_rate(work)
    gemm = 2 * tokens * (parts.attention + parts.dense_ffn + parts.shared_experts) / rate
    if moe:
        rows = tokens * model.n_activated_experts * work.ep / model.n_routed_experts
        routed = count.active(parts, model).routed_experts
        gemm += 2 * tokens * routed / rate * (1 + work.assumptions.small_gemm_rows / rows)
    core = tokens * count.attention_flops(model, work.seq_len) / peak
    light = tokens * _light_bytes(model, moe) / (work.hardware.memory_gb_per_s * 1e9 * work.assumptions.memory)
    share = work.hardware.attention_share or work.assumptions.attention_forward
    forward = gemm + core / share + light
    core_backward = 2.5 * core / (share * work.assumptions.attention_backward)
    again = forward if work.recompute is Recompute.full else 0.0
    sent, up = _dispatch_bytes(work) if moe and work.ep > 1 else (0.0, 0.0)
    return LayerTime(forward, gemm + core_backward + 1.5 * light + again, gemm,
                     sent, up)


def head_time(work: Workload) -> LayerTime:
    """Head, and MTP modules, on the last stage."""
    model, tokens = work.model, work.microbatch_tokens
    rate = _bf16_rate(work)
    passes = 1 + model.n_mtp_layers
    gemm = 2 * tokens * model.vocab_size * model.dim * passes / rate
    logits = tokens * model.vocab_size * 12 * passes / (work.hardware.memory_gb_per_s * 1e9 * work.assumptions.memory)
    total = LayerTime(gemm + logits / 2, gemm + logits / 2, gemm)
    for depth in range(model.n_mtp_layers):
        projection = 2 * tokens * 2 * model.dim**2 / rate
        total += layer_time(work, model.is_moe(model.n_layers + depth)) + LayerTime(projection, projection, projection)
    return total


def _gemm_rate(work: Workload) -> float:
    """FLOP/s of large products in the layers."""
    if work.dtype == "fp8":
        return work.hardware.fp8_tflops * 1e12 * work.assumptions.gemm_fp8
    return _bf16_rate(work)


def _bf16_rate(work: Workload) -> float:
    return work.hardware.bf16_tflops * 1e12 * (work.hardware.gemm_share or work.assumptions.gemm_bf16)


def _stage_time(work: Workload, total: LayerTime) -> StageTime:
    """Alone, communication follows computation; in an overlapped slot both run, each slowed by the other."""
    alone = _all_to_all_s(work, total, work.assumptions.network)
    both = 2 * _all_to_all_s(work, total, work.assumptions.network_overlapped)
    compute = total.forward + total.backward + total.weight
    overlapped = max(compute, both) * work.assumptions.overlap_cost if both else compute
    return StageTime(total.forward + alone, total.backward + alone, total.weight,
                     overlapped=min(overlapped, compute + 2 * alone))


def _all_to_all_s(work: Workload, total: LayerTime, share: float) -> float:
    """Scale-out and scale-up links work at once; the slower one sets the pace."""
    hardware = work.hardware
    out = total.sent_bytes / (hardware.scale_out_gb_per_s * 1e9 * share)
    return max(out, total.up_bytes / (hardware.scale_up_gb_per_s * 1e9 * share))


def _dispatch_bytes(work: Workload) -> tuple[float, float]:
    """Bytes that a rank sends in one layer's forward, out of the node and inside it (V3 report, section 3.2.2).

    A token goes once to every other node that holds one of its experts, and from there over the scale-up links.
    Dispatch in FP8 with `dtype=fp8`, combine in bf16.
    """
    model, per_node = work.model, work.hardware.scale_up_devices
    element = (1 if work.dtype == "fp8" else 2) + 2
    payload = work.microbatch_tokens * model.dim * element
    nodes = max(1, work.ep // per_node)
    reached = nodes * (1 - (1 - 1 / nodes) ** model.n_activated_experts)
    if model.n_limited_groups < model.n_expert_groups:
        reached = min(reached, model.n_limited_groups * nodes / model.n_expert_groups)
    ranks = min(work.ep, per_node)
    targets = ranks * (1 - (1 - 1 / ranks) ** (model.n_activated_experts / max(1.0, reached)))
    return payload * reached * (nodes - 1) / nodes, payload * max(1.0, reached) * targets * (ranks - 1) / ranks


def _light_bytes(model: ModelConfig, moe: bool) -> float:
    """Bytes per token that memory-bound operators of one block move in forward: norms, rotary, quantisation, SwiGLU,
    permutation, residuals; about so many reads and writes of each tensor in bf16."""
    heads = model.n_heads * (2 * model.qk_head_dim + 2 * count.v_head_dim(model))
    if model.attention is not Attention.mla:
        heads = (model.n_heads + model.n_kv_heads) * 2 * model.head_dim
    experts = (model.n_activated_experts + model.n_shared_experts) if moe else 1
    inner = model.moe_inter_dim if moe else model.inter_dim
    return 2 * (8 * model.dim + 4 * heads + experts * ((3 * model.dim if moe else 0) + 6 * inner))


def _activation_bytes(work: Workload, layers: range) -> float:
    """Held per microbatch between forward and backward on one stage."""
    model, tokens = work.model, work.microbatch_tokens
    if work.recompute is Recompute.full:
        return tokens * model.dim * 2 * len(layers)
    total = 0.0
    for layer in layers:
        moe = model.is_moe(layer)
        heads = model.n_heads * (2 * model.qk_head_dim + 2 * count.v_head_dim(model))
        if model.attention is not Attention.mla:
            heads = (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim
        latents = (model.q_lora_rank + model.kv_lora_rank) if model.attention is Attention.mla else 0
        experts = (model.n_activated_experts + model.n_shared_experts) if moe else 1
        inner = model.moe_inter_dim if moe else model.inter_dim
        total += 2 * (4 * model.dim + heads + latents) + experts * ((2 * 2 * model.dim if moe else 0) + 2 * 3 * inner)
    return total * tokens


def _memory(work: Workload, ranges: list[range], table: list, activations: list[float]) -> dict[str, float]:
    fullest: dict[str, float] = {}
    for rank, row in enumerate(table):
        dense, experts = _rank_parameters(work, ranges, row)
        parts = {
            "weights": (dense + experts) * 2,
            "gradients": (dense + experts) * 4,
            "masters": (dense / work.dp + experts / (work.dp // work.ep)) * 4,
            "moments": (dense / work.dp + experts / (work.dp // work.ep)) * 8,
            "activations": activations[rank],
            "logits": (work.microbatch_tokens * work.model.vocab_size * 6
                       if any(_is_last(work, a.stage, len(ranges)) for slot in row for a in slot) else 0.0),
        }
        if sum(parts.values()) > sum(fullest.values()):
            fullest = parts
    found = {name: size / GIB for name, size in fullest.items()}
    return found | {"total": sum(found.values())}


def _rank_parameters(work: Workload, ranges: list[range], row: list) -> tuple[float, float]:
    """Parameters on one pipeline rank: those outside the routed experts, and its share of the experts."""
    model, dense, experts = work.model, 0.0, 0.0
    for stage in {action.stage for slot in row for action in slot}:
        parts = [count.layer_parameters(model, layer) for layer in ranges[stage]]
        last = _is_last(work, stage, len(ranges))
        if last:
            parts.append(count.mtp_parameters(model))
            dense += model.vocab_size * model.dim
        if _is_first(work, stage) or (last and model.n_mtp_layers):
            dense += model.vocab_size * model.dim
        routed = sum(part.routed_experts for part in parts)
        dense, experts = dense + sum(part.total for part in parts) - routed, experts + routed / work.ep
    return dense, experts


def _reduce_s(work: Workload, ranges: list[range], table: list) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of bf16 weights over dp, once a step, not overlapped.

    Dense parameters are the same on all ranks of a node, which share its way out; of experts every rank has others.
    """
    if work.dp == 1:
        return 0.0
    dense, experts = max((_rank_parameters(work, ranges, row) for row in table), key=sum)
    hardware, replicas = work.hardware, work.dp // work.ep
    crossing = work.dp > hardware.scale_up_devices
    together = hardware.scale_up_gb_per_s * 1e9
    if crossing:
        together = min(together, hardware.scale_out_gb_per_s * hardware.scale_up_devices * 1e9)
    alone = _link_bytes_per_s(work, crossing_nodes=crossing)
    seconds = dense * (work.dp - 1) / work.dp / together + experts * (replicas - 1) / replicas / alone
    return 6 * seconds / work.assumptions.network


def _optimizer_s(work: Workload, ranges: list[range], table: list) -> float:
    """AdamW is bound by memory: weights, gradients, moments read and written, 34 bytes a parameter."""
    dense, experts = max((_rank_parameters(work, ranges, row) for row in table), key=sum)
    owned = dense / work.dp + experts / (work.dp // work.ep)
    return owned * 34 / (work.hardware.memory_gb_per_s * 1e9 * work.assumptions.memory)


def _link_bytes_per_s(work: Workload, *, crossing_nodes: bool) -> float:
    hardware = work.hardware
    return (hardware.scale_out_gb_per_s if crossing_nodes else hardware.scale_up_gb_per_s) * 1e9


def _check_hardware(work: Workload) -> None:
    needed = ["bf16_tflops", "memory_gb_per_s", "memory_gib", "scale_up_gb_per_s", "scale_out_gb_per_s"]
    needed += ["fp8_tflops"] if work.dtype == "fp8" else []
    missing = [key for key in needed if not getattr(work.hardware, key)]
    if missing:
        raise ValueError(f"hardware.{missing[0]}: is not known for hardware={work.hardware.name}, and a plan needs it; "
                         f"set hardware.{missing[0]}, or choose one that has it")
