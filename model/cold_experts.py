"""Routed experts that stay on disk, memory-mapped, the hottest of them in memory: for models larger than the machine.

A store is a directory with one safetensors file per stacked expert matrix; in it one entry per expert holds that
expert's bytes (model/packed.py). `ColdExperts` takes the place of `GroupedExperts`; inference only.
"""

import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.hf_files import safetensors_header
from model.moe import Router
from model.ops import swiglu
from model.packed import Room, pack, packed_bytes, unpack


def write_store(path: Path, experts: Iterable[Tensor], *, number: int, shape: tuple[int, int], form: str) -> None:
    """One matrix of `number` experts, [N, K] each, written one after the other: no two are in memory at once."""
    size = packed_bytes(*shape, form)
    with open(path, "wb") as file:
        file.write(safetensors_header(((str(i), "U8", [size], size) for i in range(number)),
                                      {"format": form, "rows": str(shape[0]), "columns": str(shape[1])}))
        for expert in experts:
            file.write(pack(expert, form).numpy())
        file.flush()
        os.fsync(file.fileno())


class Store:
    """One file of `write_store`, mapped. Pages that were read are given back, so only what is kept takes memory."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # a copy would have to fit into memory
        length = int.from_bytes(self.map[:8], "little")
        fields = json.loads(self.map[8 : 8 + length])
        meta = fields.pop("__metadata__")
        self.form, self.shape = meta["format"], (int(meta["rows"]), int(meta["columns"]))
        self.spans = {int(key): [8 + length + at for at in field["data_offsets"]] for key, field in fields.items()}
        self.expert_bytes = packed_bytes(*self.shape, self.form)
        if len(self.map) != 8 + length + len(self.spans) * self.expert_bytes:
            raise ValueError(f"{path}: is not whole; delete {path.parent} and it is made again")

    def read(self, expert: int) -> Tensor:
        """A copy of the expert's bytes."""
        start, stop = self.spans[expert]
        data = torch.from_numpy(np.frombuffer(self.map, np.uint8, stop - start, start).copy())
        self._advise(mmap.MADV_DONTNEED, expert)
        return data

    def expect(self, expert: int) -> None:
        """Let the kernel read it ahead."""
        self._advise(mmap.MADV_WILLNEED, expert)

    def _advise(self, advice: int, expert: int) -> None:
        start, stop = self.spans[expert]
        first = start - start % mmap.PAGESIZE
        self.map.madvise(advice, first, stop - first)


class HotExperts:
    """The least recently used make room for the next, over all layers, within `max_bytes` of packed weights."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.kept: OrderedDict[tuple[int, int], list[Tensor]] = OrderedDict()
        self.hits = self.misses = 0
        self.room = Room()

    def get(self, layer: int, expert: int, stores: list[Store]) -> list[Tensor]:
        key = (layer, expert)
        if key in self.kept:
            self.hits += 1
            self.kept.move_to_end(key)
            return self.kept[key]
        self.misses += 1
        size = sum(store.expert_bytes for store in stores)
        while self.kept and self.bytes + size > self.max_bytes:
            _, dropped = self.kept.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in dropped)
        found = [store.read(expert) for store in stores]
        if self.bytes + size <= self.max_bytes:
            self.kept[key] = found
            self.bytes += size
        return found


@dataclass
class Ahead:
    """The next layer's experts and router: whom to read ahead by this layer's hidden states (an early guess)."""

    experts: "ColdExperts"
    router: Router


class ColdExperts(nn.Module):
    """As `GroupedExperts`, of experts in two stores (w13, w2)."""

    def __init__(self, layer: int, stores: list[Store], hot: HotExperts):
        super().__init__()
        self.layer, self.stores, self.hot = layer, stores, hot
        self.ahead: Ahead | None = None

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """x [R, D] sorted by expert, counts [E] rows of each, weights [R, 1] -> weighted [R, D]."""
        if self.ahead is not None:
            self.ahead.experts.expect(self.ahead.router(x[None])[0].indices.unique().tolist())
        out, start = torch.empty_like(x), 0
        for expert, number in enumerate(counts.tolist()):
            if number:
                rows = slice(start, start + number)
                w13, w2 = (unpack(data, *store.shape, store.form, x.dtype, self.hot.room) for data, store in
                           zip(self.hot.get(self.layer, expert, self.stores), self.stores, strict=True))
                out[rows] = F.linear(swiglu(F.linear(x[rows], w13), weights[rows]), w2)
                start += number
        return out

    def expect(self, experts: list[int]) -> None:
        for expert in experts:
            if (self.layer, expert) not in self.hot.kept:
                for store in self.stores:
                    store.expect(expert)
