"""One weight matrix as bytes on disk and back: fp32, bf16, fp8 in 128x128 blocks, or 4 bits in groups. No files here.

int4 is torchao's asymmetric group quantisation: 64 inputs share a bf16 scale and a zero point, 4.4 bits a weight.
"""

import functools
import logging
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from model.quantize import scaled_blocks, weight_quant

FORMATS = ("fp32", "bf16", "fp8", "int4")
GROUP = 64


def packed_bytes(rows: int, columns: int, form: str) -> int:
    """Bytes of a matrix [rows, columns] in a format."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in _layout(rows, columns, form))


def unpacking_bytes(rows: int, columns: int, form: str, dtype: torch.dtype) -> int:
    """Bytes that `unpack` fills in its room: of 8 or 4 bits indices and fp32, and what is asked for where it is neither
    that nor what is packed."""
    size, has = rows * columns, torch.bfloat16 if form == "bf16" else torch.float32
    looked_up = {"fp8": 4 * size + 4 * size, "int4": 4 * (size // 2) + 4 * size}.get(form, 0)
    return looked_up + (0 if has == dtype else dtype.itemsize * size)


def pack(weight: Tensor, form: str) -> Tensor:
    """weight [N, K] -> its bytes, uint8 [packed_bytes]."""
    weight = weight.float()
    if form == "fp8":
        parts = list(weight_quant(weight))
    elif form == "int4":
        parts = _quantize(weight)
    else:
        parts = [weight.to(torch.bfloat16 if form == "bf16" else torch.float32)]
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])


class Room:
    """Tensors that are filled again and again. Fresh ones cost a page fault for each 4 KiB where freed memory goes back
    to the kernel: ten times what unpacking itself does."""

    def __init__(self) -> None:
        self.made: dict[tuple, Tensor] = {}

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if (shape, dtype) not in self.made:
            with torch.inference_mode(False):  # else it could be filled there alone
                self.made[shape, dtype] = torch.empty(shape, dtype=dtype)
        return self.made[shape, dtype]


def unpack(data: Tensor, rows: int, columns: int, form: str, dtype: torch.dtype,
           room: Callable[..., Tensor] = torch.empty) -> Tensor:
    """The matrix [rows, columns] again. fp32 asked for as fp32 is a view of `data`; all else is made in `room`, which
    gives a tensor of a shape and dtype."""
    parts, at = [], 0
    for shape, kind in _layout(rows, columns, form):
        size = math.prod(shape) * kind.itemsize
        part = data[at : at + size]
        parts.append((part.clone() if at % kind.itemsize else part).view(kind).view(shape))
        at += size
    if form == "fp8":
        values = _looked_up(_eight_bits(), parts[0].view(torch.uint8), (rows, columns), room)
        parts = [scaled_blocks(values, parts[1])]
    elif form == "int4":
        values = _looked_up(_twice_four_bits(), parts[2], (rows, columns), room)
        if values.dtype != dtype:
            values = room(rows, columns, dtype=dtype).copy_(values)
        parts = [_dequantize(*parts[:2], values)]
    return parts[0] if parts[0].dtype == dtype else room(rows, columns, dtype=dtype).copy_(parts[0])


def _layout(rows: int, columns: int, form: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part, in order."""
    if form == "fp8":
        return [((rows, columns), torch.float8_e4m3fn), ((-(-rows // 128), -(-columns // 128)), torch.float32)]
    if form == "int4":
        groups = columns // _group(columns)
        return [((rows, groups), torch.bfloat16), ((rows, groups), torch.uint8), ((rows, columns // 2), torch.uint8)]
    return [((rows, columns), torch.bfloat16 if form == "bf16" else torch.float32)]


def _group(columns: int) -> int:
    group = math.gcd(columns, GROUP)
    if group < 8:
        raise ValueError(f"int4 wants matrices of a multiple of 8 inputs, not {columns}; use weights=fp8")
    return group


def _quantize(weight: Tensor) -> list[Tensor]:
    ao, block = _torchao(), (1, _group(weight.shape[1]))
    scale, zero = ao.choose_qparams_affine(weight, ao.MappingType.ASYMMETRIC, block, torch.uint8, quant_min=0,
                                           quant_max=15, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int32)
    scale, zero = (part.view(weight.shape[0], -1) for part in (scale, zero))
    values = ao.quantize_affine(weight, block, scale.float(), zero, torch.uint8, quant_min=0, quant_max=15)
    return [scale, zero.to(torch.uint8), values[:, ::2] | (values[:, 1::2] << 4)]


def _dequantize(scale: Tensor, zero: Tensor, values: Tensor) -> Tensor:
    """As torchao's dequantize_affine has it, (value - zero) * scale, in place."""
    dtype, groups = values.dtype, values.view(*scale.shape, -1)
    groups.sub_(zero.to(dtype)[..., None]).mul_(scale.to(dtype)[..., None])
    return values


def _looked_up(table: Tensor, data: Tensor, shape: tuple[int, int], room: Callable[..., Tensor]) -> Tensor:
    """What each byte of `data` stands for, fp32 of `shape`; an entry of the table is the bits of one number or two."""
    index, found = room(*data.shape, dtype=torch.int32).copy_(data), room(*shape, dtype=torch.float32)
    torch.index_select(table, 0, index.view(-1), out=found.view(table.dtype).view(-1))
    return found


@functools.cache
def _eight_bits() -> Tensor:
    """What each byte is in E4M3, fp32 [256]."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@functools.cache
def _twice_four_bits() -> Tensor:
    """Low and high half of each byte, two fp32 in the 64 bits of an entry [256]."""
    byte = torch.arange(256)
    return torch.stack([byte & 15, byte >> 4], dim=-1).float().view(torch.float64).flatten()


def _torchao():
    """Its primitives, without the notes that importing it prints."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import quant_primitives
    except ImportError as error:
        raise ImportError("weights=int4: needs the package torchao; pip install torchao") from error
    finally:
        logging.disable(level)
    return quant_primitives
