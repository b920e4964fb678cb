"""Eight-bit training as DeepSeek-V3 does it (report section 3.3), as drop-in classes for a model's linear layers.

Every linear product of a block runs on E4M3 operands, three times a step: forward, input gradient, weight gradient.
Operands are quantised online: activations and their gradients in 1x128 tiles along the axis that is summed over,
weights in 128x128 blocks (once a step, for all its microbatches), each with the scale that puts its largest magnitude
at 448. What backward needs is kept in FP8: a product's input, or the input of the SwiGLU whose output is then computed
again; but for inputs that are there anyway (attention's output) or made again (`keeps_input`). Embedding, head, MTP
projection, router, norms and the attention core stay as they were; so do master weights and gradients, fp32.

The products run on FP8 tensor cores where there are some (`fp8_kernels`). Elsewhere they multiply dequantised values:
what tensor cores with exact accumulation would give, on any machine. In fp32, or on GPUs in bf16 where that is exact,
too (`product_dtype`).

Shapes: R rows (tokens), K inputs, N outputs, E experts (1 for an ordinary layer).
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from model.moe import FeedForward, GroupedExperts, LocalDispatcher, MoE, Routing, Sorted, permute
from model.ops import autocast_dtype, grouped_mm, of_weight, swiglu, swiglu_backward, wanted
from model.quantize import (
    AMAX_FLOOR,
    GRAD_AMAX_FLOOR,
    TILE,
    Quantized,
    act_dequant,
    act_quant,
    pack,
    quant_over_tokens,
    tiles_of,
    token_tiles,
    unpack,
    weight_dequant,
    weight_quant,
    widened,
)

logger = logging.getLogger(__name__)

KEPT = ("lm_head", "gate", "proj")
"""Linear layers that stay in higher precision, by the last part of their names: head, router, MTP projection (which
DeepSeek's FP8 release keeps in bf16)."""


def to_fp8(model: nn.Module, *, power_of_two: bool = False) -> None:
    """Turn the linear layers, SwiGLUs and experts of a model or stage into their FP8 kin, parameters untouched.

    power_of_two: all scales are; those of the attention output and of what is dispatched to experts are always.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            kind = next((new for old, new in KIN.items() if type(child) is old), None)
            if kind is None or name in KEPT:
                continue
            # As fully_shard does it: names, parameters and hooks stay what they are.
            child.__class__ = kind
            child.power_of_two = power_of_two or name == "wo"
            if name == "wo":
                child.keeps_input = True
        if isinstance(module, MoE) and type(module.dispatcher) is LocalDispatcher:
            module.dispatcher = Fp8LocalDispatcher(module.dispatcher.n_routed_experts)


class Fp8Linear(nn.Linear):
    power_of_two = False
    keeps_input = False
    """The input is kept as it is, for it costs nothing, and quantised once more in backward."""

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x.flatten(0, -2), self.weight, None, self.power_of_two, self.power_of_two,
                             self.keeps_input)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Fp8FeedForward(FeedForward):
    power_of_two = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.w13(x)
        out = _SwiGLUProduct.apply(hidden.flatten(0, -2), self.w2.weight, None, None, self.power_of_two,
                                   self.power_of_two)
        return out.unflatten(0, x.shape[:-1])


class Fp8GroupedExperts(GroupedExperts):
    """Rows that come from a dispatch, and gradients that come from one, have scales that are powers of two: then
    what was quantised before the exchange is quantised again after it without a further error."""

    power_of_two = False

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        hidden = _Product.apply(x, self.w13, counts, True, self.power_of_two)
        return _SwiGLUProduct.apply(hidden, self.w2, weights, counts, self.power_of_two, True)


class Fp8LocalDispatcher(LocalDispatcher):
    """What `AllToAllDispatcher` does to the values that it sends, without sending: FP8 on the way to the experts,
    bf16 on the way back, in backward as in forward (report section 3.3.3)."""

    def dispatch(self, tokens: Tensor, routing: Routing) -> Sorted:
        received, permutation = permute(tokens, routing, self.n_routed_experts)
        return Sorted(received._replace(rows=_Wire.apply(received.rows, _through_fp8, _through_bf16)), permutation)

    def combine(self, out: Tensor, handle: Sorted) -> Tensor:
        return super().combine(_Wire.apply(out, _through_bf16, _through_fp8), handle)


KIN = {nn.Linear: Fp8Linear, FeedForward: Fp8FeedForward, GroupedExperts: Fp8GroupedExperts}


def product_dtype(device: torch.device, exact: bool) -> torch.dtype:
    """What dequantised operands are multiplied in. E4M3's four significant bits times a power of two fit in bf16, whose
    tensor cores add up in fp32; other scales need fp32, and CPUs are slow in bf16."""
    return torch.bfloat16 if exact and device.type == "cuda" else torch.float32


def on_tensor_cores(device: torch.device) -> bool:
    return why_emulated(device) is None


@functools.cache
def why_emulated(device: torch.device) -> str | None:
    """Why products do not run on the device's FP8 tensor cores; None if they do: on Ada, Hopper or newer, where small
    products of each kind came out right."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return f"no FP8 tensor cores for these products on {device}"
    try:
        _kernels().check(device)
    except Exception as failure:  # no Triton, one that cannot compile for the device, wrong results: all the same here
        cause = f"{type(failure).__name__}: {failure}"
        logger.warning("FP8 products on %s are emulated, slowly: %s", device, cause)
        return cause
    return None


def _kernels() -> ModuleType:
    """Imported where they run: Triton comes with torch's CUDA builds alone."""
    from model import fp8_kernels
    return fp8_kernels


def _through_fp8(x: Tensor) -> Tensor:
    return unpack(pack(x), x.shape[-1]).to(x.dtype)


def _through_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


class _Wire(torch.autograd.Function):
    """there(x), and back(gradient) in backward; both return what they are given in another precision."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Callable, back: Callable) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad), None, None


class _Product(torch.autograd.Function):
    """x [R, K] times weight [N, K] or [E, N, K] transposed -> [R, N]; counts [E] rows of each expert, or none.

    of_x, of_grad: whether scales of x, and of the output's gradient, are powers of two. keeps_x: rather than FP8.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: Tensor | None, of_x: bool, of_grad: bool,
                keeps_x: bool = False) -> Tensor:
        rows = _quantized(x, of_x)
        ctx.save_for_backward(*([x] if keeps_x else rows))
        ctx.weight, ctx.counts, ctx.scales, ctx.dtype = weight, counts, (of_x, of_grad), x.dtype
        return _product(rows, weight, counts, autocast_dtype(x), power_of_two=of_x, exact=of_x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (to_x, to_weight, *_), grad_x, grad_weight = wanted(ctx), None, None
        if to_x:
            grad_x = _input_gradient(grad, ctx.weight, ctx.counts, *ctx.scales, ctx.dtype)
        if to_weight:
            kept = ctx.saved_tensors
            x = act_dequant(_quantized(*kept, ctx.scales[0]) if len(kept) == 1 else Quantized(*kept))
            grad_weight = _weight_gradient(grad, x, ctx.counts, *ctx.scales, ctx.weight.dtype)
        return grad_x, grad_weight, None, None, None, None


class _SwiGLUProduct(torch.autograd.Function):
    """swiglu(hidden [R, 2K], routing [R, 1] or none) times weight transposed, as `_Product`; hidden is what is kept."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, routing: Tensor | None, counts: Tensor | None, of_x: bool,
                of_grad: bool) -> Tensor:
        ctx.save_for_backward(*_quantized(hidden, of_x), routing)
        ctx.weight, ctx.counts, ctx.scales, ctx.dtype = weight, counts, (of_x, of_grad), hidden.dtype
        return _product(_quantized(swiglu(hidden, routing), of_x), weight, counts, autocast_dtype(hidden),
                        power_of_two=of_x, exact=of_x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        data, scale, routing = ctx.saved_tensors
        hidden, (to_hidden, to_weight, *to_routing) = act_dequant(Quantized(data, scale)), wanted(ctx)
        grad_hidden = grad_weight = grad_routing = None
        if to_hidden or any(to_routing):
            grad_x = _input_gradient(grad, ctx.weight, ctx.counts, *ctx.scales, torch.float32)
            grad_hidden, grad_routing = swiglu_backward(grad_x, hidden, routing)
            grad_hidden = grad_hidden.to(ctx.dtype)
            del grad_x  # each part takes several times its operands' memory
        if to_weight:
            x = swiglu(hidden, routing)
            grad_weight = _weight_gradient(grad, x, ctx.counts, *ctx.scales, ctx.weight.dtype)
        return grad_hidden, grad_weight, grad_routing, None, None, None


def _quantized(x: Tensor, power_of_two: bool, floor: float = AMAX_FLOOR) -> Quantized:
    quant = _kernels().act_quant if on_tensor_cores(x.device) else act_quant
    return quant(x, power_of_two=power_of_two, floor=floor)


def _product(rows: Quantized, weight: Tensor, counts: Tensor | None, dtype: torch.dtype, *, power_of_two: bool,
             exact: bool, transposed: bool = True) -> Tensor:
    """rows [R, K] times weight [.., N, K] transposed, or times weight [.., K, N] -> [R, N].

    power_of_two: the weight's scales are. exact: all scales are.
    """
    if on_tensor_cores(weight.device):
        w = of_weight(_kernels().weight_quant, weight, power_of_two=power_of_two, transposed=not transposed)
        return _kernels().rows_product(rows, w, counts, dtype)
    w = weight_dequant(of_weight(weight_quant, weight, power_of_two=power_of_two))
    return _grouped(act_dequant(rows), w.mT if transposed else w, counts, exact=exact).to(dtype)


def _input_gradient(grad: Tensor, weight: Tensor, counts: Tensor | None, of_x: bool, of_grad: bool,
                    dtype: torch.dtype) -> Tensor:
    return _product(_quantized(grad, of_grad, GRAD_AMAX_FLOOR), weight, counts, dtype, power_of_two=of_x,
                    exact=of_x and of_grad, transposed=False)


def _weight_gradient(grad: Tensor, x: Tensor, counts: Tensor | None, of_x: bool, of_grad: bool,
                     dtype: torch.dtype) -> Tensor:
    """Tokens are summed over, so tiles are 128 tokens of one column; x, known from its 1x128 tiles alone, is quantised
    a second time (report section 3.5.2)."""
    if on_tensor_cores(x.device):
        return _kernels().weight_gradient(grad, x, counts, of_x, of_grad, dtype)
    place, tiles = token_tiles(len(x), counts)
    columns = quant_over_tokens(x, place, tiles, power_of_two=of_x)
    grads = quant_over_tokens(grad, place, tiles, power_of_two=of_grad, floor=GRAD_AMAX_FLOOR)
    columns, grads = (widened(q.data).mul_(q.scale).flatten(0, 1) for q in (columns, grads))
    padded = None if counts is None else tiles_of(counts) * TILE
    return _grouped(grads.mT, columns, padded, exact=of_x and of_grad).to(dtype)


def _grouped(a: Tensor, b: Tensor, counts: Tensor | None, *, exact: bool) -> Tensor:
    """a @ b; with counts, expert by expert: [R, K] x [E, K, N] -> [R, N], or [N, R] x [R, K] -> [E, N, K].

    exact: all scales of a and b are powers of two.
    """
    dtype = product_dtype(a.device, exact)
    with torch.autocast(a.device.type, enabled=False):
        if counts is None:
            return a.to(dtype) @ b.to(dtype)
        return grouped_mm(a.to(dtype), b.to(dtype), counts.cumsum(0).to(torch.int32))
