"""What one step adds up over all ranks, and what a run counts from its first step on. Data alone."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from model.config import ModelConfig


@dataclass
class StepSums:
    """What one step adds up over all ranks. Losses are sums over tokens, counts are choices per MoE layer."""

    losses: list[float]
    balance_loss: float
    grad_norm: float
    stop: bool
    saving_late: bool
    """The save under way on some rank takes so long that the next one has to wait."""
    save_due: bool
    tokens_per_expert: Tensor
    """[MoE layers, experts], int64."""
    cpu_s: float = 0.0
    """CPU seconds of forward and backward; 0 on GPUs."""
    spike: bool = False
    """Finite, but far above the recent losses."""

    @property
    def applied(self) -> bool:
        """Whether the step updates the weights."""
        return self.finite and not self.spike

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm) and all(math.isfinite(loss) for loss in self.losses)


@dataclass
class Progress:
    """What a resumed run must know beside its tensors; goes into every checkpoint's state."""

    step: int = 0
    optimizer_steps: int = 0
    samples: int = 0
    tokens: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    loss_spikes: int = 0
    """Of the bad steps."""
    recent_losses: list[float] = field(default_factory=list)
    """Finite ones, nats per token, of the last `train.spike_window` steps."""
    rollbacks: int = 0
    rolled_back_at: int = 0
    """The last step that led to a rollback."""
    skipped_samples: int = 0
    """Left out by rollbacks."""
    loss_train: float | None = None
    loss_validation: float | None = None
    extra: dict = field(default_factory=dict)


def moe_layer_names(model: ModelConfig) -> list[str]:
    """Every MoE layer of the model in order, MTP modules last: the rows of the step's counts."""
    if not model.n_routed_experts:
        return []
    return [f"layers.{i}" for i in range(model.n_layers) if model.is_moe(i)] + [
        f"mtp.{k}" for k in range(model.n_mtp_layers)]
