"""What this program's own modules keep of one microbatch between forward and backward, in bytes on one rank.

Each formula names its tensors in the order of the module's code (model/attention.py, moe.py, transformer.py, fp8.py).
Others' programs are counted by operators (`activations`).
"""

from model.config import Attention, ModelConfig, QKNorm
from model.count import LOGITS_IN_FP32
from orchestrator.config import Recompute
from orchestrator.plan.workload import Workload

TILE = 128


def block_bytes(work: Workload, moe: bool, recompute: Recompute) -> float:
    """One block, its input of the residual stream included."""
    return work.microbatch_tokens * _Kept(work, recompute).block(moe)


def again_bytes(work: Workload, moe: bool) -> tuple[float, float, float]:
    """What selective recompute makes anew in attention and in the feed-forward, and what the latter had kept, which is
    gone by attention's turn."""
    whole, kept = _Kept(work), _Kept(work, Recompute.selective)
    attention = whole.attention() - kept.attention()
    inner = kept.feed_forward(moe)
    parts = attention, whole.feed_forward(moe) - inner, inner
    return tuple(work.microbatch_tokens * part for part in parts)


def head_bytes(work: Workload) -> float:
    """Final norm, the loss of every head, and what an MTP module keeps beside its block."""
    kept, model = _Kept(work, work.recompute), work.model
    return work.microbatch_tokens * (kept.head() + model.n_mtp_layers * kept.mtp())


def mtp_head_bytes(work: Workload) -> float:
    """An MTP module's final norm and loss."""
    return work.microbatch_tokens * _Kept(work, work.recompute).head()


def loss_bytes(work: Workload) -> float:
    """Logits that backward makes again, their gradients, and the few that are in fp32 at a time."""
    element, logits = work.keeping.element, work.microbatch_tokens * work.model.vocab_size
    made = 1 if work.recompute is Recompute.none else 2
    return made * element * logits + 4 * min(logits, LOGITS_IN_FP32[work.hardware.device])


def exchange_bytes(work: Workload) -> float:
    """What one MoE layer's dispatch and combine send and receive in forward, a weight with each row that leaves."""
    dim, element = work.model.dim, work.keeping.element
    there, back = (_fp8(dim), 2 * dim) if work.dtype == "fp8" else (element * dim, element * dim)
    return work.microbatch_tokens * 2 * work.model.n_activated_experts * work.imbalance * (there + 4 + back)


def fp8_backward_bytes(work: Workload, moe: bool) -> tuple[float, float]:
    """While the largest product of attention, of the feed-forward runs backward: its operands, quantised and
    dequantised one by one."""
    model, rows = work.model, float(work.microbatch_tokens)
    attention = [(rows, model.n_heads * model.v_head_dim, model.dim, 1, False)]
    if model.attention is Attention.mla:
        attention += [(rows, model.q_lora_rank or model.dim, model.n_heads * model.qk_head_dim, 1, False),
                      (rows, model.kv_lora_rank, model.n_heads * (model.qk_nope_head_dim + model.v_head_dim), 1, False)]
    experts, inner = 1, model.inter_dim
    if moe:
        experts, inner = model.n_routed_experts // work.ep, model.moe_inter_dim
        rows *= model.n_activated_experts * work.imbalance
    feed_forward = [(rows, model.dim, 2 * inner, experts, False), (rows, inner, model.dim, experts, True)]
    return tuple(max(_product_bytes(work.keeping.element, *product) for product in products)
                 for products in (attention, feed_forward))


def _product_bytes(element: float, rows: float, inputs: int, outputs: int, experts: int, swiglu: bool) -> float:
    """rows of each input; every expert's begin a tile of their own where tokens are summed over (`fp8._backward`)."""
    x, grad, weights = 4 * rows * inputs, rows * outputs, inputs * outputs * experts
    padded = 1 + TILE * experts / rows if experts > 1 else 1
    given = element * grad + x + (2 * x if swiglu else 0)
    return given + max(4 * grad + 7 * weights, x + padded * (x + 8 * grad))


class _Kept:
    """Bytes that one token's activations take, module by module."""

    def __init__(self, work: Workload, recompute: Recompute = Recompute.none):
        self.model: ModelConfig = work.model
        self.fp8 = work.dtype == "fp8"
        self.recompute, self.less = recompute, recompute is Recompute.selective
        self.element = work.keeping.element
        """Bytes of what is neither in FP8 nor always in fp32."""
        self.padded = work.keeping.padded_values
        self.arrived = work.model.n_activated_experts * work.imbalance
        """Rows at the fullest rank's experts."""
        self.exchanged = work.ep > 1

    def inputs(self, size: int, products: int = 1) -> int:
        """What `products` linear layers of one input keep of it: the tensor itself, or a copy each in FP8."""
        return products * _fp8(size) if self.fp8 else size * self.element

    def normed(self, products: int = 1) -> int:
        """The same of a block's norm's output."""
        return 0 if self.less else self.inputs(self.model.dim, products)

    def swiglu(self, size: int) -> int:
        """Its input [2 size], and the input of the product that follows, which FP8 computes again."""
        return _fp8(2 * size) if self.fp8 else self.element * (2 if self.less else 3) * size

    def norm(self, size: int) -> int:
        return self.element * size + 4

    def block(self, moe: bool) -> float:
        return 2 * self.norm(self.model.dim) + self.attention() + self.feed_forward(moe)

    def feed_forward(self, moe: bool) -> float:
        model = self.model
        if not moe:
            return self.normed() + self.swiglu(model.inter_dim)
        top_k, experts, orders = model.n_activated_experts, model.n_routed_experts, 8 + 8
        # Router: its input, which is what the shared experts multiply, too; scores, choices, weights.
        kept = (0 if self.less else self.element * model.dim) + 4 * experts + top_k * (8 + 4 + 4)
        # Sorted by expert here, and once more where rows arrive; these, their weights, their SwiGLU.
        kept += top_k * orders + self.arrived * orders * self.exchanged
        kept += self.arrived * (self.inputs(model.dim) + 4 + self.swiglu(model.moe_inter_dim))
        if model.n_shared_experts:
            kept += self.normed() if self.fp8 else 0
            kept += self.swiglu(model.n_shared_experts * model.moe_inter_dim)
        return kept

    def attention(self) -> int:
        model, element = self.model, self.element
        mla = model.attention is Attention.mla
        kept = self.normed(products=2 if mla else 3)
        # The core keeps query, key, value and output, of which the last product's input is a view.
        if not mla:
            if model.qk_norm is not QKNorm.none and not self.less:
                scales = 2 if model.qk_norm is QKNorm.full else model.n_heads + model.n_kv_heads
                kept += element * (model.n_heads + model.n_kv_heads) * model.head_dim + 4 * scales
            return kept + element * (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim + 4 * model.n_heads
        # Where the core pads values to the size of keys, its output is cut and copied for the last product.
        value = model.qk_head_dim if self.padded else model.v_head_dim
        out = element * model.n_heads * value + 4 * model.n_heads
        if value > model.v_head_dim:
            out += element * model.n_heads * model.v_head_dim
        latents = element * (model.kv_lora_rank + model.qk_rope_head_dim)
        if self.less:
            return kept + out + latents + element * (model.q_lora_rank or model.n_heads * model.qk_head_dim)
        if model.q_lora_rank:
            kept += self.norm(model.q_lora_rank) + self.inputs(model.q_lora_rank)
        kept += latents + 4 + self.inputs(model.kv_lora_rank)
        return kept + out + element * model.n_heads * (2 * model.qk_head_dim + value)

    def head(self) -> int:
        """Final norm, the head's input, logits and the logarithm of their sum."""
        logits = self.element * self.model.vocab_size if self.recompute is Recompute.none else 0
        return self.norm(self.model.dim) + self.element * self.model.dim + logits + 4

    def mtp(self) -> int:
        """Two norms, of which the first one's input is the last head's or the last depth's, which are there; the
        projection's input; and the head once more, which is all where the rest is made again, from the first norm's
        input: that of its block, which is counted with the blocks, is not kept."""
        dim = self.model.dim
        if self.recompute is Recompute.full:
            return self.head() - self.element * dim
        return 2 * self.norm(dim) - self.element * dim + self.element * 2 * dim + self.head()


def _fp8(size: int) -> int:
    """E4M3 values and the fp32 scale of each 1x128 tile."""
    return size + 4 * -(-size // TILE)
