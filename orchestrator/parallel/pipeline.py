"""One optimizer step's forward and backward over this rank's stages, by torch's own pipeline schedules.

The loss of a step is the mean over all its tokens and sequences, whatever the layout: each microbatch divides its
sums by the step's totals, and gradients are summed, never averaged, over microbatches and ranks.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.ops import weights_kept
from model.recompute import keep_casts
from model.transformer import Transformer, moe_layers, routers
from orchestrator.config import Config, LayoutConfig, Schedule
from orchestrator.parallel.mesh import Mesh
from orchestrator.parallel.overlap import overlap_pairs
from orchestrator.parallel.shard import Shard, build_stage, set_grad_sync, shards_of, tie_embedding_grads
from orchestrator.parallel.stage import Stage
from orchestrator.plan.layout import num_stages, split_stages, stages_of
from orchestrator.plan.schedule import torch_class


@dataclass
class Pipeline:
    """This rank's stages and how to run them."""

    model: ModelConfig
    layout: LayoutConfig
    mesh: Mesh
    stage_ids: list[int]
    stages: list[Transformer]
    embedding_group: dist.ProcessGroup | None
    shards: list[Shard]
    dtype: torch.dtype
    """Of the residual stream."""
    runtimes: dict = field(default_factory=dict)

    @property
    def has_last(self) -> bool:
        return any(stage.is_last for stage in self.stages)

    def train_step(self, tokens: Tensor, *, step_sequences: int) -> Tensor:
        """Accumulate the gradients of this rank's sequences.

        tokens [sequences, S + 1 + M] int64 on the device; `step_sequences` counts those of all ranks. Returns the
        cross-entropies summed over this rank's tokens, [1 + M] fp32, zeros where the last stage is elsewhere.
        """
        for stage in self.stages:
            stage.train()
            for _, moe in moe_layers(stage):
                moe.balance_scale = self.model.balance_loss_weight / step_sequences
        loss_scale = _LossScale(self.model, tokens.shape[1], step_sequences)
        with self._weights_once(tokens.device):
            run = self._run_alone if self.mesh.pp is None else self._run_schedule
            return run(tokens, loss_scale)

    @torch.no_grad()
    def validate(self, tokens: Tensor) -> Tensor:
        """Cross-entropies of held-out sequences, as `train_step` but forward only, then each MTP depth's accepted
        guesses (`Transformer.forward`): [1 + 2M]."""
        for stage in self.stages:
            stage.eval()
        with self._weights_once(tokens.device):
            return self._forward_only(tokens)

    def finish_grads(self) -> None:
        """After `train_step`: make the gradients of parameters that several stages hold equal."""
        tie_embedding_grads(self.shards, self.embedding_group)

    def zero_grad(self) -> None:
        for stage in self.stages:
            stage.zero_grad(set_to_none=True)
            for _, router in routers(stage):
                router.tokens_per_expert.zero_()
                router.balance_loss_sum = 0.0

    @contextlib.contextmanager
    def _weights_once(self, device: torch.device) -> Iterator[None]:
        """Within it every weight is cast or quantised once for all microbatches. Autocast keeps its casts until the
        outermost region ends, which this is, switched off."""
        with torch.autocast(device.type, enabled=False), weights_kept():
            yield

    def _run_alone(self, tokens: Tensor, loss_scale: "_LossScale") -> Tensor:
        (stage,) = self.stages
        total = self._no_losses(tokens)
        parts = tokens.chunk(self.layout.microbatches)
        for i, part in enumerate(parts):
            set_grad_sync(stage, last=i == len(parts) - 1)
            losses = stage(part, part)
            total += losses.detach()[0]
            loss_scale(losses).backward()
        return total

    def _run_schedule(self, tokens: Tensor, loss_scale: "_LossScale") -> Tensor:
        """A runtime lives as long as its shapes do: a batch ramp makes others, over the same modules."""
        key = tuple(tokens.shape)
        if key not in self.runtimes:
            self.runtimes[key] = self._make_runtime(tokens)
        runtime, collected = self.runtimes[key]
        collected.loss_scale, collected.total = loss_scale, self._no_losses(tokens)
        args = (tokens,) if 0 in self.stage_ids else ()
        runtime.step(*args, target=tokens if self.has_last else None, tokens=tokens, return_outputs=False)
        return collected.total

    def _forward_only(self, tokens: Tensor) -> Tensor:
        """Breadth first: a stage runs all microbatches, then the rank's next stage; sends do not wait. Where a rank has
        several, each asks for all that it receives before it sends any on: NCCL does what two ranks exchange in the
        order in which each asks, and where these differ, as with two ranks of two stages in turn, both would wait for
        ever."""
        total = torch.zeros(1 + 2 * self.model.n_mtp_layers, device=tokens.device)
        sends, local = [], {}
        parts = tokens.chunk(self.layout.microbatches)
        for index, stage in zip(self.stage_ids, self.stages, strict=True):
            here = stage.is_first or (index, 0) in local
            coming = (self._receive(part, self._owner(index - 1)) for part in parts if not here)
            coming = coming if len(self.stages) == 1 else iter(list(coming))
            for i, part in enumerate(parts):
                if here:
                    x = part if stage.is_first else local.pop((index, i))
                else:
                    x, work = next(coming)
                    work.wait()
                out = stage(x, part)
                if stage.is_last:
                    total += out[0]
                elif self._owner(index + 1) == self.mesh.coordinate.pp:
                    local[index + 1, i] = out
                else:
                    sends.append((dist.isend(out, group=self.mesh.pp, group_dst=self._owner(index + 1)), out))
        for work, _ in sends:
            work.wait()
        return total

    def _receive(self, part: Tensor, source: int) -> tuple[Tensor, dist.Work]:
        """Hidden states of one microbatch, under way from a pipeline rank."""
        hidden = self._hidden(part)
        return hidden, dist.irecv(hidden, group=self.mesh.pp, group_src=source)

    def _owner(self, stage: int) -> int:
        """The pipeline rank that runs a stage."""
        layout = self.layout
        return next(rank for rank in range(layout.pp)
                    if stage in stages_of(rank, layout.pp, layout.schedule, layout.stages_per_rank))

    def _hidden(self, part: Tensor) -> Tensor:
        """Room for the hidden states of one microbatch, [B, S, D]."""
        seq_len = part.shape[1] - 1 - self.model.n_mtp_layers
        return torch.empty(part.shape[0], seq_len, self.model.dim, dtype=self.dtype, device=part.device)

    def _no_losses(self, tokens: Tensor) -> Tensor:
        return torch.zeros(1 + self.model.n_mtp_layers, device=tokens.device)

    def _make_runtime(self, tokens: Tensor):
        layout, micro = self.layout, self.layout.microbatches
        part = tokens[: tokens.shape[0] // micro]
        hidden = self._hidden(part).requires_grad_()
        losses = self._no_losses(tokens)[None].requires_grad_()
        total = layout.pp * len(self.stage_ids)
        stages = [Stage(module, index, total, tokens.device, group=self.mesh.pp,
                        input_args=(part,) if index == 0 else (hidden,),
                        output_args=(losses,) if index == total - 1 else (hidden,))
                  for index, module in zip(self.stage_ids, self.stages, strict=True)]
        collected = _Collected()
        kind = torch_class(layout.schedule)
        single = len(stages) == 1
        runtime = kind(stages[0] if single else stages, micro, loss_fn=collected, scale_grads=False)
        if layout.schedule is Schedule.dualpipev and layout.overlap and self.mesh.ep is not None:
            overlap_pairs(runtime, tokens.device)
        return runtime, collected


def build_pipeline(config: Config, mesh: Mesh, compute_dtype: torch.dtype) -> Pipeline:
    layout = config.layout
    ids = stages_of(mesh.coordinate.pp, layout.pp, layout.schedule, layout.stages_per_rank) if layout.pp > 1 else [0]
    splits = split_stages(config.model, num_stages(config), config.train.seq_len)
    stages = [build_stage(config.model, splits[i], mesh, seed=config.seed, recompute=layout.recompute,
                          precision=config.precision) for i in ids]
    for stage in stages if compute_dtype != torch.float32 else ():
        # Forward alone: in a region of autocast backward, too, would multiply in its dtype, the router's fp32 included.
        stage.forward = torch.autocast(mesh.device.type, compute_dtype)(stage.forward)
    if mesh.device.type == "cuda":
        keep_casts(mesh.device)
    group = None
    if mesh.pp is not None and (config.model.n_mtp_layers or config.model.tie_embeddings):
        last_stage = len(splits) - 1
        last_rank = next(r for r in range(layout.pp) if last_stage in stages_of(
            r, layout.pp, layout.schedule, layout.stages_per_rank))
        group = mesh.first_and_last_stage_group(last_rank)
    return Pipeline(config.model, layout, mesh, ids, stages, group, shards_of(stages, config.model, mesh),
                    compute_dtype)


class _LossScale:
    """Summed cross-entropies [1, 1 + M] of a microbatch -> its part of the step's loss (V3 report eq. 24-25)."""

    def __init__(self, model: ModelConfig, width: int, step_sequences: int):
        self.depths = model.n_mtp_layers
        self.mtp_weight = model.mtp_loss_weight
        self.num_tokens = (width - 1 - self.depths) * step_sequences

    def __call__(self, losses: Tensor) -> Tensor:
        loss = losses[0, 0]
        if self.depths:
            loss = loss + self.mtp_weight / self.depths * losses[0, 1:].sum()
        return loss / self.num_tokens


class _Collected:
    """The schedule's loss function: scales the last stage's output and keeps the sums for the log."""

    loss_scale: _LossScale
    total: Tensor

    def __call__(self, losses: Tensor, target: Tensor) -> Tensor:
        self.total += losses.detach()[0]
        return self.loss_scale(losses)
