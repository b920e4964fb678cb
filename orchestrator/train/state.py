"""What a rank saves and restores: its shards, their moments and its router biases, under layout-free keys.

A grouped expert tensor is saved as one entry per global expert, so that any layout finds any expert.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from model.transformer import moe_layers
from orchestrator.parallel.pipeline import Pipeline
from orchestrator.parallel.shard import Shard
from orchestrator.train.manifest import MissingTensor
from orchestrator.train.optim import moments, set_steps_taken
from orchestrator.train.shards import Loader, Piece


def pieces_of(pipeline: Pipeline, optimizer: torch.optim.AdamW, *, with_copies: bool = False) -> list[Piece]:
    """Everything this rank owns, or with copies everything it restores, once: where first and last stage share a rank,
    it has the embedding and its copies. The tensors alias live state: the saver copies them before it returns."""
    pieces, seen = [], set()
    for shard in pipeline.shards:
        if shard.name in seen or shard.is_copy and not with_copies:
            continue
        seen.add(shard.name)
        pieces += _shard_pieces("model", shard, shard.value.detach())
        for name, moment in moments(optimizer, shard).items():
            pieces += _shard_pieces(f"optim.{name}", shard, moment)
    if pipeline.mesh.coordinate.dp == 0:
        pieces += [Piece(f"model.{key}", tuple(bias.shape), 0, bias) for key, bias in biases(pipeline)]
    return pieces


@torch.no_grad()
def restore(pipeline: Pipeline, optimizer: torch.optim.AdamW, loader: Loader, *, weights_only: bool = False,
            on_progress: Callable[[], None] = lambda: None) -> None:
    """Fill this rank's shards and (unless `weights_only`) moments, whatever layout wrote the checkpoint; and where it
    is the first of its data-parallel ranks, their biases, which `share_biases` hands on: the file that holds these few
    numbers would be read by every one of them."""
    for shard in pipeline.shards:
        on_progress()
        _read_into("model", shard, shard.value, loader)
        for name, moment in moments(optimizer, shard).items() if not weights_only else ():
            _read_into(f"optim.{name}", shard, moment, loader)
    for key, bias in biases(pipeline) if pipeline.mesh.coordinate.dp == 0 else ():
        _copy(bias, f"model.{key}", loader.read(f"model.{key}"))
    if not weights_only:
        set_steps_taken(optimizer, pipeline.shards, loader.state["progress"]["optimizer_steps"])


@torch.no_grad()
def share_biases(pipeline: Pipeline) -> None:
    """All ranks, once all have restored."""
    mesh, found = pipeline.mesh, [bias for _, bias in biases(pipeline)]
    if mesh.dp_mesh is not None and found:
        packed = torch.stack(found)
        dist.broadcast(packed, group=mesh.dp_mesh.get_group(), group_src=0)
        for bias, value in zip(found, packed, strict=True):
            bias.copy_(value)


def biases(pipeline: Pipeline) -> list[tuple[str, Tensor]]:
    """The routers' biases by name: every data-parallel rank of a stage holds the same."""
    return [(f"{name}.router.expert_bias", moe.router.expert_bias) for stage in pipeline.stages
            for name, moe in moe_layers(stage) if hasattr(moe.router, "expert_bias")]


def _shard_pieces(prefix: str, shard: Shard, rows: Tensor) -> list[Piece]:
    if not shard.is_expert:
        return [Piece(f"{prefix}.{shard.name}", shard.global_shape, shard.start, rows)] if len(rows) else []
    shape = shard.global_shape[1:]
    return [Piece(_expert_key(prefix, shard, i), shape, shard.row, expert) for i, expert in enumerate(rows)]


def _read_into(prefix: str, shard: Shard, rows: Tensor, loader: Loader) -> None:
    if not shard.is_expert:
        if len(rows):
            key = f"{prefix}.{shard.name}"
            _copy(rows, key, loader.read(key, shard.start, shard.start + len(rows)))
        return
    for i, expert in enumerate(rows):
        key = _expert_key(prefix, shard, i)
        _copy(expert, key, loader.read(key, shard.row, shard.row + expert.shape[0]))


def _copy(target: Tensor, key: str, saved: Tensor) -> None:
    """Never by broadcasting: a tensor of another shape is another tensor."""
    if saved.shape != target.shape:
        raise MissingTensor(f"{key}: saved as {list(saved.shape)}, wanted as {list(target.shape)}; use the model it "
                            "was saved with")
    target.copy_(saved)


def _expert_key(prefix: str, shard: Shard, i: int) -> str:
    layer, matrix = shard.name.rsplit(".", 1)
    return f"{prefix}.{layer}.{shard.start + i}.{matrix}"
