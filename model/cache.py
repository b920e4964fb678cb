"""Keys and values of past tokens, by slot: what decoding keeps instead of computing it again.

A slot is one sequence. Slots have their own lengths, so sequences join and leave a batch at any step. MLA keeps per
token one latent and one rotated key for all heads (V2 report, section 2.1.2), GQA the keys and values of its
key-value heads. No model here: model/generate.py runs one over it.

Shapes: N slots, B rows of a step, T new tokens of a row at most, L longest row after the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import Attention, ModelConfig


@dataclass(frozen=True)
class LayerCache:
    """One layer's tables during one step. `mask` [B, T, L] says which tokens each new one sees."""

    tables: list[Tensor]
    rows: Tensor | slice
    columns: Tensor
    length: int
    mask: Tensor

    def append(self, *new: Tensor) -> list[Tensor]:
        """Write each of the step's tensors [B, T, *] into its table; returns all that the rows hold now, [B, L, *]."""
        rows = self.rows if isinstance(self.rows, Tensor) else torch.arange(self.rows.stop, device=self.columns.device)
        for table, values in zip(self.tables, new, strict=True):
            table[rows[:, None], self.columns] = values.to(table.dtype)
        return [table[self.rows, : self.length] for table in self.tables]


class Cache:
    """`n_layers` layers' tables for `slots` sequences of at most `capacity` tokens; `lengths[slot]` tokens are held.

    Raises ValueError where a sequence would outgrow its slot.
    """

    def __init__(self, config: ModelConfig, *, n_layers: int, slots: int, capacity: int,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.capacity, self.lengths = capacity, [0] * slots
        # One column more: where the padding of rows with fewer new tokens is written and never read.
        self.layers = [[torch.zeros(slots, capacity + 1, *shape, device=device, dtype=dtype)
                        for shape in entry_shapes(config)] for _ in range(n_layers)]

    def step(self, slots: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, list[LayerCache]]:
        """Make room for counts[i] new tokens of slots[i]; returns their positions [B, T] and each layer's view."""
        device = self.layers[0][0].device
        starts = torch.tensor([self.lengths[slot] for slot in slots], device=device)
        for slot, count in zip(slots, counts, strict=True):
            if self.lengths[slot] + count > self.capacity:
                raise ValueError(f"slot {slot}: {self.lengths[slot]} + {count} tokens, must be at most "
                                 f"{self.capacity}; make a cache of more capacity")
            self.lengths[slot] += count
        offsets = torch.arange(max(counts), device=device)
        positions = starts[:, None] + offsets
        valid = offsets < torch.tensor(counts, device=device)[:, None]
        length = max(self.lengths[slot] for slot in slots)
        mask = torch.arange(length, device=device) <= positions[..., None]
        columns = positions.masked_fill(~valid, self.capacity)
        # The first B slots in order are a view; any others are gathered.
        plain = list(slots) == list(range(len(slots)))
        rows = slice(0, len(slots)) if plain else torch.tensor(slots, device=device)
        views = [LayerCache(tables, rows, columns, length, mask) for tables in self.layers]
        return positions.clamp(max=self.capacity - 1), views

    def cut(self, slot: int, length: int) -> None:
        """Forget what a slot holds beyond `length` tokens; 0 frees it for another sequence."""
        self.lengths[slot] = min(self.lengths[slot], length)


def entry_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of what one layer keeps of one token."""
    if config.attention is Attention.mla:
        return [(config.kv_lora_rank + config.qk_rope_head_dim,)]
    return [(config.n_kv_heads, config.head_dim)] * 2
