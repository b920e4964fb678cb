"""Seconds of one operator on one device, from its shape: matrix products, attention cores, memory-bound operators.

A product is limited by arithmetic (tiles that do not fill the device, short inner sizes) or by bytes, whichever is
slower; everything else by bytes and launches. Here are no layers, no communication and no schedule.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.config import HardwareConfig
from orchestrator.plan.workload import Assumptions

TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.92), (64, 128, 0.75), (64, 64, 0.55))
"""Rows, columns and relative speed of the tiles that libraries choose from (CUTLASS's and cuBLAS's usual ones)."""


@dataclass(frozen=True)
class Rates:
    """What a device reaches on large, well-shaped operators."""

    bf16: float
    """FLOP/s of products."""
    low: float
    """FLOP/s of products in the layers' dtype, which may be fp8 or fp4."""
    low_bytes: float
    """Bytes of an element of those."""
    attention: float
    """FLOP/s of the attention core's forward, causal half counted."""
    bytes_per_s: float
    multiprocessors: int
    """0: unknown, and no tile is lost."""
    inner: float
    """Inner size at which a product reaches half of its rate (prologue and epilogue)."""
    core_ramp: float
    """Sequence length at which the attention core does."""


def rates_of(hardware: HardwareConfig, dtype: str, assumptions: Assumptions, attention: str = "flash") -> Rates:
    """Shares fitted to published runs (conf/hardware) where there are any, else the assumptions."""
    share = hardware.gemm_share or assumptions.gemm
    bf16 = 1e12 * share * (hardware.bf16_best_tflops or hardware.bf16_tflops * assumptions.best_bf16)
    twice = 2 * (hardware.bf16_best_tflops or math.inf) / assumptions.best_bf16
    fp8 = 1e12 * share * (hardware.fp8_best_tflops or min(hardware.fp8_tflops or 0, twice) * assumptions.best_fp8)
    fp4 = 1e12 * share * (hardware.fp4_best_tflops or 0) or fp8 * assumptions.fp4_gain
    low, size = {"bf16": (bf16, 2.0), "fp8": (fp8, 1.0), "fp4": (fp4, 0.5)}[dtype]
    core = hardware.bf16_tflops * 1e12 * (hardware.attention_share or assumptions.attention_forward)
    if hardware.fp8_tflops:
        core *= {"flash2": assumptions.flash2, "triton": assumptions.triton}.get(attention, 1.0)
    moved = hardware.memory_gb_per_s * 1e9 * assumptions.memory
    return Rates(bf16, low, size, core, moved, hardware.multiprocessors or 0, assumptions.inner,
                 assumptions.core_ramp)


@lru_cache(maxsize=65536)
def product_s(rates: Rates, rows: float, columns: float, inner: float, *, groups: float = 1.0,
              low: bool = False, out: float = 2.0) -> float:
    """`groups` equal products in one launch: rows x inner times inner x columns. out: bytes moved for each result."""
    if rows <= 0:
        return 0.0
    peak = rates.low if low else rates.bf16
    ramp = rates.inner * (peak / rates.bf16)
    arithmetic = 2 * rows * columns * inner * groups / (peak * inner / (inner + ramp))
    arithmetic /= fill(rates.multiprocessors, rows, columns, groups)
    size = rates.low_bytes if low else 2.0
    moved = groups * (size * (rows * inner + inner * columns) + out * rows * columns)
    return max(arithmetic, moved / rates.bytes_per_s)


@lru_cache(maxsize=65536)
def fill(multiprocessors: int, rows: float, columns: float, groups: float = 1.0) -> float:
    """Share of the device that does useful work under the best tile: edges of tiles, and the last wave."""
    best = 0.0
    for high, wide, speed in TILES:
        down, across = -(-rows // high), -(-columns // wide)
        tiles = down * across * groups
        useful = rows * columns / (down * high * across * wide)
        if multiprocessors:
            useful *= tiles / (-(-tiles // multiprocessors) * multiprocessors)
        best = max(best, useful * speed)
    return best


def core_s(rates: Rates, flops: float, seq_len: int, width: int) -> float:
    """A fused attention core's forward. Short sequences and narrow heads fill its pipeline less."""
    return flops / (rates.attention * seq_len / (seq_len + rates.core_ramp) * min(1.0, (width / 128) ** 0.5))


def unfused_core_s(rates: Rates, tokens: float, seq_len: int, heads: float, width: int) -> float:
    """Scores written out (before FlashAttention): two batched products, masked softmax and dropout by bytes."""
    sequences = max(1.0, tokens / seq_len)
    rows = tokens / sequences
    products = product_s(rates, rows, seq_len, width, groups=heads * sequences)
    products += product_s(rates, rows, width, seq_len, groups=heads * sequences)
    return products + 8 * tokens * heads * seq_len / rates.bytes_per_s
