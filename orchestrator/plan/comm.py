"""What collectives cost: tensor and context parallelism inside a layer, gradients and weights once a step.

Ring collectives over the slowest link they cross, at the share of it that is reached alone, plus a latency each. Not
here: the experts' all-to-all and pipeline sends (`estimate`), which the schedule may overlap.
"""

from model.config import Attention
from orchestrator.plan.exchange import domains, scale_up_bytes_per_s
from orchestrator.plan.workload import Workload, rank_parameters


def tensor_s(work: Workload, moe: bool) -> float:
    """Seconds of one block's forward: two all-gathers and two reduce-scatters of its tokens (Korthikanti et al.,
    figure 5), as many bytes as two all-reduces without sequence parallelism. Backward takes as long. Not overlapped.
    Tokens leave for their experts from the ranks that share them, so that without shared or split experts attention's
    half is all."""
    if work.tp == 1:
        return 0.0
    whole = not moe or work.model.n_shared_experts or work.etp > 1 or not work.stack.sequence_parallel
    payload = work.microbatch_tokens * work.model.dim * 2 * (work.tp - 1) / work.tp
    return (4 if whole else 2) * (payload / _ring(work, work.tp) + _around(work, work.tp))


def context_s(work: Workload, core_s: float) -> float:
    """Seconds of one block's forward that a ring of keys and values takes beyond the attention core `core_s`."""
    if work.cp == 1:
        return 0.0
    model = work.model
    if model.attention is Attention.mla:
        width = model.kv_lora_rank + model.qk_rope_head_dim
    else:
        width = 2 * model.n_kv_heads * model.head_dim / work.tp
    hop = work.microbatch_tokens * width * 2 / _link(work, work.tp * work.cp) + work.assumptions.latency_s
    return max(0.0, (work.cp - 1) * hop - core_s)


def reduce_s(work: Workload, ranges: list[range], table: list, compute_s: float) -> float:
    """Seconds a step of gradient reduce-scatter and weight all-gather.

    Ranks of a node that have the same parameters share its way out: all of them for dense ones, of experts those of
    different groups.
    Stage 1 moves fp32 gradients and bf16 weights once, after the last microbatch. Stage 2 keeps no whole gradient, so
    it scatters every microbatch's, and stage 3 gathers weights for forward and backward too; behind computation as far
    as `compute_s` goes.
    """
    per_byte, shown = 0.0, 1 - work.stack.reduce_hidden
    blocks, start = max(map(len, ranges)) * len({a.stage for s in table[0] for a in s}), 0.0
    numbers = max((rank_parameters(work, ranges, row) for row in table), key=sum)
    for number, replicas, holding, buckets in zip(numbers, (work.replicas, work.expert_replicas),
                                                  (work.tp, work.ep * work.etp), (blocks + 1, blocks), strict=True):
        if number and replicas > 1:
            per_byte += number * (replicas - 1) / replicas / _shared(work, holding)
            start += (work.assumptions.bucket_s + _around(work, replicas)) * buckets
    if work.zero == 0:
        return (2 * work.stack.gradient_bytes * per_byte + 2 * start) * shown
    if work.zero == 1:
        return ((work.stack.gradient_bytes + 2) * per_byte + 2 * start) * shown
    once, each = (2, work.stack.gradient_bytes) if work.zero == 2 else (0, work.stack.gradient_bytes + 4)
    whole = (each * per_byte + (1 if work.zero == 2 else 3) * start) * work.microbatches
    exposed = max(0.0, whole - compute_s) + (1 - work.assumptions.behind) * min(whole, compute_s)
    return exposed + (once * per_byte + start * (work.zero == 2)) * shown


def _shared(work: Workload, holding: int) -> float:
    """Bytes/s of each rank while all reduce; every `holding` neighbours have the parameters once."""
    hardware = work.hardware
    ranks = work.devices if work.copies > 1 else work.replicas * work.tp  # copies are at a pipeline's two ends
    found = scale_up_bytes_per_s(hardware, ranks)
    if domains(work, ranks) > 1:
        found = min(found, hardware.scale_out_gb_per_s * max(1, hardware.scale_up_devices // holding) * 1e9)
    return found * work.assumptions.network


def _around(work: Workload, ranks: int) -> float:
    """Seconds that a ring over so many ranks takes beyond its bytes."""
    return work.assumptions.latency_s + (ranks - 1) * work.assumptions.hop_s


def _link(work: Workload, ranks: int) -> float:
    """Bytes/s that one of so many neighbouring ranks reaches alone."""
    hardware = work.hardware
    if domains(work, ranks) > 1:
        return hardware.scale_out_gb_per_s * 1e9 * work.assumptions.network
    few = 1.0 if hardware.peer_gb_per_s else 1 - work.assumptions.few_ranks / ranks**2
    return scale_up_bytes_per_s(hardware, ranks) * work.assumptions.network * few


def _ring(work: Workload, ranks: int) -> float:
    """Bytes/s of a ring over so many neighbouring ranks: between nodes it uses the scale-out links of all of them."""
    hardware = work.hardware
    if domains(work, ranks) == 1:
        return _link(work, ranks)
    return min(hardware.scale_up_gb_per_s * 1e9 * work.assumptions.network,
               hardware.scale_up_devices * _link(work, ranks))
