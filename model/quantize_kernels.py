"""`model.quantize` on a GPU in one pass over memory, as Triton kernels: the same bits.

Torch takes seven passes for a tile's scale and values, which together cost more than the FP8 product that reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.quantize import AMAX_FLOOR, E4M3, TILE, Quantized

ROWS, COLUMNS = 32, 64
"""Of a program of `act_quant`, and of `quant_over_tokens`."""


def act_quant(x: Tensor, *, power_of_two: bool = False, floor: float = AMAX_FLOOR) -> Quantized:
    """`quantize.act_quant` of rows [R, K]."""
    (rows, size), tiles = x.shape, triton.cdiv(x.shape[-1], TILE)
    data = torch.empty(rows, size, dtype=E4M3, device=x.device)
    scale = torch.empty(rows, tiles, dtype=torch.float32, device=x.device)
    if rows:
        _act_kernel[triton.cdiv(rows, ROWS), tiles](x.contiguous(), data, scale, rows, size, tiles, floor, power_of_two,
                                                    ROWS, TILE)
    return Quantized(data, scale)


def weight_quant(weight: Tensor, *, power_of_two: bool = False, transposed: bool = False) -> Quantized:
    """`quantize.weight_quant` of [N, K] or [E, N, K]. transposed: laid out as [.., K, N], its scales likewise."""
    weight = weight.contiguous()
    *lead, rows, columns = weight.shape
    down, across = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    shapes = ((columns, rows), (across, down)) if transposed else ((rows, columns), (down, across))
    data = torch.empty(*lead, *shapes[0], dtype=E4M3, device=weight.device)
    scale = torch.empty(*lead, *shapes[1], dtype=torch.float32, device=weight.device)
    _weight_kernel[lead[0] if lead else 1, down, across](weight, data, scale, rows, columns, AMAX_FLOOR, power_of_two,
                                                         transposed, TILE)
    return Quantized(data, scale)


def quant_over_tokens(x: Tensor, source: Tensor, *, power_of_two: bool = False,
                      floor: float = AMAX_FLOOR) -> Quantized:
    """`quantize.quant_over_tokens` of x [R, K], transposed: data [K, T * 128], scale [T, K]. source [T * 128]: the row
    at each place, -1 of none."""
    tiles, size = len(source) // TILE, x.shape[-1]
    data = torch.empty(size, tiles * TILE, dtype=E4M3, device=x.device)
    scale = torch.empty(tiles, size, dtype=torch.float32, device=x.device)
    if tiles:
        _token_kernel[tiles, triton.cdiv(size, COLUMNS)](x.contiguous(), source, data, scale, size, tiles * TILE, floor,
                                                         power_of_two, COLUMNS, TILE)
    return Quantized(data, scale)


@triton.jit
def _scale_of(values, axis: tl.constexpr, floor, POWER_OF_TWO: tl.constexpr):
    finite = tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis)
    amax = tl.maximum(tl.max(tl.abs(values), axis), floor)
    scale = tl.math.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    if POWER_OF_TWO:  # the next one up: a mantissa that is not zero counts as one more in the exponent
        bits = scale.to(tl.int32, bitcast=True)
        scale = (((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    return tl.where(finite > 0, scale, float("nan"))


@triton.jit
def _rounded(values, factor):
    """values / factor, in fp32, to the nearest of E4M3's numbers, ties to even, so that a cast has nothing to round:
    Triton's interpreter loses the carry there."""
    quotient = tl.math.div_rn(values, factor)
    bits = quotient.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)  # three bits of mantissa
    small = (tl.abs(quotient) + 24576.0) - 24576.0  # below the normal ones: 2^-9, an fp32's last bit at 1.5 x 2^14
    small = (small.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)  # a zero has a sign
    rounded = tl.where(tl.abs(quotient) < 0.015625, small, near)
    return tl.where(quotient != quotient, quotient, rounded).to(tl.float8e4nv)


@triton.jit
def _act_kernel(x, data, scale, rows, size, tiles, floor, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
                TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = (row < rows)[:, None] & (k < size)[None, :]
    values = tl.load(x + row[:, None] * size + k[None, :], mask=there, other=0.0).to(tl.float32)
    factor = _scale_of(values, 1, floor, POWER_OF_TWO)
    near = _rounded(values, tl.broadcast_to(factor[:, None], (ROWS, TILE)))
    tl.store(data + row[:, None] * size + k[None, :], near, mask=there)
    tl.store(scale + row * tiles + tl.program_id(1), factor, mask=row < rows)


@triton.jit
def _weight_kernel(weight, data, scale, rows, columns, floor, POWER_OF_TWO: tl.constexpr, TRANSPOSED: tl.constexpr,
                   TILE: tl.constexpr):
    down, across = tl.program_id(1), tl.program_id(2)
    n, k = down * TILE + tl.arange(0, TILE), across * TILE + tl.arange(0, TILE)
    there = (n < rows)[:, None] & (k < columns)[None, :]
    first = tl.program_id(0).to(tl.int64) * rows * columns
    values = tl.load(weight + first + n[:, None].to(tl.int64) * columns + k[None, :], mask=there, other=0.0)
    values = values.to(tl.float32)
    factor = _scale_of(tl.reshape(values, (1, TILE * TILE)), 1, floor, POWER_OF_TWO)
    near = _rounded(values, tl.broadcast_to(factor[:, None], (TILE, TILE)))
    if TRANSPOSED:
        tl.store(data + first + k[None, :].to(tl.int64) * rows + n[:, None], near, mask=there)
        at = (tl.program_id(0) * tl.num_programs(2) + across) * tl.num_programs(1) + down
    else:
        tl.store(data + first + n[:, None].to(tl.int64) * columns + k[None, :], near, mask=there)
        at = (tl.program_id(0) * tl.num_programs(1) + down) * tl.num_programs(2) + across
    tl.store(scale + at + tl.arange(0, 1), factor)


@triton.jit
def _token_kernel(x, source, data, scale, size, tokens, floor, POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr,
                  TILE: tl.constexpr):
    tile = tl.program_id(0)
    place = tile * TILE + tl.arange(0, TILE)
    row = tl.load(source + place).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row >= 0)[:, None] & (k < size)[None, :]
    values = tl.load(x + row[:, None] * size + k[None, :], mask=there, other=0.0).to(tl.float32)
    factor = _scale_of(values, 0, floor, POWER_OF_TWO)
    near = _rounded(values, tl.broadcast_to(factor[None, :], (TILE, COLUMNS)))
    tl.store(data + k[None, :].to(tl.int64) * tokens + place[:, None], near, mask=(k < size)[None, :])
    tl.store(scale + tile * size + k, factor, mask=k < size)
