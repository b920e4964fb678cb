"""What the machine under the ranks can do, measured at the start where no data sheet says it."""

import os
import time
from collections.abc import Callable

import torch

from model.fp8 import why_emulated
from orchestrator.config import Config
from orchestrator.parallel.mesh import Mesh
from orchestrator.plan.forecast import Machine

PEAK_S = 0.5
"""For how long a device's peak is measured, where it is not known: every start waits for that."""
ROUNDS, OPERATORS = 8, 50
"""Of small operators, which are measured in a twentieth of a second."""
SMALL, SHARED = 1 << 6, 1 << 16
"""Elements of a tensor that costs nothing but the call, and of one that torch shares out among threads."""


def machine_of(mesh: Mesh, peak_flops_per_s: float, *, fp8: bool) -> Machine:
    """One rank asks; the others soon wait for it. fp8: products are to be in FP8."""
    cores = os.cpu_count() or 1
    operator_s, barrier_s = _operators(cores) if mesh.device.type == "cpu" else (None, None)
    return Machine(mesh.device.type, peak_flops_per_s, mesh.info.local_world_size, cores, operator_s, barrier_s,
                   emulates_fp8=fp8 and mesh.device.type == "cuda" and why_emulated(mesh.device) is not None)


def peak_flops_per_s(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """The device's dense peak in the compute dtype: from conf/hardware, else a GEMM measured now (fp32 on a CPU).

    Ranks that share a CPU measure at the same time, so that each sees its share of it.
    """
    known = config.hardware.bf16_tflops if dtype == torch.bfloat16 else config.hardware.fp32_tflops
    if known:
        return known * 1e12
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    (a @ b).flatten()[0].item()
    rounds, began = 0, time.perf_counter()
    while time.perf_counter() - began < PEAK_S:
        (a @ b).flatten()[0].item()
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - began)


def _operators(cores: int) -> tuple[float, float]:
    """Seconds that an operator of autograd takes on a CPU whatever it computes, and for two threads to share it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        small, alone = _operator_s(SMALL), _operator_s(SHARED)
        torch.set_num_threads(2)
        together = _operator_s(SHARED)
    finally:
        torch.set_num_threads(before)
    return small, max(0.0, together - small - (alone - small) / 2) if cores > 1 else 0.0


def _operator_s(elements: int) -> float:
    """The quickest round of a chain, forward and backward: others may be at work."""
    first = torch.ones(elements, requires_grad=True)

    def chain() -> None:
        x = first
        for _ in range(OPERATORS):
            x = x * 0.5
        x.sum().backward()

    return min(_seconds(chain) for _ in range(ROUNDS)) / (2 * OPERATORS)


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
