"""What a stage keeps of one microbatch between forward and backward, tensor by tensor, in bytes on one rank.

Counted from the operators (Korthikanti et al. 2022, section 4, with a kernel that keeps no score matrix, and with
latent attention and routed experts, which they lack); this program's own from its code (`own_activations`). D dim, F
inner width, K activated experts.
"""

from model import count
from model.config import Attention, QKNorm
from orchestrator.config import Recompute
from orchestrator.plan import own_activations
from orchestrator.plan.workload import Workload


def block_bytes(work: Workload, moe: bool, recompute: Recompute | None = None) -> float:
    """One block. `selective` drops what is cheap: norms, MLA's up-projections, score matrices, SwiGLU outputs."""
    recompute = recompute or work.recompute
    keep, dim = work.keeping, stream(work)
    if recompute is Recompute.full:
        return work.microbatch_tokens * dim * keep.element
    if keep.eager:
        return own_activations.block_bytes(work, moe, recompute)
    cheap = recompute is Recompute.selective
    norms = 2 * dim * (keep.element + (0 if cheap else _product(work)))
    masks = 2 * dim if keep.dropout else 0
    inner = _experts(work, cheap) if moe else _gated(work, work.model.inter_dim / work.tp, cheap)
    return work.microbatch_tokens * (norms + masks + _attention(work, cheap) + inner)


def head_bytes(work: Workload) -> float:
    """Final norm, and the loss of every head: the input of the norm, its output, the log-probabilities."""
    if work.keeping.eager:
        return own_activations.head_bytes(work)
    heads = 1 + work.model.n_mtp_layers
    kept = stream(work) * (work.keeping.element + _product(work)) + _vocabulary(work) * work.keeping.logit_kept
    return work.microbatch_tokens * heads * kept


def first_head_bytes(work: Workload) -> float:
    """Of `head_bytes`, what is gone when the first block's backward begins: all of it, or with MTP modules the last
    one's head, whose block is the first."""
    if not work.model.n_mtp_layers:
        return head_bytes(work)
    if work.keeping.eager:
        return own_activations.mtp_head_bytes(work)
    return head_bytes(work) / (1 + work.model.n_mtp_layers)


def loss_bytes(work: Workload) -> float:
    """Beyond `head_bytes` at the peak of one head's loss."""
    if work.keeping.eager:
        return own_activations.loss_bytes(work)
    return work.microbatch_tokens * _vocabulary(work) * (work.keeping.logit - work.keeping.logit_kept)


def backward_bytes(work: Workload, moe: bool) -> float:
    """Beyond what is kept while one block's backward runs: what it computes again, and gradients of its widest part."""
    model, tokens, keep = work.model, work.microbatch_tokens, work.keeping
    gradients = 2 * tokens * keep.element * stream(work)
    if keep.eager and work.recompute is Recompute.selective:
        attention, inner, gone = own_activations.again_bytes(work, moe)
        again = max(attention, inner)
    else:
        again = block_bytes(work, moe, Recompute.none) - block_bytes(work, moe)
        attention, inner, gone = again, again, 0.0
    if keep.eager and work.dtype == "fp8":
        first, last = own_activations.fp8_backward_bytes(work, moe)
        return gradients + max(attention + first - gone, inner + last)
    again += gradients
    reached = model.n_activated_experts * work.imbalance
    width = 3 * (reached * model.moe_inter_dim if moe else model.inter_dim) / work.tp
    rows = reached * stream(work) if moe else 0
    return again + tokens * keep.element * (width + rows)


def gradient_bytes(work: Workload, moe: bool) -> float:
    """Of the outputs of one block's products and norms, which a weight part multiplies with their inputs, and of the
    norms' inputs, which autograd does not let go either."""
    model, heads, values = work.model, work.model.n_heads / work.tp, count.v_head_dim(work.model)
    if model.attention is Attention.mla:
        attention = (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim
                     + heads * (model.qk_head_dim + model.qk_nope_head_dim + values))
    else:
        attention = (heads + 2 * model.n_kv_heads / work.tp) * model.head_dim
    if moe:
        shared = 2 * model.n_shared_experts * model.moe_inter_dim / work.tp
        shared += stream(work) if model.n_shared_experts else 0
        rows = model.n_activated_experts * work.imbalance
        inner = shared + model.n_routed_experts + rows * (2 * model.moe_inter_dim + model.dim)
    else:
        inner = 2 * model.inter_dim / work.tp + stream(work)
    return work.microbatch_tokens * work.keeping.element * (attention + 5 * stream(work) + inner)


def stream(work: Workload) -> float:
    """Elements per token of the residual stream on one rank."""
    return work.model.dim / (work.tp if work.keeping.sequence_parallel else 1)


def _product(work: Workload) -> float:
    """Bytes of an element that only a product reads again: FP8 products keep it in FP8."""
    return 1 if work.dtype == "fp8" else work.keeping.element


def _vocabulary(work: Workload) -> float:
    return work.model.vocab_size / work.tp


def _attention(work: Workload, cheap: bool) -> float:
    """Latents, queries, keys, values, output; bytes per token."""
    model, keep = work.model, work.keeping
    element, heads, values = keep.element, model.n_heads / work.tp, count.v_head_dim(model)
    scores = heads * work.seq_len / work.cp * (2 * element + 1 if keep.dropout else element)
    core = 4 * heads if keep.flash else (0 if cheap else scores)
    out = heads * values * (1.5 if keep.fp8_more and work.dtype == "fp8" else element)
    if model.attention is not Attention.mla:
        queries_keys = (model.n_heads + model.n_kv_heads) / work.tp * model.head_dim
        normed = queries_keys if model.qk_norm is not QKNorm.none and not cheap else 0
        return core + out + element * (queries_keys + normed + model.n_kv_heads / work.tp * values)
    latents = model.q_lora_rank + model.kv_lora_rank
    kept = element * (latents + model.qk_rope_head_dim) + out
    if cheap:
        return core + kept
    up = heads * (2 * model.qk_head_dim + model.qk_nope_head_dim + values)
    if keep.padded_values:
        up = heads * 4 * model.qk_head_dim
    return core + kept + _product(work) * latents + element * up


def _gated(work: Workload, inner: float, cheap: bool) -> float:
    """SwiGLU's two inputs, and its output, which a product reads."""
    gates = _product(work) if work.keeping.fp8_more else work.keeping.element
    return inner * (2 * gates + (0 if cheap else _product(work)))


def _experts(work: Workload, cheap: bool) -> float:
    """Router, the rows that arrive (as many as leave, were routing even), their SwiGLU, shared experts.

    The fullest rank's rows count. Indices and weights are of 8 and 4 bytes. Ranks that split an expert see each
    other's rows.
    """
    model, keep = work.model, work.keeping
    share = work.tp if keep.sequence_parallel else 1
    rows = model.n_activated_experts / share
    router = 4 * model.n_routed_experts / share + 32 * rows
    arrived = work.etp * model.dim * _product(work)
    gathered = work.ep * work.etp / share * model.dim * keep.element if keep.gathers_tokens else 0
    routed = gathered + rows * work.imbalance * (arrived + _gated(work, model.moe_inter_dim, cheap))
    return router + routed + _gated(work, model.n_shared_experts * model.moe_inter_dim / work.tp, cheap)
