"""From an ordinary module to this rank's share of it: experts split, parameters sharded (FSDP2), values drawn.

Here DTensors end: everybody downstream (optimizer, clipping, checkpoint) sees `Shard`s, plain local tensors that
know which rows of which model-wide parameter they are. Every row has exactly one owner, replicas of the embedding
aside (`is_copy`). Replicas of experts own some of the experts each or, where these are too few or do not divide, some
rows of every expert.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import placement_types as placement

from model.config import ModelConfig
from model.fp8 import to_fp8
from model.init import initial_experts, initial_rows
from model.transformer import Transformer, moe_layers
from orchestrator.config import PrecisionConfig, Recompute
from orchestrator.parallel.dispatch import AllToAllDispatcher
from orchestrator.parallel.mesh import Mesh
from orchestrator.parallel.node_limited import NodeLimitedDispatcher

EMBEDDING = "tok_embeddings.weight"


@dataclass
class Shard:
    """This rank's rows of one parameter. `value` aliases the live parameter; `grad()` its summed gradient."""

    name: str
    """Model-wide name of the parameter, e.g. `layers.3.moe.experts.w13`."""
    parameter: nn.Parameter
    value: nn.Parameter
    """Local rows, a leaf that the optimizer steps."""
    global_shape: tuple[int, ...]
    start: int
    """First row (dimension 0) of the model-wide parameter that is here; of experts, the first expert."""
    is_expert: bool
    is_copy: bool
    """A replica whose owner is elsewhere: kept equal, but neither counted in norms nor saved."""
    row: int = 0
    """First row within each expert that is here; 0 of all else."""

    def grad(self) -> Tensor:
        grad = self.parameter.grad
        if grad is None:
            return torch.zeros_like(self.value)
        return grad.to_local() if isinstance(grad, DTensor) else grad


def build_stage(config: ModelConfig, layers: range, mesh: Mesh, *, seed: int, recompute: Recompute = Recompute.none,
                precision: PrecisionConfig | None = None) -> Transformer:
    """The stage's module on this rank's device: experts split over ep, parameters over dp, values drawn."""
    experts = mesh.layout.experts_of(mesh.info.rank, config.n_routed_experts)
    with torch.device("meta"):
        stage = Transformer(config, layers=layers, num_local_experts=len(experts) or None)
    stage.recompute = recompute is Recompute.full
    fp8 = precision is not None and precision.fp8
    if fp8:
        to_fp8(stage, power_of_two=precision.power_of_two_scales)
    if recompute is Recompute.selective:
        stage.keep_less()
    if mesh.ep is not None:
        for _, moe in moe_layers(stage):
            moe.dispatcher = (NodeLimitedDispatcher(mesh.hops, config.n_routed_experts, fp8=fp8) if mesh.hops else
                              AllToAllDispatcher(mesh.ep, config.n_routed_experts, fp8=fp8))
    if mesh.dp_mesh is not None:
        _apply_fsdp(stage, mesh)
    stage.to_empty(device=mesh.device)
    for shard in shards_of([stage], config, mesh):
        _draw(shard, config, seed)
    for _, buffer in stage.named_buffers():
        buffer.zero_()
    return stage


def shards_of(stages: Iterable[Transformer], config: ModelConfig, mesh: Mesh) -> list[Shard]:
    """This rank's shards of all its stages, in model order."""
    experts = mesh.layout.experts_of(mesh.info.rank, config.n_routed_experts)
    shards = []
    for stage in stages:
        for raw_name, parameter in stage.named_parameters():
            name = _model_wide(raw_name, config)
            is_expert = ".moe.experts." in name
            local, start, row = _local_rows(parameter)
            shape = tuple(parameter.shape)
            if is_expert:
                start += experts.start
                shape = (config.n_routed_experts, *shape[1:])
            value = parameter if local is parameter else nn.Parameter(local)
            is_copy = name == EMBEDDING and not (stage.is_first and raw_name == EMBEDDING)
            shards.append(Shard(name, parameter, value, shape, start, is_expert, is_copy, row))
    return shards


def tie_embedding_grads(shards: list[Shard], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients of the embedding and of its copies on the last stage, so that all take the same step.

    `group` joins the two ranks that hold them; None when one rank holds all (V schedules) or there is no copy.
    """
    held = [shard.grad() for shard in shards if shard.name == EMBEDDING]
    if not held or (len(held) == 1 and group is None):
        return
    total = torch.stack(held).sum(0) if len(held) > 1 else held[0]
    if group is not None:
        dist.all_reduce(total, group=group)
    for grad in held:
        grad.copy_(total)


def set_grad_sync(stage: nn.Module, last: bool) -> None:
    """Reduce gradients over data-parallel ranks in this backward (`last` microbatch), or only accumulate."""
    if isinstance(stage, FSDPModule):
        stage.set_requires_gradient_sync(last)
        stage.set_is_last_backward(last)
        stage.set_reshard_after_backward(last)


def _apply_fsdp(stage: Transformer, mesh: Mesh) -> None:
    """FSDP2 block by block: dense parameters over dp, experts over their replicas. Gradients are summed.

    The loss is already divided by the step's tokens over all ranks, hence no division here. Experts without
    replicas stay outside FSDP: their gradient is complete where they are.
    """
    lonely = set()
    for _, moe in moe_layers(stage):
        if mesh.edp_mesh is not None:
            fully_shard(moe.experts, mesh=mesh.edp_mesh, reshard_after_forward=False,
                        shard_placement_fn=partial(_experts_or_rows, replicas=mesh.edp_mesh.size()))
        else:
            lonely.update(moe.experts.parameters())
    blocks = [*stage.layers.values(), *(stage.mtp.values() if hasattr(stage, "mtp") else ())]
    for block in [*blocks, stage]:
        fully_shard(block, mesh=mesh.dp_mesh, reshard_after_forward=False, ignored_params=lonely)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _experts_or_rows(parameter: nn.Parameter, *, replicas: int) -> placement.Shard:
    """Which dimension of [experts, rows, columns] replicas share out. FSDP2 would pad experts that do not divide, on
    every rank and in every gathered weight; rows it must be able to divide."""
    experts, rows = parameter.shape[:2]
    return placement.Shard(1 if experts % replicas and rows % replicas == 0 else 0)


def _local_rows(parameter: nn.Parameter) -> tuple[Tensor, int, int]:
    """What of a parameter is here, and its first index along dimensions 0 and 1, of which FSDP2 cuts one in equal
    chunks."""
    if not isinstance(parameter, DTensor):
        return parameter, 0, 0
    mesh, dim = parameter.device_mesh, parameter.placements[0].dim
    chunk = -(-parameter.shape[dim] // mesh.size())
    first = min(mesh.get_local_rank() * chunk, parameter.shape[dim])
    return (parameter.to_local(), *((first, 0) if dim == 0 else (0, first)))


@torch.no_grad()
def _draw(shard: Shard, config: ModelConfig, seed: int) -> None:
    stop = shard.start + shard.value.shape[0]
    if shard.is_expert:
        whole = len(shard.value), *shard.global_shape[1:]
        value = initial_experts(shard.name, whole, range(shard.start, stop), config, seed=seed)
        value = value[:, shard.row : shard.row + shard.value.shape[1]]
    else:
        value = initial_rows(shard.name, shard.global_shape, config, seed=seed)[shard.start : stop]
    shard.value.copy_(value)


def _model_wide(name: str, config: ModelConfig) -> str:
    """A stage's name for a parameter -> the model's: copies of the embedding go by the embedding's name."""
    if name.endswith(EMBEDDING) or (config.tie_embeddings and name == "lm_head.weight"):
        return EMBEDDING
    return name
