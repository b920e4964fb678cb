"""Parameters, FLOPs and cache bytes of a shape, from the shape alone; no torch, nothing built.

"V3" is the DeepSeek-V3 report (arXiv 2412.19437), "ISCA" is "Insights into DeepSeek-V3" (arXiv 2505.09343),
whose Table 2 counts V3 at 250 GFLOPs a training token; `training_flops` gives 250.46. MTP modules are counted
apart and join only on request, as in the published sizes.
"""

import dataclasses
from dataclasses import dataclass

from model.config import Attention, ModelConfig, QKNorm

LOGITS_IN_FP32 = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Most logits of a training loss that are in fp32 at a time: what a cache holds, what keeps a GPU busy."""


@dataclass(frozen=True)
class Parameters:
    """Parameters by component. The router's bias, which no gradient moves, is counted as released sizes count it."""

    embedding: int = 0
    head: int = 0
    """0 where the head is the transposed embedding."""
    attention: int = 0
    """Projections with their biases, and the norms inside (of latents, queries, keys)."""
    dense_ffn: int = 0
    router: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    norms: int = 0
    """Norms on the residual stream; in MTP modules also those of the two inputs."""
    mtp_proj: int = 0
    """The projection that joins hidden state and embedding in an MTP module (V3 eq. 21)."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(**{key: value + getattr(other, key) for key, value in vars(self).items()})


def parameters(config: ModelConfig, *, mtp: bool = False) -> Parameters:
    """The whole model; `mtp` adds the MTP modules, whose embedding and head are the model's own."""
    parts = Parameters(embedding=config.vocab_size * config.dim, norms=config.dim,
                       head=0 if config.tie_embeddings else config.vocab_size * config.dim)
    for layer in range(config.n_layers):
        parts += layer_parameters(config, layer)
    return parts + mtp_parameters(config) if mtp else parts


def layer_parameters(config: ModelConfig, layer: int) -> Parameters:
    """Block `layer`; MTP blocks are layers `n_layers`, `n_layers + 1`, ..."""
    attention, norms = _attention_parameters(config), 2 * config.dim
    if not config.is_moe(layer):
        return Parameters(attention=attention, norms=norms, dense_ffn=3 * config.dim * config.inter_dim)
    expert = 3 * config.dim * config.moe_inter_dim
    return Parameters(attention=attention, norms=norms,
                      router=config.n_routed_experts * (config.dim + config.expert_bias),
                      routed_experts=config.n_routed_experts * expert,
                      shared_experts=config.n_shared_experts * expert)


def latent_parameters(config: ModelConfig) -> int:
    """Of one layer's attention those that no head has to itself: MLA's projections down to its latents and the rotary
    key, and the latents' norms."""
    if config.attention is not Attention.mla:
        return 0
    query = (config.dim + 1) * config.q_lora_rank
    return query + config.dim * (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank


def mtp_parameters(config: ModelConfig) -> Parameters:
    """All MTP modules: a projection, a block and three norms each (V3 section 2.2)."""
    parts = Parameters()
    for depth in range(config.n_mtp_layers):
        parts += layer_parameters(config, config.n_layers + depth)
        parts += Parameters(mtp_proj=2 * config.dim**2, norms=3 * config.dim)
    return parts


def active(parts: Parameters, config: ModelConfig) -> Parameters:
    """What one token meets: of the routed experts, top_k."""
    if not parts.routed_experts:
        return parts
    routed = parts.routed_experts // config.n_routed_experts * config.n_activated_experts
    return dataclasses.replace(parts, routed_experts=routed)


@dataclass(frozen=True)
class ActiveParameters:
    """Active parameters of a token by the three conventions in print; vendors differ, so name the one you quote."""

    including_both: int
    """DeepSeek-V2's 21B, DeepSeekMoE's 2.8B, Mixtral's 12.9B."""
    excluding_embedding: int
    """Those that multiply: the input embedding is looked up. V3's 36.7B, gpt-oss's 5.13B."""
    excluding_both: int
    """Moonlight's 2.24B, GLM-4.5's 32B."""


def active_parameters(config: ModelConfig, *, mtp: bool = False) -> ActiveParameters:
    parts = active(parameters(config, mtp=mtp), config)
    body = parts.total - parts.embedding - parts.head
    return ActiveParameters(including_both=parts.total, excluding_both=body,
                            excluding_embedding=body + config.vocab_size * config.dim)


def layer_flops(config: ModelConfig, layer: int, seq_len: int, *, causal: bool = True) -> float:
    """Forward FLOPs of one token in block `layer`: two per active parameter, and the attention core."""
    return 2 * active(layer_parameters(config, layer), config).total + attention_flops(config, seq_len, causal=causal)


def attention_flops(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Forward FLOPs of one token's scores and weighted values in one layer, averaged over `seq_len` positions.

    Causal counts the half of the score matrix that is used; ISCA Table 4 reports V3's MFU both ways.
    """
    whole = 2 * seq_len * config.n_heads * (config.qk_head_dim + v_head_dim(config))
    return whole / 2 if causal else whole


def head_flops(config: ModelConfig) -> float:
    """Forward FLOPs of one token in the final norm and the head."""
    return 2 * (config.dim + config.vocab_size * config.dim)


def mtp_flops(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Forward FLOPs of one token in all MTP modules, each with its pass through the shared head."""
    flops = 2 * active(mtp_parameters(config), config).total
    core, head = attention_flops(config, seq_len, causal=causal), 2 * config.vocab_size * config.dim
    return flops + config.n_mtp_layers * (core + head)


def forward_flops(config: ModelConfig, seq_len: int, *, causal: bool = True, mtp: bool = False) -> float:
    """FLOPs per token: 2 * (active - input embedding) + L * S * H * (d_qk + d_v), the last twice if not causal."""
    flops = head_flops(config)
    flops += sum(layer_flops(config, layer, seq_len, causal=causal) for layer in range(config.n_layers))
    return flops + mtp_flops(config, seq_len, causal=causal) if mtp else flops


def training_flops(config: ModelConfig, seq_len: int, *, causal: bool = True, mtp: bool = False) -> float:
    """Forward and backward FLOPs per token, recompute not counted (ISCA Table 2: 250e9 for V3, 155e9 for V2): each
    product of forward has two in backward, for its input and for its weight."""
    return 3 * forward_flops(config, seq_len, causal=causal, mtp=mtp)


def kv_bytes(config: ModelConfig, *, bytes_per_element: float = 2) -> float:
    """Cache bytes of one token over all layers (ISCA Table 1): MLA keeps a latent and one rotary key."""
    if config.attention is Attention.mla:
        elements = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        elements = 2 * config.n_kv_heads * config.head_dim
    return config.n_layers * elements * bytes_per_element


def forward_bytes(config: ModelConfig, tokens: int, *, bytes_per_element: float = 4, in_turn: bool = False) -> int:
    """Most that a forward of so many tokens holds at once beside weights, keys and values, masks and logits: the
    residual stream three times, an MTP module's inputs, rotary angles, and the widest part of a block. in_turn: an
    expert computes after the other, of which one may be every token's."""
    dim, wide = config.dim, 4 / bytes_per_element  # what is computed in fp32 whatever the rest is
    rotary = config.qk_rope_head_dim if config.attention is Attention.mla else config.head_dim
    around = 3 * dim + (5 * dim if config.n_mtp_layers else 0) + wide * rotary
    dense = 0 if config.is_moe(0) else 3 * config.inter_dim + dim
    experts = _experts_width(config, wide, in_turn) if config.n_routed_experts else 0
    return int(tokens * bytes_per_element * (around + max(4 * dim, _attention_width(config, wide), dense, experts)))


def _attention_width(config: ModelConfig, wide: float) -> float:
    """Elements of a token in an attention layer at its widest: GQA's where it norms and rotates, in fp32; MLA's over
    latents or, without a cache, over keys and values padded to one size."""
    heads, qk, v = config.n_heads, config.qk_head_dim, v_head_dim(config)
    if config.attention is not Attention.mla:
        return (2 * heads + 2 * wide * heads + 4 * config.n_kv_heads) * config.head_dim
    absorbed = 2 * qk + 3 * (config.kv_lora_rank + config.qk_rope_head_dim)
    return heads * (v + max(absorbed, 5 * qk + config.qk_nope_head_dim + v))


def _experts_width(config: ModelConfig, wide: float, in_turn: bool) -> float:
    """Elements of a token in a MoE layer at its widest: at the router, the shared experts, the routed ones, whose rows
    are `top_k` times the tokens, or where these are brought back."""
    dim, rows, inter = config.dim, config.n_activated_experts, config.moe_inter_dim
    shared = config.n_shared_experts * 3 * inter + dim
    kept = dim if config.n_shared_experts else 0
    one = dim + 3 * inter
    routed = kept + rows * dim + (rows * dim + one if in_turn else rows * one)
    combined = kept + 2 * rows * dim + dim
    places = 12 * wide * rows  # indices and weights of the rows
    return max(wide * (dim + 4 * config.n_routed_experts), places + max(rows * dim + shared, routed, combined))


def v_head_dim(config: ModelConfig) -> int:
    """Elements of a value head."""
    return config.v_head_dim if config.attention is Attention.mla else config.head_dim


def dense_equal_total(config: ModelConfig, *, multiple_of: int = 8) -> ModelConfig:
    """The dense twin with as many parameters: what this model would be, were every weight used on every token."""
    return _dense_twin(config, parameters(config).total, "dense_total", multiple_of)


def dense_equal_active(config: ModelConfig, *, multiple_of: int = 8) -> ModelConfig:
    """The dense twin with as many active parameters: the same FLOPs per token."""
    return _dense_twin(config, active(parameters(config), config).total, "dense_active", multiple_of)


def _dense_twin(config: ModelConfig, target: int, suffix: str, multiple_of: int) -> ModelConfig:
    """Same width, depth, attention and MTP depth, every block dense; `inter_dim` is what remains to be solved.

    Without MTP modules the twin meets `target` to within half a step, 1.5 * dim * n_layers * multiple_of
    parameters; eight keeps matrices aligned for tensor cores.
    """
    dense = dataclasses.replace(config, name=f"{config.name}_{suffix}", n_dense_layers=config.n_layers,
                                n_routed_experts=0, n_shared_experts=0, n_activated_experts=0, moe_inter_dim=0,
                                bias_update_speed=ModelConfig.bias_update_speed,
                                n_expert_groups=1, n_limited_groups=1, expert_bias=False, route_scale=1.0,
                                balance_loss_weight=0.0, inter_dim=0)
    step = 3 * config.dim * config.n_layers * multiple_of
    steps = round((target - parameters(dense).total) / step)
    if steps < 1:
        raise ValueError(f"model.name={config.name}: has too few parameters outside attention for a dense twin; "
                         f"lower multiple_of={multiple_of} or add experts")
    return dataclasses.replace(dense, inter_dim=steps * multiple_of)


def _attention_parameters(config: ModelConfig) -> int:
    """Of one layer; V3: 187,107,328."""
    dim, heads = config.dim, config.n_heads
    if config.attention is Attention.mla:
        queries = (config.q_lora_rank or dim) * heads * config.qk_head_dim
        key_values = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        return latent_parameters(config) + queries + key_values + heads * config.v_head_dim * dim
    q_out, kv_out = heads * config.head_dim, config.n_kv_heads * config.head_dim
    projections = dim * (2 * q_out + 2 * kv_out) + config.qkv_bias * (q_out + 2 * kv_out)
    norms = {QKNorm.none: 0, QKNorm.head: 2 * config.head_dim, QKNorm.full: q_out + kv_out}
    return projections + norms[config.qk_norm]
