"""What this program's own modules keep of one microbatch between forward and backward, in bytes on one rank.

Each formula names its tensors in the order of the module's code (model/attention.py, moe.py, transformer.py, fp8.py).
Others' programs are counted by operators (`activations`).
"""

from model.config import Attention, ModelConfig
from orchestrator.plan.workload import Workload

TILE = 128
FP32 = 4


def block_bytes(work: Workload, moe: bool) -> float:
    """One block, its input of the residual stream included."""
    return work.microbatch_tokens * _Kept(work).block(moe)


def head_bytes(work: Workload) -> float:
    """Final norm, the loss of every head, and what an MTP module keeps beside its block."""
    kept, model = _Kept(work), work.model
    extra = sum(kept.mtp(depth, model.is_moe(model.n_layers + depth)) for depth in range(model.n_mtp_layers))
    return work.microbatch_tokens * (kept.head() + extra)


def exchange_bytes(work: Workload) -> float:
    """What one MoE layer's dispatch and combine send and receive in forward."""
    dim, element = work.model.dim, work.keeping.element
    there, back = (_fp8(dim), 2 * dim) if work.dtype == "fp8" else (element * dim, element * dim)
    return work.microbatch_tokens * 2 * work.model.n_activated_experts * work.imbalance * (there + back)


def fp8_backward_bytes(work: Workload, moe: bool) -> float:
    """While the largest product of a block runs backward: its operands, quantised and dequantised one by one."""
    model, rows = work.model, float(work.microbatch_tokens)
    attention = [(rows, model.n_heads * model.v_head_dim, model.dim, 1, False)]
    if model.attention is Attention.mla:
        attention += [(rows, model.q_lora_rank or model.dim, model.n_heads * model.qk_head_dim, 1, False),
                      (rows, model.kv_lora_rank, model.n_heads * (model.qk_nope_head_dim + model.v_head_dim), 1, False)]
    experts, inner = 1, model.inter_dim
    if moe:
        experts, inner = model.n_routed_experts // work.ep, model.moe_inter_dim
        rows *= model.n_activated_experts * work.imbalance
    products = [*attention, (rows, model.dim, 2 * inner, experts, False), (rows, inner, model.dim, experts, True)]
    return max(_product_bytes(work.keeping.element, *product) for product in products)


def _product_bytes(element: float, rows: float, inputs: int, outputs: int, experts: int, swiglu: bool) -> float:
    """rows of each input; every expert's begin a tile of their own where tokens are summed over (`fp8._backward`)."""
    x, grad, weights = 4 * rows * inputs, rows * outputs, inputs * outputs * experts
    padded = 1 + TILE * experts / rows if experts > 1 else 1
    given = element * grad + x + (2 * x if swiglu else 0)
    return given + max(4 * grad + 7 * weights, x + padded * (x + 8 * grad))


class _Kept:
    """Bytes that one token's activations take, module by module."""

    def __init__(self, work: Workload):
        self.model: ModelConfig = work.model
        self.fp8 = work.dtype == "fp8"
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
        return _fp8(2 * size) if self.fp8 else self.element * 3 * size

    def norm(self, size: int, element: int = FP32) -> int:
        return element * size + 4

    def block(self, moe: bool, element: int = FP32) -> float:
        """element: of the residual stream, which is fp32 from the embedding on."""
        model = self.model
        kept = 2 * self.norm(model.dim, element) + self.attention(cast=element == FP32)
        if not moe:
            return kept + self.inputs(model.dim) + self.swiglu(model.inter_dim)
        top_k, experts, orders = model.n_activated_experts, model.n_routed_experts, 8 + 8
        # Router: its input in fp32 (in fp32 also what the shared experts multiply), scores, choices, weights.
        kept += FP32 * model.dim + 4 * experts + top_k * (8 + 4 + 4 + 4)
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
        kept = self.inputs(model.dim, products=products)
        if not mla:
            # The core keeps query, key, value and output, of which the last product's input is a view.
            core = element * (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim + 4 * model.n_heads
            return kept + core + (self.inputs(model.n_heads * model.head_dim) if self.fp8 else 0)
        if model.q_lora_rank:
            kept += self.norm(model.q_lora_rank, element) + self.inputs(model.q_lora_rank)
        kept += element * (model.kv_lora_rank + model.qk_rope_head_dim) + 4 + self.inputs(model.kv_lora_rank)
        # Where the core pads values to the size of keys, its output is cut and copied for the last product.
        value = model.qk_head_dim if self.padded else model.v_head_dim
        kept += element * model.n_heads * 2 * (model.qk_head_dim + value) + 4 * model.n_heads
        copied = self.fp8 or value > model.v_head_dim
        return kept + (self.inputs(model.n_heads * model.v_head_dim) if copied else 0)

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
