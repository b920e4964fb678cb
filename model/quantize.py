"""E4M3 numbers with fine-grained scales, as DeepSeek-V3 has them (report section 3.3.2): in 1x128 tiles, in 128x128
blocks, in tiles of 128 tokens; and back.

Shapes: R rows (tokens), K inputs, N outputs, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
"""Smallest amax, so that zeros have a scale; the value of DeepSeek's act_quant."""
GRAD_AMAX_FLOOR = 1e-30
"""The same for gradients: those of a mean over a step's tokens lie below 1e-4, and would be flushed."""


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
    return widened(q.data).mul_(_spread(q.scale, q.data.shape[-1]))


def weight_dequant(q: Quantized) -> Tensor:
    """data * scale in fp32, block by block (DeepSeek's weight_dequant)."""
    return scaled_blocks(widened(q.data), q.scale)


def scaled_blocks(values: Tensor, scale: Tensor) -> Tensor:
    """values [.., N, K], each 128x128 block times its scale, in place."""
    rows, columns = values.shape[-2:]
    if rows % TILE or columns % TILE:
        return values.mul_(_spread(_spread(scale, columns).mT, rows).mT)
    values.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE)).mul_(scale[..., :, None, :, None])
    return values


def pack(x: Tensor) -> Tensor:
    """Rows [R, D] in FP8 with their scales behind them, ready to be sent: bytes [R, D + 4 ceil(D / 128)]."""
    q = act_quant(x, power_of_two=True, floor=GRAD_AMAX_FLOOR)
    return torch.cat([q.data.view(torch.uint8), q.scale.view(torch.uint8)], dim=-1)


def unpack(packed: Tensor, dim: int) -> Tensor:
    """Rows [R, dim] in fp32 from the bytes of `pack`."""
    scale = packed[:, dim:].contiguous().view(torch.float32)
    return act_dequant(Quantized(packed[:, :dim].contiguous().view(E4M3), scale))


def tiles_of(counts: Tensor) -> Tensor:
    """Tiles that so many rows of each expert take."""
    return (counts + TILE - 1) // TILE


def token_tiles(num_rows: int, counts: Tensor | None) -> tuple[Tensor | None, int]:
    """Where each row goes when every expert's rows start a tile of their own, and how many tiles suffice."""
    if counts is None:
        return None, -(-num_rows // TILE)
    padded = tiles_of(counts) * TILE
    shift = padded.cumsum(0) - padded - (counts.cumsum(0) - counts)
    rows = torch.arange(num_rows, device=counts.device)
    # No more tiles than this, whatever the counts: a bound that need not be fetched from the device.
    return rows + shift.repeat_interleave(counts, output_size=num_rows), num_rows // TILE + len(counts)


def quant_over_tokens(x: Tensor, place: Tensor | None, tiles: int, *, power_of_two: bool = False,
                      floor: float = AMAX_FLOOR) -> Quantized:
    """x [R, K] in tiles of 128 rows, each column by itself -> data [tiles, 128, K], scale [tiles, 1, K]."""
    padded = torch.zeros(tiles * TILE, x.shape[-1], dtype=torch.float32, device=x.device)
    padded[slice(len(x)) if place is None else place] = x.float()
    blocks = padded.unflatten(0, (tiles, TILE))
    scale = _scale_of(blocks.abs().amax(1, keepdim=True), power_of_two, floor)
    return Quantized(blocks.div_(scale).to(E4M3), scale)


def widened(data: Tensor) -> Tensor:
    """data.float(), on a CPU in a fraction of its time: E4M3's bits, shifted, are those of a half 2^8 times smaller."""
    if data.device.type != "cpu":
        return data.float()
    bits = data.view(torch.int8).to(torch.int16)
    sign, size = bits & -0x8000, bits.bitwise_and_(127)
    half = (size << 7).bitwise_or_(sign)
    half |= size.add_(1).bitwise_right_shift_(7).mul_(0x7C00)  # all ones in E4M3; a half has its exponent for that
    del bits, sign, size
    return half.view(torch.float16).float().mul_(2.0**8)


def _scale_of(amax: Tensor, power_of_two: bool, floor: float) -> Tensor:
    # By a tensor on the device: CUDA takes division by a number for multiplication by its reciprocal, whose last bit is
    # another in half of all cases (pytorch#191495).
    scale = (amax.clamp(min=floor) / amax.new_full((), E4M3_MAX)).masked_fill_(~amax.isfinite(), torch.nan)
    if not power_of_two:
        return scale
    bits = scale.view(torch.int32)  # the next one up: a mantissa that is not zero counts as one more in the exponent
    power = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23
    return power.view(torch.float32).where(scale.isfinite(), scale)


def _padded(x: Tensor, axis: int) -> Tensor:
    """Zeros appended to one of the last two axes, up to a multiple of 128."""
    missing = -x.shape[axis] % TILE
    return F.pad(x, (0, missing) if axis == -1 else (0, 0, 0, missing)) if missing else x


def _spread(scale: Tensor, size: int) -> Tensor:
    """Every scale of the last axis 128 times, cut to `size`."""
    return scale[..., None].expand(*scale.shape, TILE).flatten(-2)[..., :size]
