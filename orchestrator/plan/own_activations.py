"""What this program's own modules keep of one microbatch between forward and backward, in bytes on one rank.

Each formula names its tensors in the order of the module's code (model/attention.py, moe.py, transformer.py, fp8.py).
Others' programs are counted by operators (`activations`).
"""

from model.config import Attention, ModelConfig
from orchestrator.config import Recompute
from orchestrator.plan.workload import Workload

TILE = 128
FP32 = 4


def block_bytes(work: Workload, moe: bool, recompute: Recompute) -> float:
    """One block, its input of the residual stream included."""
    return work.microbatch_tokens * _Kept(work, recompute).block(moe)


def again_bytes(work: Workload, moe: bool) -> tuple[float, float, float]:
    """What selective recompute makes anew in attention and in the feed-forward, and what the latter had kept, which is
    gone by attention's turn."""
    whole, kept = _Kept(work), _Kept(work, Recompute.selective)
    attention = whole.attention(cast=True) - kept.attention(cast=True)
    inner = kept.feed_forward(moe)
    parts = attention, whole.feed_forward(moe) - inner, inner
    return tuple(work.microbatch_tokens * part for part in parts)


def head_bytes(work: Workload) -> float:
    """Final norm, the loss of every head, and what an MTP module keeps beside its block."""
    kept, model = _Kept(work), work.model
    extra = sum(kept.mtp(depth, model.is_moe(model.n_layers + depth)) for depth in range(model.n_mtp_layers))
    return work.microbatch_tokens * (kept.head() + extra)


def mtp_head_bytes(work: Workload) -> float:
    """An MTP module's final norm and loss."""
    kept = _Kept(work)
    return work.microbatch_tokens * kept.head(kept.element)


def exchange_bytes(work: Workload) -> float:
    """What one MoE layer's dispatch and combine send and receive in forward."""
    dim, element = work.model.dim, work.keeping.element
    there, back = (_fp8(dim), 2 * dim) if work.dtype == "fp8" else (element * dim, element * dim)
    return work.microbatch_tokens * 2 * work.model.n_activated_experts * work.imbalance * (there + back)


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
        self.less = recompute is Recompute.selective
        self.norms_again = self.less and not self.fp8
        """Their outputs, as inputs of the products that follow: `Block.norms_again`."""
        self.element = work.keeping.element
        """Bytes of what is neither in FP8 nor always in fp32."""
        self.padded = work.keeping.padded_values
        self.arrived = work.model.n_activated_experts * work.imbalance
        """Rows at the fullest rank's experts."""
        self.exchanged = work.ep > 1

    def inputs(self, size: int, products: int = 1) -> int:
        """What `products` linear layers of one input keep of it: the tensor itself, or a copy each in fewer bits."""
        if self.fp8:
            return products * _fp8(size)
        return size * (FP32 if self.element == FP32 else products * self.element)

    def swiglu(self, size: int) -> int:
        """Its input [2 size], and the input of the product that follows, which FP8 computes again."""
        return _fp8(2 * size) if self.fp8 else self.element * (2 if self.less else 3) * size

    def norm(self, size: int, element: int = FP32) -> int:
        return element * size + 4

    def block(self, moe: bool, element: int = FP32) -> float:
        """element: of the residual stream, which is fp32 from the embedding on."""
        norms = 2 * self.norm(self.model.dim, element) - 4 * self.norms_again * (1 if moe else 2)
        return norms + self.attention(cast=element == FP32) + self.feed_forward(moe)

    def feed_forward(self, moe: bool) -> float:
        model = self.model
        if not moe:
            return (0 if self.norms_again else self.inputs(model.dim)) + self.swiglu(model.inter_dim)
        top_k, experts, orders = model.n_activated_experts, model.n_routed_experts, 8 + 8
        # Router: its input in fp32 (in fp32 also what the shared experts multiply), scores, choices, weights.
        kept = FP32 * model.dim + 4 * experts + top_k * (8 + 4 + 4 + 4)
        # Sorted by expert here, and once more where rows arrive; their SwiGLU; outputs in token order.
        kept += top_k * (orders + self.element * model.dim) + self.arrived * orders * self.exchanged
        kept += self.arrived * (self.inputs(model.dim) + self.swiglu(model.moe_inter_dim))
        if model.n_shared_experts:
            kept += 0 if self.element == FP32 and not self.fp8 else self.inputs(model.dim)
            kept += self.swiglu(model.n_shared_experts * model.moe_inter_dim)
        return kept

    def attention(self, *, cast: bool) -> int:
        """cast: autocast makes a copy of the input for each product, as it does of fp32."""
        model, element = self.model, self.element
        mla = model.attention is Attention.mla
        products = (2 if mla else 3) if cast or self.fp8 else 1
        kept = 0 if self.norms_again else self.inputs(model.dim, products=products)
        if not mla:
            # The core keeps query, key, value and output, of which the last product's input is a view.
            core = element * (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim + 4 * model.n_heads
            return kept + core + (self.inputs(model.n_heads * model.head_dim) if self.fp8 else 0)
        # Where the core pads values to the size of keys, its output is cut and copied for the last product.
        value = model.qk_head_dim if self.padded else model.v_head_dim
        out = element * model.n_heads * value + 4 * model.n_heads
        if self.fp8 or value > model.v_head_dim:
            out += self.inputs(model.n_heads * model.v_head_dim)
        latents = element * (model.kv_lora_rank + model.qk_rope_head_dim)
        if self.less:
            return kept + out + latents + element * (model.q_lora_rank or model.n_heads * model.qk_head_dim)
        if model.q_lora_rank:
            kept += self.norm(model.q_lora_rank, element) + self.inputs(model.q_lora_rank)
        kept += latents + 4 + self.inputs(model.kv_lora_rank)
        return kept + out + element * model.n_heads * (2 * model.qk_head_dim + value)

    def head(self, element: int = FP32) -> int:
        """Final norm, the head's input, and the logarithms of the softmax in fp32."""
        model = self.model
        return self.norm(model.dim, element) + self.element * model.dim + 4 * model.vocab_size

    def mtp(self, depth: int, moe: bool) -> float:
        """Two norms, the projection's input, and the head once more; and by how much its block, on the projection's
        output, differs from others.

        The first norm's input is the head's at depth 1, unless that was cast; later the last depth's final norm's.
        """
        model, shared = self.model, depth > 0 or self.element == FP32
        kept = 2 * self.norm(model.dim) - (FP32 * model.dim if shared else 0) + self.element * 2 * model.dim
        return kept + self.block(moe, self.element) - self.block(moe) + self.head(self.element)


def _fp8(size: int) -> int:
    """E4M3 values and the fp32 scale of each 1x128 tile."""
    return size + 4 * -(-size // TILE)
