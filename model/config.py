"""The shape of one model, as data. DeepSeek-V3's symbol names; no torch.

One dataclass covers the DeepSeek family (MLA, routed and shared experts, multi-token prediction),
grouped-query models (Llama, Mixtral, Qwen3-MoE) and the dense twins: a dense model is one with
`n_routed_experts = 0`. Hugging Face's names appear in `hf.py` alone.
"""

import math
from dataclasses import dataclass
from enum import Enum


class Attention(Enum):
    """`mla`: multi-head latent attention (DeepSeek-V2 report, section 2.1). `gqa`: grouped-query."""

    mla = "mla"
    gqa = "gqa"


class QKNorm(Enum):
    """Where queries and keys are normalised: nowhere, per head, or over all heads at once."""

    none = "none"
    head = "head"
    full = "full"


class RopeScaling(Enum):
    """What lies between the frequencies that a context extension keeps and those it slows down."""

    yarn = "yarn"
    llama3 = "llama3"


class ScoreFunc(Enum):
    """How gate logits become affinities: V3 uses the sigmoid (eq. 15), V2 and most others the softmax."""

    sigmoid = "sigmoid"
    softmax = "softmax"


@dataclass(unsafe_hash=True)  # never changed once composed; what is worked out of one is cached by it
class ModelConfig:
    """Sizes are numbers of elements, token counts are tokens. `check()` raises on a contradiction."""

    name: str = "custom"
    """What the model is called in reports."""
    vocab_size: int = 264
    """Rows of the embedding and of the head; at least the tokenizer's size."""
    max_seq_len: int = 4096
    """Longest sequence that positions are computed for."""
    dim: int = 128
    """Hidden size."""
    n_layers: int = 4
    """Transformer blocks, dense first layers included, MTP modules not."""
    n_dense_layers: int = 1
    """Leading blocks whose feed-forward is dense."""
    inter_dim: int = 512
    """Inner size of a dense feed-forward."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_embeddings: bool = False
    """The head is the transposed embedding."""
    init_std: float = 0.006
    """Standard deviation of every initial matrix (V3 report, section 4.2)."""

    attention: Attention = Attention.mla
    """Kind of attention, which decides what of this block counts."""
    n_heads: int = 4
    """Query heads."""
    q_lora_rank: int = 0
    """Rank of the query path; 0 means a full query projection. MLA only."""
    kv_lora_rank: int = 32
    """Size of the latent key-value cache per token. MLA only."""
    qk_nope_head_dim: int = 32
    """Part of a query or key head that carries no position. MLA only."""
    qk_rope_head_dim: int = 16
    """Part that rotates, in keys one for all heads. MLA only."""
    v_head_dim: int = 32
    """Size of a value head. MLA only."""
    n_kv_heads: int = 4
    """Key-value heads. GQA only."""
    head_dim: int = 32
    """Size of a head. GQA only."""
    qk_norm: QKNorm = QKNorm.none
    """GQA only."""
    qkv_bias: bool = False
    """GQA only."""
    rotary_fraction: float = 1.0
    """Share of a head's dimensions that rotate. GQA only."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_interleaved: bool = True
    """Pairs are (0,1),(2,3).. as in DeepSeek; otherwise (0,h/2),(1,h/2+1).. as in Llama."""
    rope_factor: float = 1.0
    """Context extension by so much; 1 is none."""
    rope_scaling: RopeScaling = RopeScaling.yarn
    """How frequencies are extended."""
    original_seq_len: int = 4096
    """Context before extension."""
    beta_fast: float = 32.0
    """Pairs that turn more often in the original context keep their frequency. Llama 3.1 has 4 here."""
    beta_slow: float = 1.0
    """Those that turn less often are slowed down by `rope_factor`."""
    mscale: float = 1.0
    """YaRN: how much the rotating parts of queries and keys grow with `rope_factor`."""
    mscale_all_dim: float = 1.0
    """YaRN: 0 leaves the softmax scale alone."""

    n_routed_experts: int = 8
    """Routed experts of a MoE layer; 0 makes every layer dense."""
    n_shared_experts: int = 1
    """Experts of a MoE layer that see every token, computed as one."""
    n_activated_experts: int = 2
    """top_k."""
    moe_inter_dim: int = 128
    """Inner size of one expert."""
    n_expert_groups: int = 1
    """Groups that routed experts are divided into."""
    n_limited_groups: int = 1
    """Groups a token may reach (node-limited routing, V3 report section 2.1.2)."""
    score_func: ScoreFunc = ScoreFunc.sigmoid
    """From gate logits to affinities."""
    norm_topk: bool = True
    """Normalise the chosen affinities to sum to one (eq. 13)."""
    route_scale: float = 1.0
    """Factor on the weights of the chosen experts."""
    expert_bias: bool = True
    """Auxiliary-loss-free balancing by a bias that only selection sees (eq. 16)."""
    bias_update_speed: float = 0.001
    """gamma of section 2.1.2, per step."""
    balance_loss_weight: float = 0.0001
    """alpha of the sequence-wise balance loss (eq. 17-20); 0 is off."""

    n_mtp_layers: int = 0
    """Depths of multi-token prediction (section 2.2)."""
    mtp_loss_weight: float = 0.3
    """lambda of eq. 25."""

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` routes. MTP modules count as layers `n_layers`, `n_layers + 1`, ..."""
        return self.n_routed_experts > 0 and layer >= self.n_dense_layers

    @property
    def qk_head_dim(self) -> int:
        """Elements of a query head that meet a key head."""
        if self.attention is Attention.mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim

    def check(self) -> None:
        """Raise `ValueError` naming key, value, rule and remedy for the first contradiction found."""
        for key in ("vocab_size", "max_seq_len", "dim", "n_layers", "n_heads", "original_seq_len"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "must be at least 1", "give a positive number")
        for key in ("n_routed_experts", "n_shared_experts", "n_mtp_layers", "q_lora_rank"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "must not be negative", "use 0 for none")
        for key in ("norm_eps", "init_std", "rope_theta", "rope_factor", "beta_fast", "beta_slow", "route_scale"):
            _require(0 < getattr(self, key) < math.inf, key, getattr(self, key), "must be positive and finite",
                     "give a positive number")
        for key in ("bias_update_speed", "balance_loss_weight", "mtp_loss_weight"):
            _require(0 <= getattr(self, key) < math.inf, key, getattr(self, key), "must be finite and not negative",
                     "use 0 for none")
        for key, most in (("vocab_size", 2**31 - 1), ("n_layers", 10_000), ("n_routed_experts", 1_000_000)):
            _require(getattr(self, key) <= most, key, getattr(self, key), f"must be at most {most:,}", "lower it")
        _require(0 <= self.n_dense_layers <= self.n_layers, "n_dense_layers", self.n_dense_layers,
                 f"must lie between 0 and n_layers={self.n_layers}", "lower it")
        if self.n_dense_layers or not self.n_routed_experts:
            _require(self.inter_dim > 0, "inter_dim", self.inter_dim, "must be positive for dense layers", "set it")
        self._check_attention()
        if self.n_routed_experts:
            self._check_experts()

    def _check_attention(self) -> None:
        if self.attention is Attention.mla:
            for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                _require(getattr(self, key) > 0, key, getattr(self, key), "must be positive with attention=mla",
                         "set it, or use attention=gqa")
            rotary, key = self.qk_rope_head_dim, "qk_rope_head_dim"
        else:
            _require(self.n_kv_heads > 0 and self.n_heads % self.n_kv_heads == 0, "n_kv_heads", self.n_kv_heads,
                     f"must divide n_heads={self.n_heads}", f"use one of {divisors(self.n_heads)}")
            rotary, key = int(self.head_dim * self.rotary_fraction), "head_dim"
        if self.rope_scaling is RopeScaling.llama3:
            _require(self.beta_fast > self.beta_slow, "beta_fast", self.beta_fast,
                     f"must be above beta_slow={self.beta_slow} with rope_scaling=llama3", "use 4, as Llama 3.1 has")
        _require(rotary > 0 and rotary % 2 == 0, key, rotary, "must be an even number of rotating dimensions",
                 f"use {rotary + 1 if rotary > 0 else 2}")

    def _check_experts(self) -> None:
        experts, groups = self.n_routed_experts, self.n_expert_groups
        _require(self.moe_inter_dim > 0, "moe_inter_dim", self.moe_inter_dim, "must be positive with experts", "set it")
        _require(0 < self.n_activated_experts <= experts, "n_activated_experts", self.n_activated_experts,
                 f"must lie between 1 and n_routed_experts={experts}", "lower it or add experts")
        _require(groups > 0 and experts % groups == 0, "n_expert_groups", groups,
                 f"must divide n_routed_experts={experts}", f"use one of {divisors(experts)}")
        _require(0 < self.n_limited_groups <= groups, "n_limited_groups", self.n_limited_groups,
                 f"must lie between 1 and n_expert_groups={groups}", "lower it")
        reachable = experts // groups * self.n_limited_groups
        _require(self.n_activated_experts <= reachable, "n_activated_experts", self.n_activated_experts,
                 f"must not exceed the {reachable} experts that {self.n_limited_groups} of {groups} groups hold",
                 "raise n_limited_groups or lower it")


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending: what an error message may offer."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def _require(holds: bool, key: str, value: object, rule: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"model.{key}={value}: {rule}; {remedy}")
