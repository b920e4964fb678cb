"""Eight-bit training as DeepSeek-V3 does it (report section 3.3), as drop-in classes for a model's linear layers.

Every linear product of a block runs on E4M3 operands, three times a step: forward, input gradient, weight gradient.
Operands are quantised online: activations and their gradients in 1x128 tiles along the axis that is summed over,
weights in 128x128 blocks, each with the scale that puts its largest magnitude at 448. What backward needs is kept in
FP8: a product's input, or the input of the SwiGLU whose output is then computed again. Embedding, head, MTP
projection, router, norms and the attention core stay as they were; so do master weights and gradients, fp32.

The products themselves multiply dequantised values: what tensor cores with exact accumulation would give, on any
machine. In fp32, or on GPUs in bf16 where that is exact, too (`product_dtype`).

Shapes: R rows (tokens), K inputs, N outputs, E experts (1 for an ordinary layer).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moe import FeedForward, GroupedExperts, LocalDispatcher, MoE, Permutation, Routing, permute, unpermute
from model.ops import grouped_mm, swiglu, swiglu_backward

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
"""Smallest amax, so that zeros have a scale; the value of DeepSeek's act_quant."""
GRAD_AMAX_FLOOR = 1e-30
"""The same for gradients: those of a mean over a step's tokens lie below 1e-4, and would be flushed."""
KEPT = ("lm_head", "gate", "proj")
"""Linear layers that stay in higher precision, by the last part of their names: head, router, MTP projection (which
DeepSeek's FP8 release keeps in bf16)."""


class Quantized(NamedTuple):
    """E4M3 values, and the fp32 factor of each tile or block that brings them back."""

    data: Tensor
    scale: Tensor


def act_quant(x: Tensor, *, power_of_two: bool = False, floor: float = AMAX_FLOOR) -> Quantized:
    """1x128 tiles along the last axis: x [.., K] -> data [.., K], scale [.., ceil(K / 128)].

    DeepSeek's act_quant (inference/kernel.py; `power_of_two` is its scale_fmt "ue8m0"), where the last tile may be
    short. A non-finite value makes its tile NaN.
    """
    tiles = _padded(x.float(), -1).unflatten(-1, (-(-x.shape[-1] // TILE), TILE))
    scale = _scale_of(tiles.abs().amax(-1), power_of_two, floor)
    data = (tiles / scale[..., None]).to(E4M3).flatten(-2)
    return Quantized(data[..., : x.shape[-1]].contiguous(), scale)


def weight_quant(weight: Tensor, *, power_of_two: bool = False) -> Quantized:
    """128x128 blocks: weight [.., N, K] -> data [.., N, K], scale [.., ceil(N / 128), ceil(K / 128)].

    The layout of DeepSeek's FP8 checkpoints (README_WEIGHTS.md): blocks at the edges are padded with zeros.
    """
    rows, columns = weight.shape[-2:]
    padded = _padded(_padded(weight.float(), -1), -2)
    blocks = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    scale = _scale_of(blocks.abs().amax((-1, -3)), power_of_two, AMAX_FLOOR)
    data = (blocks / scale[..., :, None, :, None]).to(E4M3).flatten(-2).flatten(-3, -2)
    return Quantized(data[..., :rows, :columns].contiguous(), scale)


def act_dequant(q: Quantized) -> Tensor:
    """data * scale in fp32, tile by tile."""
    return _widened(q.data).mul_(_spread(q.scale, q.data.shape[-1]))


def weight_dequant(q: Quantized) -> Tensor:
    """data * scale in fp32, block by block (DeepSeek's weight_dequant)."""
    rows, columns = q.data.shape[-2:]
    if rows % TILE or columns % TILE:
        return _widened(q.data).mul_(_spread(_spread(q.scale, columns).mT, rows).mT)
    blocks = _widened(q.data).unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))
    return blocks.mul_(q.scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)


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
        if isinstance(module, MoE) and type(module.dispatcher) is LocalDispatcher:
            module.dispatcher = Fp8LocalDispatcher(module.dispatcher.n_routed_experts)


class Fp8Linear(nn.Linear):
    power_of_two = False

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x.flatten(0, -2), self.weight, None, self.power_of_two, self.power_of_two)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Fp8FeedForward(FeedForward):
    power_of_two = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.w13(x)
        out = _SwiGLUProduct.apply(hidden.flatten(0, -2), self.w2.weight, None, self.power_of_two, self.power_of_two)
        return out.unflatten(0, x.shape[:-1])


class Fp8GroupedExperts(GroupedExperts):
    """Rows that come from a dispatch, and gradients that come from one, have scales that are powers of two: then
    what was quantised before the exchange is quantised again after it without a further error."""

    power_of_two = False

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        hidden = _Product.apply(x, self.w13, counts, True, self.power_of_two)
        return _SwiGLUProduct.apply(hidden, self.w2, counts, self.power_of_two, True)


class Fp8LocalDispatcher(LocalDispatcher):
    """What `AllToAllDispatcher` does to the values that it sends, without sending: FP8 on the way to the experts,
    bf16 on the way back, in backward as in forward (report section 3.3.3)."""

    def dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Permutation]:
        rows, counts, handle = permute(tokens, routing, self.n_routed_experts)
        return wire(rows, _through_fp8, _through_bf16), counts, handle

    def combine(self, out: Tensor, handle: Permutation) -> Tensor:
        return unpermute(wire(out, _through_bf16, _through_fp8), handle)


KIN = {nn.Linear: Fp8Linear, FeedForward: Fp8FeedForward, GroupedExperts: Fp8GroupedExperts}


def product_dtype(device: torch.device, exact: bool) -> torch.dtype:
    """What dequantised operands are multiplied in. E4M3's four significant bits times a power of two fit in bf16, whose
    tensor cores add up in fp32; other scales need fp32, and CPUs are slow in bf16."""
    return torch.bfloat16 if exact and device.type == "cuda" else torch.float32


def wire(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """there(x), and back(gradient) in backward; both return what they are given in another place or precision."""
    return _Wire.apply(x, there, back)


def pack(x: Tensor) -> Tensor:
    """Rows [R, D] in FP8 with their scales behind them, ready to be sent: bytes [R, D + 4 ceil(D / 128)]."""
    q = act_quant(x, power_of_two=True, floor=GRAD_AMAX_FLOOR)
    return torch.cat([q.data.view(torch.uint8), q.scale.view(torch.uint8)], dim=-1)


def unpack(packed: Tensor, dim: int) -> Tensor:
    """Rows [R, dim] in fp32 from the bytes of `pack`."""
    scale = packed[:, dim:].contiguous().view(torch.float32)
    return act_dequant(Quantized(packed[:, :dim].contiguous().view(E4M3), scale))


def _through_fp8(x: Tensor) -> Tensor:
    return unpack(pack(x), x.shape[-1]).to(x.dtype)


def _through_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


class _Wire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, there: Callable, back: Callable) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad), None, None


class _Product(torch.autograd.Function):
    """x [R, K] times weight [N, K] or [E, N, K] transposed -> [R, N]; counts [E] rows of each expert, or none.

    The last two arguments: whether scales of x, and of the output's gradient, are powers of two.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: Tensor | None, of_x: bool, of_grad: bool) -> Tensor:
        rows = act_quant(x, power_of_two=of_x)
        ctx.save_for_backward(*rows, weight, counts)
        ctx.scales, ctx.dtype = (of_x, of_grad), x.dtype
        return _forward(rows, weight, counts, of_x).to(_out_dtype(x))

    @staticmethod
    def backward(ctx, grad: Tensor):
        data, scale, weight, counts = ctx.saved_tensors
        x = act_dequant(Quantized(data, scale))
        grad_x, grad_weight = _backward(grad, x, weight, counts, *ctx.scales, ctx.needs_input_grad)
        return None if grad_x is None else grad_x.to(ctx.dtype), grad_weight, None, None, None


class _SwiGLUProduct(torch.autograd.Function):
    """swiglu(hidden [R, 2K]) times weight transposed, as `_Product`; hidden is what is kept."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, counts: Tensor | None, of_x: bool, of_grad: bool) -> Tensor:
        ctx.save_for_backward(*act_quant(hidden, power_of_two=of_x), weight, counts)
        ctx.scales, ctx.dtype = (of_x, of_grad), hidden.dtype
        return _forward(act_quant(swiglu(hidden), power_of_two=of_x), weight, counts, of_x).to(_out_dtype(hidden))

    @staticmethod
    def backward(ctx, grad: Tensor):
        data, scale, weight, counts = ctx.saved_tensors
        hidden = act_dequant(Quantized(data, scale))
        grad_x, grad_weight = _backward(grad, swiglu(hidden), weight, counts, *ctx.scales, ctx.needs_input_grad)
        grad_hidden = None if grad_x is None else swiglu_backward(grad_x, hidden).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None


def _forward(rows: Quantized, weight: Tensor, counts: Tensor | None, power_of_two: bool) -> Tensor:
    w = weight_dequant(weight_quant(weight, power_of_two=power_of_two))
    return _grouped(act_dequant(rows), w.mT, counts, exact=power_of_two)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor | None, of_x: bool, of_grad: bool,
              needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of weight. For the latter tokens are summed over, so tiles are 128 tokens of one column;
    x, known from its 1x128 tiles alone, is quantised a second time (report section 3.5.2)."""
    grad_x = grad_weight = None
    if needs[0]:
        rows = act_dequant(act_quant(grad, power_of_two=of_grad, floor=GRAD_AMAX_FLOOR))
        w = weight_dequant(weight_quant(weight, power_of_two=of_x))
        grad_x = _grouped(rows, w, counts, exact=of_x and of_grad)
    if needs[1]:
        place, tiles = _token_tiles(len(x), counts)
        columns = _over_tokens(x, place, tiles, power_of_two=of_x)
        grads = _over_tokens(grad, place, tiles, power_of_two=of_grad, floor=GRAD_AMAX_FLOOR)
        padded = None if counts is None else (counts + TILE - 1) // TILE * TILE
        grad_weight = _grouped(grads.mT, columns, padded, exact=of_x and of_grad).to(weight.dtype)
    return grad_x, grad_weight


def _grouped(a: Tensor, b: Tensor, counts: Tensor | None, *, exact: bool) -> Tensor:
    """a @ b; with counts, expert by expert: [R, K] x [E, K, N] -> [R, N], or [N, R] x [R, K] -> [E, N, K].

    exact: all scales of a and b are powers of two.
    """
    dtype = product_dtype(a.device, exact)
    with torch.autocast(a.device.type, enabled=False):
        if counts is None:
            return a.to(dtype) @ b.to(dtype)
        return grouped_mm(a.to(dtype), b.to(dtype), counts.cumsum(0).to(torch.int32))


def _token_tiles(num_rows: int, counts: Tensor | None) -> tuple[Tensor | None, int]:
    """Where each row goes when every expert's rows start a tile of their own, and how many tiles suffice."""
    if counts is None:
        return None, -(-num_rows // TILE)
    starts = (counts + TILE - 1) // TILE * TILE
    shift = starts.cumsum(0) - starts - (counts.cumsum(0) - counts)
    rows = torch.arange(num_rows, device=counts.device)
    # No more tiles than this, whatever the counts: a bound that need not be fetched from the device.
    return rows + shift.repeat_interleave(counts, output_size=num_rows), num_rows // TILE + len(counts)


def _over_tokens(x: Tensor, place: Tensor | None, tiles: int, **how) -> Tensor:
    """x [R, K] quantised and dequantised in tiles of 128 rows, each column by itself -> [tiles * 128, K], fp32."""
    padded = torch.zeros(tiles * TILE, x.shape[-1], dtype=torch.float32, device=x.device)
    padded[slice(len(x)) if place is None else place] = x.float()
    scale = _scale_of(padded.unflatten(0, (tiles, TILE)).abs().amax(1), **({"floor": AMAX_FLOOR} | how))
    blocks = padded.unflatten(0, (tiles, TILE))
    return _widened((blocks / scale[:, None]).to(E4M3)).mul_(scale[:, None]).flatten(0, 1)


def _widened(data: Tensor) -> Tensor:
    """data.float(), on a CPU in a fraction of its time: E4M3's bits, shifted, are those of a half 2^8 times smaller."""
    if data.device.type != "cpu":
        return data.float()
    bits = data.view(torch.int8).to(torch.int16)
    size = bits & 127
    no_number = (size + 1 >> 7) * 0x7C00  # all ones in E4M3; a half has its exponent for that
    return (bits & -0x8000 | size << 7 | no_number).view(torch.float16).float().mul_(2.0**8)


def _scale_of(amax: Tensor, power_of_two: bool, floor: float) -> Tensor:
    scale = amax.clamp(min=floor) / E4M3_MAX
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def _padded(x: Tensor, axis: int) -> Tensor:
    """Zeros appended to one of the last two axes, up to a multiple of 128."""
    missing = -x.shape[axis] % TILE
    return F.pad(x, (0, missing) if axis == -1 else (0, 0, 0, missing)) if missing else x


def _spread(scale: Tensor, size: int) -> Tensor:
    """Every scale of the last axis 128 times, cut to `size`."""
    return scale[..., None].expand(*scale.shape, TILE).flatten(-2)[..., :size]


def _out_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
