"""How much memory a rank needs, by component: predicted, from the layout and the schedule's own order; no clock."""

from model import count
from model.config import Attention
from orchestrator.config import Recompute
from orchestrator.plan.simulate import held
from orchestrator.plan.workload import Workload, is_last, pipeline_of, rank_parameters

GIB = 2**30


def memory_gib(work: Workload) -> dict[str, float]:
    """By component, of the rank that needs most; needs no clock.

    Dense parameters are whole while a step runs (bf16 copy, fp32 gradient) and sharded over dp at rest (fp32 master,
    two moments); experts are sharded over ep, their state over dp / ep too.
    """
    ranges, table, _ = pipeline_of(work)
    _, activations = held(table, [_activation_bytes(work, layers) for layers in ranges])
    return _memory(work, ranges, table, activations)


def _memory(work: Workload, ranges: list[range], table: list, activations: list[float]) -> dict[str, float]:
    fullest: dict[str, float] = {}
    for rank, row in enumerate(table):
        dense, experts = rank_parameters(work, ranges, row)
        parts = {
            "weights": (dense + experts) * 2,
            "gradients": (dense + experts) * 4,
            "masters": (dense / work.replicas + experts / work.expert_replicas) * 4,
            "moments": (dense / work.replicas + experts / work.expert_replicas) * 8,
            "activations": activations[rank],
            "logits": (work.microbatch_tokens * work.model.vocab_size * 6
                       if any(is_last(work, a.stage, len(ranges)) for slot in row for a in slot) else 0.0),
        }
        if sum(parts.values()) > sum(fullest.values()):
            fullest = parts
    found = {name: size / GIB for name, size in fullest.items()}
    return found | {"total": sum(found.values())}


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
