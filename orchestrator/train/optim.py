"""The optimizer over this rank's shards, its learning-rate schedules, and how its state becomes checkpoint pieces."""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from orchestrator.config import LRSchedule, OptimConfig
from orchestrator.parallel.shard import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Rate of optimizer step `step` (the first is 1): linear warm-up, then stable-decay or cosine.

    wsd holds the peak and falls linearly to `min_lr_ratio` over the last `decay_fraction` of the run (Hu et al.
    2024); cosine falls from the end of the warm-up (Loshchilov & Hutter 2016).
    """
    floor = optim.lr * optim.min_lr_ratio
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule is LRSchedule.cosine:
        done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
        return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay_steps = max(1, round(total_steps * optim.decay_fraction))
    left = (total_steps - step) / decay_steps if optim.decay_fraction else 1.0
    return floor + (optim.lr - floor) * min(1.0, max(0.0, left))


class AdamW(torch.optim.AdamW):
    """torch's, with moments that may rest in another dtype; each step computes in fp32, one parameter at a time."""

    moments_dtype = torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if self.moments_dtype == torch.float32:
            return super().step()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = _state_of(self, parameter)
                wide = {name: state[name].float() for name in MOMENTS}
                adamw([parameter], [parameter.grad], [wide["exp_avg"]], [wide["exp_avg_sq"]], [], [state["step"]],
                      fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], eps=group["eps"],
                      weight_decay=group["weight_decay"], maximize=False)
                for name, value in wide.items():
                    state[name].copy_(value)


def build_optimizer(shards: list[Shard], optim: OptimConfig, *, moments_dtype: torch.dtype = torch.float32) -> AdamW:
    """AdamW on local rows; matrices decay, vectors (norms, biases) do not."""
    groups = [
        {"params": [s.value for s in shards if len(s.global_shape) > 1], "weight_decay": optim.weight_decay},
        {"params": [s.value for s in shards if len(s.global_shape) <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
                      fused=True)
    optimizer.moments_dtype = moments_dtype
    return optimizer


def moments(optimizer: AdamW, shard: Shard) -> dict[str, Tensor]:
    """First and second moment of a shard, made (zero) if no step has been taken yet."""
    state = _state_of(optimizer, shard.value)
    return {name: state[name] for name in MOMENTS}


def _state_of(optimizer: AdamW, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update({name: torch.zeros_like(parameter, dtype=optimizer.moments_dtype) for name in MOMENTS})
    return state


def set_steps_taken(optimizer: AdamW, shards: list[Shard], steps: int) -> None:
    """Restore Adam's step count, one number for all parameters."""
    for shard in shards:
        moments(optimizer, shard)
        optimizer.state[shard.value]["step"].fill_(steps)


def squared_norm(shards: list[Shard]) -> Tensor:
    """Sum of squares of the gradients this rank owns, fp64; copies are counted where their owner is."""
    grads = [shard.grad() for shard in shards if not shard.is_copy]
    norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1)
    return norms.double().square().sum()


def clip_and_step(optimizer: AdamW, shards: list[Shard], *, norm: float, optim: OptimConfig,
                  lr: float) -> None:
    """Scale the gradients so that their global norm is at most `clip_norm`, then take one step."""
    scale = min(1.0, optim.clip_norm / (norm + 1e-6)) if optim.clip_norm else 1.0
    for shard in shards:
        shard.value.grad = shard.grad()
    if scale < 1:
        torch._foreach_mul_([shard.value.grad for shard in shards], scale)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for shard in shards:
        if shard.value is not shard.parameter:  # a second reference, which would hold the gradient from step to step
            shard.value.grad = None
