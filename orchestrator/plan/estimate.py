"""How long a training step takes and how much memory a rank needs, from shapes and a device's data sheet: predicted.

Compute: every layer's products at the achievable share of the peak of their dtype, its attention core apart, its
memory-bound operators by bytes. Communication: expert all-to-all by the nodes a token reaches, pipeline sends, and the
collectives of `comm`. These become stage times, `simulate` runs the schedule's own table over them, and what is left
(reduction, optimizer) is added. An assumption names what it was read from; two shares of some GPUs are fitted to
published runs (`conf/hardware`, `benchmarks/validate_planner.py --fit`).
"""

from dataclasses import dataclass

from model import count
from model.config import Attention, ModelConfig
from orchestrator.config import Recompute
from orchestrator.plan.comm import context_s, reduce_s, tensor_s
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
    ranges, table, chains = pipeline_of(work)
    stages = len(ranges)
    layers = {moe: layer_time(work, moe) for moe in {work.model.is_moe(i) for i in range(work.model.n_layers)}}
    times = []
    for stage, layers_of in enumerate(ranges):
        total = sum((layers[work.model.is_moe(i)] for i in layers_of), LayerTime())
        if is_last(work, stage, stages):
            total += head_time(work)
        times.append(_stage_time(work, total))
    link = _link_bytes_per_s(work, crossing_nodes=work.dp * work.tp * work.cp >= work.hardware.scale_up_devices)
    transfer = work.microbatch_tokens / work.tp * work.model.dim * 2 / (link * work.assumptions.network)
    timeline = simulate(table, times, transfer=transfer if work.pp > 1 else 0.0, chains=chains)
    busiest = max(timeline.busy)
    reduce, optimizer = reduce_s(work, ranges, table, busiest), _optimizer_s(work, ranges, table)
    parts = {"pipeline": busiest, "bubble": timeline.step_time - busiest, "reduce": reduce, "optimizer": optimizer}
    return Estimate(sum(parts.values()), parts, timeline.bubble_fraction, memory_gib(work), timeline)


def layer_time(work: Workload, moe: bool) -> LayerTime:
    """Compute seconds and all-to-all bytes of one block."""
    model, tokens, peak = work.model, work.microbatch_tokens / work.tp, work.hardware.bf16_tflops * 1e12
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
    exchange = tensor_s(work) + context_s(work, core / share)
    forward = gemm + core / share + light + exchange
    core_backward = 2.5 * core / (share * work.assumptions.attention_backward)
    again = {Recompute.none: 0.0, Recompute.selective: core / share, Recompute.full: forward}[work.recompute]
    if work.recompute is Recompute.selective and model.attention is Attention.mla:
        again = _cheap_again(work, tokens)
    sent, up = _dispatch_bytes(work) if moe and work.ep > 1 else (0.0, 0.0)
    return LayerTime(forward, gemm + core_backward + 1.5 * light + again + exchange, gemm, sent, up)


def _cheap_again(work: Workload, tokens: float) -> float:
    """What V3 computes again (report, section 3.2.3): MLA's up-projections, and RMSNorms by bytes."""
    model = work.model
    up = model.q_lora_rank * model.n_heads * model.qk_head_dim
    up += model.kv_lora_rank * model.n_heads * (model.qk_nope_head_dim + count.v_head_dim(model))
    norms = tokens * 2 * 4 * model.dim / (work.hardware.memory_gb_per_s * 1e9 * work.assumptions.memory)
    return 2 * tokens * up / _gemm_rate(work) + norms


def head_time(work: Workload) -> LayerTime:
    """Head, and MTP modules, on the last stage."""
    model, tokens = work.model, work.microbatch_tokens / work.tp
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
    payload = work.microbatch_tokens / work.tp * model.dim * element
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


def _optimizer_s(work: Workload, ranges: list[range], table: list) -> float:
    """AdamW is bound by memory: weights, gradients, moments read and written, 34 bytes a parameter."""
    dense, experts = max((rank_parameters(work, ranges, row) for row in table), key=sum)
    owned = dense / work.replicas + experts / work.expert_replicas
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
