"""How long one block, or head and MTP modules, takes for one microbatch on one rank: forward, input gradient, weight
gradient apart. Operators' own seconds are `kernels`; what waits for other ranks inside a block is `comm`.

The expert all-to-all is only counted here (bytes); the schedule decides what of it shows (`estimate`).
"""

from dataclasses import dataclass

from model import count
from model.config import Attention, ModelConfig
from orchestrator.config import Recompute
from orchestrator.plan.comm import context_s, tensor_s
from orchestrator.plan.exchange import dispatch_bytes
from orchestrator.plan.kernels import Rates, core_s, product_s, rates_of, unfused_core_s
from orchestrator.plan.workload import Workload

BACKWARD_LIGHT, WEIGHT_LIGHT = 1.5, 0.35
"""Memory-bound work of backward against forward's, and what of it belongs to weight gradients (transposed copies)."""


@dataclass(frozen=True)
class LayerTime:
    """One layer, one microbatch, one rank; seconds, and bytes of its all-to-alls."""

    forward: float = 0.0
    backward: float = 0.0
    weight: float = 0.0
    sent_bytes: float = 0.0
    """Scale-out bytes of forward; backward sends as many."""
    up_bytes: float = 0.0
    exchanges: float = 0.0
    """All-to-alls of forward; backward has as many."""
    again: float = 0.0
    """Of backward, what recomputes: the weight part of a split backward, too, where the program does it twice."""

    def __add__(self, other: "LayerTime") -> "LayerTime":
        return LayerTime(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def layer_time(work: Workload, moe: bool) -> LayerTime:
    """Seconds and all-to-all bytes of one block."""
    model, tokens = work.model, work.microbatch_tokens
    rates = rates_of(work.hardware, work.dtype, work.assumptions, work.stack.attention)
    forward, inputs, weights = _products(work, rates, moe)
    core = attention_core_s(work, rates)
    hidden, heads, routed, once = _light_bytes(work, moe)
    split = work.tp if work.stack.sequence_parallel else 1
    overhead, gap = work.stack.overhead, work.assumptions.gap_s
    launches = work.assumptions.operators + (work.assumptions.operators_moe if moe else 0)
    moved = hidden / split + (heads + work.assumptions.moe_light * routed + once) / work.tp
    launched = 1 - work.stack.graphed(work.hardware.name)
    light = min(overhead, 1 + (overhead - 1) * launched) * (tokens * moved / rates.bytes_per_s + launches * gap)
    tensor, context = tensor_s(work, moe) * (1 - work.stack.tensor_hidden), context_s(work, core)
    if moe:
        each = work.stack.expert_launches * (1 if work.dtype == "bf16" else 4)
        launches += each * work.model.n_routed_experts / work.ep
    host = overhead * launches * work.assumptions.host_s * launched
    ahead = max(forward + core + light, host)
    weights += WEIGHT_LIGHT * light
    behind = inputs + 2.5 * core / work.assumptions.attention_backward + (BACKWARD_LIGHT - WEIGHT_LIGHT) * light
    again = ahead + tensor + context if work.recompute is Recompute.full else 0.0
    if work.recompute is Recompute.selective:
        again = _cheap_again(work, rates, moe)
        if work.stack.recomputes_core and model.attention is not Attention.mla:
            again = core
        elif work.stack.recomputed:
            again = work.stack.recomputed * forward + light
        elif work.stack.recomputes_twice:
            again = _own_again(work, rates, moe)
    behind = max(behind, 2 * host - weights)
    sent, up = dispatch_bytes(work) if moe and work.ep > 1 else (0.0, 0.0)
    return LayerTime(ahead + tensor + context, behind + again + tensor + context, weights, sent, up,
                     2.0 if moe and work.ep > 1 else 0.0, again if work.stack.recomputes_twice else 0.0)


def _products(work: Workload, rates: Rates, moe: bool) -> tuple[float, float, float]:
    """Forward, input gradients, weight gradients of a block's matrix products."""
    found = [0.0, 0.0, 0.0]
    summed = work.stack.gradient_bytes * (2 if work.microbatches > 1 and work.zero < 2 else 1)  # read and written
    for rows, columns, inner, groups, low in shapes(work, moe):
        found[0] += product_s(rates, rows, columns, inner, groups=groups, low=low)
        found[1] += product_s(rates, rows, inner, columns, groups=groups, low=low)
        found[2] += product_s(rates, columns, inner, rows, groups=groups, low=low, out=summed)
    return tuple(found)


def shapes(work: Workload, moe: bool) -> list[tuple[float, float, float, float, bool]]:
    """Rows, columns, inner size, equal groups, and whether in the layers' dtype, of a block's products in forward."""
    model, tokens, tp, low = work.model, work.microbatch_tokens, work.tp, work.dtype != "bf16"
    found = []
    if model.attention is Attention.mla:
        queries, latent = model.n_heads * model.qk_head_dim // tp, model.kv_lora_rank + model.qk_rope_head_dim
        if model.q_lora_rank:
            found += [(tokens / tp, model.q_lora_rank, model.dim, 1, low), (tokens, queries, model.q_lora_rank, 1, low)]
        else:
            found.append((tokens, queries, model.dim, 1, low))
        wide = model.n_heads * (model.qk_nope_head_dim + model.v_head_dim) // tp
        found += [(tokens / tp, latent, model.dim, 1, low), (tokens, wide, model.kv_lora_rank, 1, low)]
    else:
        found.append((tokens, (model.n_heads + 2 * model.n_kv_heads) * model.head_dim // tp, model.dim, 1, low))
    found.append((tokens, model.dim, model.n_heads * count.v_head_dim(model) // tp, 1, low))
    if not moe:
        return found + [(tokens, 2 * model.inter_dim // tp, model.dim, 1, low),
                        (tokens, model.dim, model.inter_dim // tp, 1, low)]
    if model.n_shared_experts:
        inner = model.n_shared_experts * model.moe_inter_dim // tp
        found += [(tokens, 2 * inner, model.dim, 1, low), (tokens, model.dim, inner, 1, low)]
    rows = expert_rows(work)
    local, inner = model.n_routed_experts / work.ep, model.moe_inter_dim // work.etp
    return found + [(tokens / tp, model.n_routed_experts, model.dim, 1, False),
                    (rows, 2 * inner, model.dim, local, low), (rows, model.dim, inner, local, low)]


def expert_rows(work: Workload) -> float:
    """Tokens that reach one expert of the fullest rank with one microbatch."""
    model = work.model
    tokens = work.microbatch_tokens / work.tp * work.ep * work.etp
    return tokens * model.n_activated_experts / model.n_routed_experts * work.felt_imbalance


def attention_core_s(work: Workload, rates: Rates) -> float:
    """Seconds of one block's attention core in forward, on one rank."""
    model, tokens, heads = work.model, work.microbatch_tokens, work.model.n_heads / work.tp
    width = (model.qk_head_dim + count.v_head_dim(model)) // 2
    if work.stack.attention == "unfused":
        return unfused_core_s(rates, tokens, work.seq_len, heads, width)
    flops = tokens * count.attention_flops(model, work.seq_len) * work.attended / work.tp
    return core_s(rates, flops, work.seq_len, width)


def _cheap_again(work: Workload, rates: Rates, moe: bool) -> float:
    """What V3 computes again (report, sections 3.2.3 and 3.3.3): MLA's up-projections; RMSNorms and SwiGLU by bytes,
    which is all that other attention has."""
    moved = 2 * 4 * work.model.dim + 6 * _activated(work, moe)
    return work.microbatch_tokens / work.tp * moved / rates.bytes_per_s + _up_again(work, rates)


def _own_again(work: Workload, rates: Rates, moe: bool) -> float:
    """What `model.recompute` does, each for what it takes in forward (`_light_bytes`): nearly every operator between a
    block's products, norms once for each product that reads them; and MLA's up-projections."""
    model, tokens = work.model, work.microbatch_tokens / work.tp
    norms = (2 if model.attention is Attention.mla else 3) + 1 + (moe and model.n_shared_experts > 0)
    moved = 6 * norms * model.dim + 8 * _head_elements(model) + 12 * _activated(work, moe)
    again = tokens * moved / rates.bytes_per_s + work.assumptions.operators * work.assumptions.gap_s
    return again + _up_again(work, rates)


def _up_again(work: Workload, rates: Rates) -> float:
    """MLA's products from latents to queries, keys and values."""
    model, tokens, low = work.model, work.microbatch_tokens / work.tp, work.dtype != "bf16"
    if model.attention is not Attention.mla:
        return 0.0
    seconds = product_s(rates, tokens, model.n_heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank,
                        low=low)
    if model.q_lora_rank:
        seconds += product_s(rates, tokens, model.n_heads * model.qk_head_dim, model.q_lora_rank, low=low)
    return seconds


def _activated(work: Workload, moe: bool) -> float:
    """Elements a token that a block's SwiGLUs put out on the fullest rank."""
    model = work.model
    if not moe:
        return model.inter_dim
    return model.moe_inter_dim * (model.n_activated_experts * work.felt_imbalance + model.n_shared_experts)


def _head_elements(model: ModelConfig) -> float:
    """A token's queries, keys, values and attention output."""
    if model.attention is Attention.mla:
        return model.n_heads * (2 * model.qk_head_dim + 2 * count.v_head_dim(model))
    return (model.n_heads + model.n_kv_heads) * 2 * model.head_dim


def head_time(work: Workload) -> LayerTime:
    """Head, and MTP modules, on the last stage."""
    model, tokens = work.model, work.microbatch_tokens
    rates = rates_of(work.hardware, work.dtype, work.assumptions, work.stack.attention)
    columns, passes = model.vocab_size / work.tp, 1 + model.n_mtp_layers
    logits = work.stack.overhead * tokens * columns * 6 / rates.bytes_per_s
    parts = [product_s(rates, *shape) for shape in ((tokens, columns, model.dim), (tokens, model.dim, columns),
                                                    (columns, model.dim, tokens))]
    twice = work.stack.recomputes_twice and work.recompute is not Recompute.none
    again = passes * parts[0] if twice else 0.0
    forward, backward, weight = (passes * part for part in (parts[0] + logits, parts[1] + logits, parts[2]))
    total = LayerTime(forward, backward + again, weight, again=again)
    for depth in range(model.n_mtp_layers):
        projection = product_s(rates, tokens / work.tp, model.dim, 2 * model.dim)
        total += layer_time(work, model.is_moe(model.n_layers + depth)) + LayerTime(projection, projection, projection)
    return total


def _light_bytes(work: Workload, moe: bool) -> tuple[float, float, float, float]:
    """Bytes per token that memory-bound operators of one block move in forward: norms and residuals; rotary and the
    feed-forward's activation; what routing adds (permutation there and back, twice where every expert is sent a copy,
    and experts' activations); what the stack adds to that. About so many reads and writes of each tensor in bf16, and
    of products' inputs once more where they are quantised."""
    model = work.model
    cast = 3.0 if work.dtype != "bf16" else 0.0
    hidden, wide = (16 + 2 * cast) * model.dim, (8 + cast / 4) * _head_elements(model)
    if not moe:
        return hidden, wide + (12 + cast) * model.inter_dim, 0.0, 0.0
    wide += (12 + cast) * model.moe_inter_dim * model.n_shared_experts
    permuted, active = 10 if work.stack.copies else 6, model.n_activated_experts
    routed = active * ((permuted + cast) * model.dim + (12 + cast) * model.moe_inter_dim)
    return hidden, wide, routed, active * work.stack.routed_bytes * model.dim
