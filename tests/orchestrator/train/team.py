"""Savers of several ranks in one process that share a HashStore; each has its own thread, as in a real run."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from orchestrator.errors import SparingError
from orchestrator.train import lineage, manifest
from orchestrator.train.checkpoint import Saver
from orchestrator.train.shards import Loader, Piece

EXPERTS = {"layers.1": 8, "layers.2": 8, "mtp.0.block": 8}
STATE = {"step": 3, "tokens": 12345678901, "loss": 2.0625, "wandb": {"id": "abc"}, "model": {"dim": 8, "n_layers": 3}}


def pieces_of(tensors, rank, world):
    """What a rank owns: rows of dense tensors, whole experts, and rank 0 the scalars."""
    pieces = []
    for key, tensor in tensors.items():
        if match := manifest.EXPERT_KEY.fullmatch(key):
            if int(match["expert"]) % world == rank:
                pieces.append(Piece(key, tuple(tensor.shape), 0, tensor))
        elif tensor.dim() == 0:
            pieces += [Piece(key, (), 0, tensor)] if rank == 0 else []
        else:
            start, stop = (len(tensor) * r // world for r in (rank, rank + 1))
            pieces.append(Piece(key, tuple(tensor.shape), start, tensor[start:stop]))
    return pieces


class Team:
    """The savers of an attempt."""

    def __init__(self, directory, world=4, *, keep=0, fence="attempt-1", timeout_s=120, experts=EXPERTS, store=None):
        store = (store or dist.HashStore()) if world > 1 else None
        self.savers = [Saver(directory, rank=rank, world_size=world, store=store, keep=keep, fence=fence,
                             timeout_s=timeout_s, experts=experts) for rank in range(world)]

    def start(self, step, pieces, state=STATE):
        """pieces: function of (rank, world)."""
        for rank, saver in enumerate(self.savers):
            saver.save(step, pieces(rank, len(self.savers)), state)

    def save(self, step, pieces, state=STATE):
        self.start(step, pieces, state)
        return [saver.wait() for saver in self.savers][0]


def assert_holds(path, tensors):
    loader = Loader(path)
    assert set(loader.keys()) == set(tensors)
    for key, tensor in tensors.items():
        assert loader.manifest.tensors[key].shape == tuple(tensor.shape)
        read = loader.read(key)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), key
    loader.close()


def newest_loadable(directory: str, on_skip: Callable[[str, str], None]) -> str | None:
    """What `resume=auto` would go on from, by whole files and their hashes instead of a rank's part of them."""
    def load(path: str, turn: int) -> SparingError | None:
        try:
            Loader(path).check()
        except SparingError as error:
            return error

    found, damaged = lineage.newest_loadable(
        lambda tried: next((path for path in reversed(lineage.list_checkpoints(directory)) if path not in tried), None),
        load)
    for path, why in damaged.items():
        on_skip(path, why)
    return found


def flip_bit(path, chance):
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.seek(0)
        file.write(data)
