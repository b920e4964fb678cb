"""What one training step holds in memory, by component, for fp32, bf16 and FP8: this program's own allocations, counted
tensor by tensor, of a whole model in one process (plan/memory.py divides a planned layout's among its ranks).

T tokens of a microbatch. "Kept" is what autograd holds between forward and backward; each formula names its tensors in
the order of the module's code (model/attention.py, moe.py, transformer.py, fp8.py).
"""

from model import count
from model.config import Attention, ModelConfig

PRECISIONS = ("fp32", "bf16", "fp8")
TILE = 128


def training_bytes(model: ModelConfig, *, precision: str, tokens: int, on_cpu: bool = False,
                   microbatches: int = 1) -> dict[str, float]:
    """weights (copies in the compute dtype), masters, gradients, moments, activations and communication, in bytes.

    tokens: of a microbatch. on_cpu: beside FP8 products stands fp32 instead of bf16, and attention pads its values.
    microbatches: those whose activations are held at a time. communication: what one MoE layer's dispatch and combine
    send and receive in forward, when tokens are spread evenly.
    """
    assert precision in PRECISIONS, precision
    parts = count.parameters(model, mtp=True)
    total = parts.total - _router_biases(model)
    keep = _Kept(model, precision, on_cpu)
    held = sum(keep.block(layer) for layer in range(model.n_layers)) + keep.head()
    held += sum(keep.mtp(depth) for depth in range(model.n_mtp_layers))
    moe_layers = any(model.is_moe(layer) for layer in range(model.n_layers))
    return {
        "weights": 2.0 * _cast(model, parts, precision) if keep.element == 2 else 0.0,
        "masters": 4.0 * total,
        "gradients": 4.0 * total,
        "moments": (4.0 if precision == "fp8" else 8.0) * total,
        "activations": float(held * tokens * microbatches),
        "communication": float(tokens * keep.exchange()) if moe_layers else 0.0,
    }


class _Kept:
    """Bytes that one token's activations take, module by module."""

    def __init__(self, model: ModelConfig, precision: str, on_cpu: bool):
        self.model, self.precision, self.on_cpu = model, precision, on_cpu
        self.element = 4 if precision == "fp32" or (precision == "fp8" and on_cpu) else 2
        """Bytes of what is neither in FP8 nor always in fp32."""

    def inputs(self, size: int, products: int = 1) -> int:
        """What `products` linear layers of one input keep of it: the tensor itself, or a copy each in fewer bits."""
        if self.precision == "fp8":
            return products * _fp8(size)
        return 4 * size if self.precision == "fp32" else products * 2 * size

    def swiglu(self, size: int) -> int:
        """Its input [2 size], and the input of the product that follows, which FP8 computes again."""
        if self.precision == "fp8":
            return _fp8(2 * size)
        return self.element * 3 * size

    def norm(self, size: int, element: int = 4) -> int:
        return element * size + 4

    def block(self, layer: int, element: int = 4) -> int:
        """element: of the residual stream, which is fp32 from the embedding on."""
        model = self.model
        kept = 2 * self.norm(model.dim, element) + self.attention(cast=element == 4)
        if not model.is_moe(layer):
            return kept + self.inputs(model.dim) + self.swiglu(model.inter_dim)
        top_k, experts = model.n_activated_experts, model.n_routed_experts
        # Router: its input in fp32 (in fp32 also what the shared experts multiply), scores, choices, weights.
        kept += 4 * model.dim + 4 * experts + top_k * (8 + 4 + 4 + 4)
        # Order and its inverse; rows, SwiGLU; outputs in token order.
        kept += top_k * (8 + 8 + self.inputs(model.dim) + self.swiglu(model.moe_inter_dim) + self.element * model.dim)
        if model.n_shared_experts:
            kept += 0 if self.precision == "fp32" else self.inputs(model.dim)
            kept += self.swiglu(model.n_shared_experts * model.moe_inter_dim)
        return kept

    def attention(self, *, cast: bool) -> int:
        """cast: autocast makes a copy of the input for each product, as it does of fp32."""
        model, element = self.model, self.element
        mla = model.attention is Attention.mla
        products = (2 if mla else 3) if cast or self.precision == "fp8" else 1
        kept = self.inputs(model.dim, products=products)
        if not mla:
            # The core keeps query, key, value and output, of which the last product's input is a view.
            core = element * (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim + 4 * model.n_heads
            return kept + core + (self.inputs(model.n_heads * model.head_dim) if self.precision == "fp8" else 0)
        if model.q_lora_rank:
            kept += self.norm(model.q_lora_rank, element) + self.inputs(model.q_lora_rank)
        kept += element * (model.kv_lora_rank + model.qk_rope_head_dim) + 4 + self.inputs(model.kv_lora_rank)
        # Where the core pads values to the size of keys, its output is cut and copied for the last product.
        value = model.qk_head_dim if self.on_cpu else model.v_head_dim
        kept += element * model.n_heads * 2 * (model.qk_head_dim + value) + 4 * model.n_heads
        copied = self.precision == "fp8" or value > model.v_head_dim
        return kept + (self.inputs(model.n_heads * model.v_head_dim) if copied else 0)

    def head(self, element: int = 4) -> int:
        """Final norm, the head's input, and the logarithms of the softmax in fp32."""
        model = self.model
        return self.norm(model.dim, element) + self.element * model.dim + 4 * model.vocab_size

    def mtp(self, depth: int) -> int:
        """Two norms, the projection's input, a block on its output, and the head once more.

        The first norm's input is the head's at depth 1, unless that was cast; later the last depth's final norm's.
        """
        model, shared = self.model, depth > 0 or self.element == 4
        kept = 2 * self.norm(model.dim) - (4 * model.dim if shared else 0) + self.element * 2 * model.dim
        return kept + self.block(model.n_layers + depth, self.element) + self.head(self.element)

    def exchange(self) -> int:
        dim = self.model.dim
        there, back = (_fp8(dim), 2 * dim) if self.precision == "fp8" else (4 * dim, self.element * dim)
        return 2 * self.model.n_activated_experts * (there + back)


def _fp8(size: int) -> int:
    """E4M3 values and the fp32 scale of each 1x128 tile."""
    return size + 4 * -(-size // TILE)


def _cast(model: ModelConfig, parts: count.Parameters, precision: str) -> int:
    """Elements of the bf16 copies that autocast keeps of the matrices it multiplies by, the head's once per depth more.
    Copies in FP8 live for one product only."""
    head = model.vocab_size * model.dim * (1 + model.n_mtp_layers)
    if precision == "fp8":
        return head + parts.mtp_proj
    return head + parts.total - parts.norms - parts.router - parts.embedding - parts.head


def _router_biases(model: ModelConfig) -> int:
    layers = sum(model.is_moe(layer) for layer in range(model.n_layers)) + (
        model.n_mtp_layers if model.n_routed_experts else 0)
    return layers * model.n_routed_experts if model.expert_bias else 0
