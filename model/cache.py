"""Keys and values of past tokens, by slot: what decoding keeps instead of computing it again.

A slot is one sequence. Slots have their own lengths, so sequences join and leave a batch at any step. MLA keeps per
token one latent and one rotated key for all heads (V2 report, section 2.1.2), GQA the keys and values of its
key-value heads. No model here: model/decode.py runs one over it.

Shapes: N slots, B rows of a step, T new tokens of a row at most, L longest row after the step.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import Attention, ModelConfig


@dataclass(frozen=True)
class LayerCache:
    """One layer's tables during one step. `mask` [B, T, L] says which tokens each new one sees; `is_first`: the rows
    held nothing before."""

    tables: list[Tensor]
    rows: Tensor | slice
    columns: Tensor
    length: int
    mask: Tensor
    is_first: bool

    def write(self, *new: Tensor) -> None:
        """Each of the step's tensors [B, T, *] into its table."""
        rows = self.rows
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.columns.device)
        for table, values in zip(self.tables, new, strict=True):
            table[rows[:, None], self.columns] = values.to(table.dtype)

    def append(self, *new: Tensor) -> list[Tensor]:
        """Write them; returns all that the rows hold now, [B, L, *]."""
        self.write(*new)
        return [table[self.rows, : self.length] for table in self.tables]


class Cache:
    """`n_layers` layers' tables for `slots` sequences of at most `capacity` tokens; `lengths[slot]` tokens are held.

    Raises ValueError where a sequence would outgrow its slot.
    """

    def __init__(self, config: ModelConfig, *, n_layers: int, slots: int, capacity: int,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.capacity, self.lengths, self._written = capacity, [0] * slots, [0] * slots
        # One column more: where the padding of rows with fewer new tokens is written and never read.
        self.layers = [[torch.zeros(slots, capacity + 1, *shape, device=device, dtype=dtype)
                        for shape in entry_shapes(config)] for _ in range(n_layers)]

    def step(self, slots: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, list[LayerCache]]:
        """Make room for counts[i] new tokens of slots[i]; returns their positions [B, T] and each layer's view."""
        device = self.layers[0][0].device
        starts = [self.lengths[slot] for slot in slots]
        for slot, count in zip(slots, counts, strict=True):
            if self.lengths[slot] + count > self.capacity:
                raise ValueError(f"slot {slot}: {self.lengths[slot]} + {count} tokens, must be at most "
                                 f"{self.capacity}; make a cache of more capacity")
            self.lengths[slot] += count
            self._written[slot] = max(self._written[slot], self.lengths[slot])
        offsets = torch.arange(max(counts), device=device)
        positions = torch.tensor(starts, device=device)[:, None] + offsets
        valid = offsets < torch.tensor(counts, device=device)[:, None]
        length = max(self.lengths[slot] for slot in slots)
        mask = torch.arange(length, device=device) <= positions[..., None]
        columns = positions.masked_fill(~valid, self.capacity)
        # Neighbours in order are a view; any others are gathered.
        side_by_side = slice(slots[0], slots[0] + len(slots))
        in_a_row = list(slots) == list(range(side_by_side.start, side_by_side.stop))
        rows = side_by_side if in_a_row else torch.tensor(slots, device=device)
        views = [LayerCache(tables, rows, columns, length, mask, not any(starts)) for tables in self.layers]
        return positions.clamp(max=self.capacity - 1), views

    def cut(self, slot: int, length: int) -> None:
        """Forget what a slot holds beyond `length` tokens."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def clear(self, slot: int, length: int = 0) -> None:
        """The same for another sequence to go on from there: what is forgotten becomes zero, since a value that is no
        number is none under a mask either."""
        for table in itertools.chain(*self.layers):
            table[slot, length : self._written[slot]] = 0
        self.cut(slot, length)
        self._written[slot] = self.lengths[slot]

    def copy(self, source: int, target: int, length: int) -> None:
        """Another slot gets the first `length` tokens of one, and nothing else."""
        self.clear(target, length)
        for table in itertools.chain(*self.layers):
            table[target, :length] = table[source, :length]
        self.lengths[target] = self._written[target] = length


def entry_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of what one layer keeps of one token."""
    if config.attention is Attention.mla:
        return [(config.kv_lora_rank + config.qk_rope_head_dim,)]
    return [(config.n_kv_heads, config.head_dim)] * 2
