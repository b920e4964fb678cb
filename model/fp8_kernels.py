"""FP8 products on tensor cores (Ada, Hopper or newer), grouped by expert, as Triton kernels.

Operands are those of `model.quantize`: E4M3 with a scale for each 1x128 tile or 128x128 block along the axis that is
summed over. 128 terms are summed by the tensor cores, then scaled and added up in fp32 (V3 report section 3.3.2:
promotion every 128 elements). Tiles of rows belong to one expert each, so that no count need leave the device.

Shapes: R rows (tokens), K summed over, N outputs, E experts, T tiles of 128 rows.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from model import quantize
from model.quantize import GRAD_AMAX_FLOOR, TILE, Quantized, tiles_of, token_tiles
from model.quantize_kernels import act_quant, quant_over_tokens, weight_quant

BLOCK = 128
"""Outputs of a program."""
WARPS, STAGES = 8, 3


def rows_product(rows: Quantized, weight: Quantized, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows [R, K] in 1x128 tiles times weight [E, N, K] or [N, K] in 128x128 blocks, transposed -> [R, N]; contiguous.

    counts [E]: rows of each expert, one behind the other; None where there is one weight.
    """
    (num_rows, inputs), outputs = rows.data.shape, weight.data.shape[-2]
    out = torch.empty(num_rows, outputs, dtype=dtype, device=rows.data.device)
    if num_rows:
        source, ends = _tiles(num_rows, counts, out.device)
        tiles = torch.arange(len(source) // TILE, dtype=torch.int32, device=out.device)
        expert = torch.searchsorted(ends[1:], tiles, right=True, out_int32=True)
        grid, blocks = (len(tiles), triton.cdiv(outputs, BLOCK)), weight.scale.shape[-2:]
        _rows_kernel[grid](*rows, *weight, out, source, expert, len(ends) - 1, outputs, inputs, *blocks, BLOCK=BLOCK,
                           TILE=TILE, num_warps=WARPS, num_stages=STAGES)
    return out


def weight_gradient(grad: Tensor, x: Tensor, counts: Tensor | None, of_x: bool, of_grad: bool,
                    dtype: torch.dtype) -> Tensor:
    """grad [R, N] transposed times x [R, K], of each expert's rows -> [E, N, K], or [N, K] without counts; both in
    tiles of 128 tokens. of_x, of_grad: whether scales are powers of two."""
    source, ends = _tiles(len(x), counts, x.device)
    left = quant_over_tokens(grad, source, power_of_two=of_grad, floor=GRAD_AMAX_FLOOR)
    right = quant_over_tokens(x, source, power_of_two=of_x)
    outputs, inputs, experts = grad.shape[-1], x.shape[-1], len(ends) - 1
    out = torch.empty(experts, outputs, inputs, dtype=dtype, device=x.device)
    grid = experts, triton.cdiv(outputs, BLOCK), triton.cdiv(inputs, BLOCK)
    _tokens_kernel[grid](*left, *right, out, ends, outputs, inputs, len(source), BLOCK=BLOCK, TILE=TILE,
                         num_warps=WARPS, num_stages=STAGES)
    return out[0] if counts is None else out


def check(device: torch.device) -> None:
    """ArithmeticError unless small operands are quantised to the same bits as by torch, and small products of each kind
    are what multiplying dequantised values gives, to a thousandth of the largest: tensor cores keep some 14 bits of a
    sum of 128.

    Each kind that a step takes is compiled by itself: rows in bf16 or fp32, either kind of scale, either layout of a
    weight, one expert or several, sizes in multiples of 16 or not.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for i, (dtype, power_of_two) in enumerate(itertools.product((torch.float32, torch.bfloat16), (False, True))):
            _check((160, 256, 256), dtype, power_of_two, (100, 0, 60) if i in (1, 2) else None, device)
        _check((200, 300, 260), torch.float32, False, (150, 0, 50), device)


def _check(sizes: tuple[int, int, int], dtype: torch.dtype, power_of_two: bool, counts: tuple[int, ...] | None,
           device: torch.device) -> None:
    """sizes: rows, inputs, outputs."""
    made = torch.Generator().manual_seed(0)
    (num_rows, inputs, outputs), experts = sizes, () if counts is None else (len(counts),)
    x, grad = (torch.randn(num_rows, size, generator=made).to(device, dtype) for size in (inputs, outputs))
    weight = torch.randn(*experts, outputs, inputs, generator=made).to(device)
    held, ends = None, [0, num_rows]
    if counts is not None:
        held, ends = torch.tensor(counts, device=device), [0, *itertools.accumulate(counts)]
    how = {"power_of_two": power_of_two}
    rows, grads = act_quant(x, **how), act_quant(grad, floor=GRAD_AMAX_FLOOR, **how)
    w, turned = weight_quant(weight, **how), weight_quant(weight, transposed=True, **how)
    torchs = quantize.weight_quant(weight, **how)
    for name, ours, theirs in (("rows", rows, quantize.act_quant(x, **how)),
                               ("gradients", grads, quantize.act_quant(grad, floor=GRAD_AMAX_FLOOR, **how)),
                               ("weights", w, torchs), ("transposed weights", turned, [t.mT for t in torchs])):
        if not all(torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
                   for a, b in zip(ours, theirs, strict=True)):
            raise ArithmeticError(f"{name} are quantised to other bits than by torch")
    over = [quantize.quant_over_tokens(t, *token_tiles(num_rows, held), floor=floor, **how)
            for t, floor in ((grad, GRAD_AMAX_FLOOR), (x, quantize.AMAX_FLOOR))]
    tiles = [0, *itertools.accumulate(-(-(b - a) // TILE) * TILE for a, b in itertools.pairwise(ends))]
    wide_w = quantize.weight_dequant(w).reshape(-1, outputs, inputs)
    wide_grad, wide_x = ((q.data.float() * q.scale).flatten(0, 1) for q in over)
    for name, found, left, right, parts in (
            ("rows", rows_product(rows, w, held, dtype), quantize.act_dequant(rows), wide_w.mT, ends),
            ("gradients", rows_product(grads, turned, held, dtype), quantize.act_dequant(grads), wide_w, ends),
            ("tokens", weight_gradient(grad, x, held, power_of_two, power_of_two, torch.float32), wide_grad.mT, wide_x,
             tiles)):
        spans = [slice(a, b) for a, b in itertools.pairwise(parts)]
        wanted = (torch.stack([_exact(left[:, span], right[span]) for span in spans]).view_as(found)
                  if name == "tokens" else torch.cat([_exact(left[s], right[e]) for e, s in enumerate(spans)]))
        off = float((found.double() - wanted).abs().max())
        if not off <= (1e-3 + (found.dtype == torch.bfloat16) * 2**-7) * float(wanted.abs().max()):
            raise ArithmeticError(f"a product over {name} is off by {off:.3g}")


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """In fp64, which no setting of the program's makes a product of shorter operands."""
    return a.double() @ b.double()


def _tiles(num_rows: int, counts: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row at each place of every tile, [T * 128], -1 where it is padded; and each expert's first tile and the end of
    the last one's, [E + 1]. Tiles behind that are no expert's."""
    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    if counts is None:
        tiles = triton.cdiv(num_rows, TILE)
        source = torch.nn.functional.pad(rows, (0, tiles * TILE - num_rows), value=-1)
        return source, torch.arange(2, dtype=torch.int32, device=device) * tiles
    place, tiles = token_tiles(num_rows, counts)
    source = torch.full((tiles * TILE,), -1, dtype=torch.int32, device=device)
    source[place] = rows
    return source, torch.nn.functional.pad(tiles_of(counts).cumsum(0), (1, 0)).to(torch.int32)


@triton.jit
def _rows_kernel(rows, row_scale, weight, weight_scale, out, source, expert, experts, outputs, inputs, output_blocks,
                 input_blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    tile, e = tl.program_id(0), tl.load(expert + tl.program_id(0))
    if e < experts:
        row = tl.load(source + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_row, is_n = row >= 0, n < outputs
        scales = weight_scale + (e * output_blocks + n // TILE) * input_blocks
        total = tl.zeros((TILE, BLOCK), dtype=tl.float32)
        for block in range(0, input_blocks):
            k = block * TILE + tl.arange(0, TILE)
            is_k = k < inputs
            a = tl.load(rows + row[:, None] * inputs + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            b = tl.load(weight + (e.to(tl.int64) * outputs + n)[None, :] * inputs + k[:, None],
                        mask=is_n[None, :] & is_k[:, None], other=0.0)
            a_scale = tl.load(row_scale + row * input_blocks + block, mask=is_row, other=0.0)
            b_scale = tl.load(scales + block, mask=is_n, other=0.0)
            total += tl.dot(a, b) * (a_scale[:, None] * b_scale[None, :])
        tl.store(out + row[:, None] * outputs + n[None, :], total.to(out.dtype.element_ty),
                 mask=is_row[:, None] & is_n[None, :])


@triton.jit
def _tokens_kernel(left, left_scale, right, right_scale, out, ends, outputs, inputs, tokens, BLOCK: tl.constexpr,
                   TILE: tl.constexpr):
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_n, is_k = n < outputs, k < inputs
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for tile in range(tl.load(ends + e), tl.load(ends + e + 1)):
        token = tile * TILE + tl.arange(0, TILE)
        a = tl.load(left + n[:, None].to(tl.int64) * tokens + token[None, :], mask=is_n[:, None], other=0.0)
        b = tl.load(right + k[None, :].to(tl.int64) * tokens + token[:, None], mask=is_k[None, :], other=0.0)
        a_scale = tl.load(left_scale + tile * outputs + n, mask=is_n, other=0.0)
        b_scale = tl.load(right_scale + tile * inputs + k, mask=is_k, other=0.0)
        total += tl.dot(a, b) * (a_scale[:, None] * b_scale[None, :])
    at = (e.to(tl.int64) * outputs + n[:, None]) * inputs + k[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_n[:, None] & is_k[None, :])
