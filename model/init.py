"""Initial weights as a function of (seed, parameter name) alone, so that every layout starts from the same model.

Matrices are normal with `init_std` (V3 report, section 4.2), norms one, biases zero. An expert's matrices are
drawn under the name of the one global expert, whoever holds it.
"""

import hashlib

import torch
from torch import Tensor

from model.config import ModelConfig


def initial_rows(name: str, shape: tuple[int, ...], config: ModelConfig, *, seed: int) -> Tensor:
    """The whole initial value of a parameter, fp32 on the CPU. `name` is the model-wide one."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias") or name.endswith("expert_bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    return torch.empty(shape).normal_(0, config.init_std, generator=generator)


def initial_experts(name: str, shape: tuple[int, ...], experts: range, config: ModelConfig, *, seed: int) -> Tensor:
    """Rows of a grouped expert tensor: `name` ends in `.experts.w13`, shape [len(experts), ...]."""
    prefix, matrix = name.rsplit(".", 1)
    rows = [initial_rows(f"{prefix}.{e}.{matrix}", shape[1:], config, seed=seed) for e in experts]
    return torch.stack(rows) if rows else torch.empty(shape)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/init/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
