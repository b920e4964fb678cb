"""One weight matrix as bytes on disk and back: fp32, bf16, fp8 in 128x128 blocks, or 4 bits in groups. No files here.

int4 is torchao's asymmetric group quantisation: 64 inputs share a bf16 scale and a zero point, 4.4 bits a weight.
"""

import logging
import math
import warnings

import torch
from torch import Tensor

from model.quantize import Quantized, weight_dequant, weight_quant

FORMATS = ("fp32", "bf16", "fp8", "int4")
GROUP = 64


def packed_bytes(rows: int, columns: int, form: str) -> int:
    """Bytes of a matrix [rows, columns] in a format."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in _layout(rows, columns, form))


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


def unpack(data: Tensor, rows: int, columns: int, form: str, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, columns] again. fp32 asked for as fp32 is a view of `data`."""
    parts, at = [], 0
    for shape, kind in _layout(rows, columns, form):
        size = math.prod(shape) * kind.itemsize
        part = data[at : at + size]
        parts.append((part.clone() if at % kind.itemsize else part).view(kind).view(shape))
        at += size
    if form == "fp8":
        return weight_dequant(Quantized(*parts)).to(dtype)
    if form == "int4":
        return _dequantize(*parts, dtype)
    return parts[0].to(dtype)


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


def _dequantize(scale: Tensor, zero: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """As torchao's dequantize_affine has it, (value - zero) * scale, in one pass over the packed pairs."""
    values = torch.stack([pairs & 15, pairs >> 4], dim=-1).view(*scale.shape, -1)
    return ((values.to(dtype) - zero.to(dtype)[..., None]) * scale.to(dtype)[..., None]).flatten(1)


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
