"""Attention: multi-head latent (MLA) and grouped-query (GQA), with rotary positions and their extension.

Shapes: B sequences, S tokens, D dim, H heads, R rotary elements of a head.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Attention, ModelConfig, QKNorm, RopeScaling
from model.ops import rms_norm

if TYPE_CHECKING:
    from model.cache import LayerCache

# Every released MLA model norms its latents with this, whatever its other norms use (Moonlight: 1e-5).
LATENT_NORM_EPS = 1e-6
MASK_ELEMENTS = 1 << 20
"""Most of a cached step's mask that a CPU's kernel takes at a time: 6 MiB as booleans and as the fp32 it makes of them.
"""


def mask_elements(device: torch.device) -> int:
    return MASK_ELEMENTS if device.type == "cpu" else 4 * MASK_ELEMENTS


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position of each rotating pair, [R/2], and the factor on cosine and sine.

    Context extension: pairs that turn more than `beta_fast` times in the original context keep their frequency, those
    that turn less than `beta_slow` times are interpolated by `rope_factor`, the rest lie on a ramp between, over
    the pairs in YaRN (Peng et al. 2023, eq. 23; V3 report section 4.3), over their turns in Llama 3.1 (its released
    code).
    """
    rotary = _rotary_dim(config)
    exponents = torch.arange(0, rotary, 2, dtype=torch.float32) / rotary
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_factor <= 1:
        return frequencies, 1.0
    ramp = _ramp(config, frequencies)
    frequencies = frequencies / config.rope_factor * ramp + frequencies * (1 - ramp)
    if config.rope_scaling is RopeScaling.llama3:
        return frequencies, 1.0
    if config.mscale_all_dim:
        return frequencies, _mscale(config.rope_factor, config.mscale) / _mscale(
            config.rope_factor, config.mscale_all_dim)
    return frequencies, _mscale(config.rope_factor, config.mscale)


def _ramp(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """How far each pair is interpolated, from 0 to 1, [R/2]."""
    if config.rope_scaling is RopeScaling.llama3:
        turns = config.original_seq_len * frequencies / (2 * math.pi)
        return ((config.beta_fast - turns) / (config.beta_fast - config.beta_slow)).clamp(0, 1)
    rotary = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        return rotary * math.log(config.original_seq_len / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.beta_slow)), rotary - 1)
    return ((torch.arange(rotary // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)


def rope_table(config: ModelConfig, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each [S, R/2], fp32."""
    frequencies, factor = rope_frequencies(config)
    frequencies = frequencies.to(device, non_blocking=True)  # else every forward waits for the one before on a GPU
    angles = torch.arange(seq_len, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate the pairs of the last axis of x [B, S, H, R] by cosines and sines [S, R/2], or [B, S, R/2] by row.

    In fp32, as in DeepSeek's code: a cosine in bf16 is off by up to 2^-9. Interleaved input pairs come out
    de-interleaved: queries and keys alike, so their products do not change.
    """
    cos, sin = (t.unsqueeze(-2) for t in rope)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class LatentAttention(nn.Module):
    """MLA (V3 report section 2.1.1, eq. 1-11): keys and values are expanded from one small latent per token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        nope, rope, heads = config.qk_nope_head_dim, config.qk_rope_head_dim, config.n_heads
        if config.q_lora_rank:
            self.wq_a = nn.Linear(config.dim, config.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.wq_b = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        else:
            self.wq = nn.Linear(config.dim, heads * (nope + rope), bias=False)
        self.wkv_a = nn.Linear(config.dim, config.kv_lora_rank + rope, bias=False)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.wkv_b = nn.Linear(config.kv_lora_rank, heads * (nope + config.v_head_dim), bias=False)
        self.wo = nn.Linear(heads * config.v_head_dim, config.dim, bias=False)
        self.scale = softmax_scale(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: "LayerCache | None" = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]. With a cache the S tokens come after those it holds (model/cache.py)."""
        q, kv = self.project(x)
        attend = self.attend if cache is None or cache.is_first else self._absorbed
        return self.wo(attend(q, kv, rope, cache))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> latent of the queries (or queries), latent of keys and values with the shared rotary key."""
        kv = self.wkv_a(x)
        return self.wq_a(x) if self.config.q_lora_rank else self.wq(x), kv

    def attend(self, q: Tensor, kv: Tensor, rope: tuple[Tensor, Tensor], cache: "LayerCache | None" = None) -> Tensor:
        """What `project` returns -> every head's output [B, S, H * v], of whole sequences, which a cache is told."""
        config = self.config
        q_nope, q_rope = self._queries(q)
        latent, k_rope = kv.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_norm(latent), rotate(k_rope[:, :, None], rope, config.rope_interleaved)
        if cache is not None:
            cache.write(torch.cat([latent, k_rope[:, :, 0]], dim=-1))
        k_nope, v = self.wkv_b(latent).unflatten(-1, (config.n_heads, -1)).split(
            [config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        q = torch.cat([q_nope, rotate(q_rope, rope, config.rope_interleaved)], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, -1, config.n_heads, -1).to(k_nope.dtype)], dim=-1)
        return _attend(q, k, v, self.scale)

    def _queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        q = self.wq_b(self.q_norm(q)) if config.q_lora_rank else q
        return q.unflatten(-1, (config.n_heads, -1)).split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)

    def _absorbed(self, q: Tensor, kv: Tensor, rope: tuple[Tensor, Tensor], cache: "LayerCache") -> Tensor:
        """Attention on the latents themselves (V2 report, section 2.1.2: W^UK goes into the query, W^UV behind).

        kept [B, L, kv_lora_rank + R] is key and, in its first part, value of every head; the mask is [B, S, L]. Heads
        are laid out as further queries of one head, so that nothing is expanded.
        """
        config = self.config
        heads, nope = config.n_heads, config.qk_nope_head_dim
        latent, k_rope = kv.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        k_rope = rotate(k_rope[:, :, None], rope, config.rope_interleaved)[:, :, 0]
        (kept,) = cache.append(torch.cat([self.kv_norm(latent), k_rope], dim=-1))
        q_nope, q_rope = self._queries(q)
        q_rope = rotate(q_rope, rope, config.rope_interleaved)

        def attend(q: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
            mask = mask[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2)
            out = F.scaled_dot_product_attention(q.flatten(1, 2)[:, None], kept[:, None], kept[:, None],
                                                 attn_mask=mask[:, None], scale=self.scale)
            return out[:, 0].unflatten(1, (-1, heads))

        up_k, up_v = self.wkv_b.weight.view(heads, nope + config.v_head_dim, -1).split([nope, config.v_head_dim], dim=1)
        q = torch.cat([torch.einsum("bshn,hnc->bshc", q_nope, up_k), q_rope], dim=-1)
        out = _in_blocks(attend, q, cache.mask, kept, rows=heads)[..., : config.kv_lora_rank]
        return torch.einsum("bshc,hvc->bshv", out, up_v).flatten(2)


class GroupedQueryAttention(nn.Module):
    """GQA (Ainslie et al. 2023) with optional query-key normalisation and projection biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, q_size, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, kv_size, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, kv_size, bias=config.qkv_bias)
        self.wo = nn.Linear(q_size, config.dim, bias=False)
        if config.qk_norm is not QKNorm.none:
            whole = config.qk_norm is QKNorm.full
            self.q_norm = RMSNorm(q_size if whole else config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(kv_size if whole else config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: "LayerCache | None" = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]. With a cache the S tokens come after those it holds (model/cache.py)."""
        projected = self.project(x)
        attend = self.attend if cache is None or cache.is_first else self._cached
        return self.wo(attend(*projected, rope, cache))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> queries, keys and values of all heads side by side."""
        k, v = self.wk(x), self.wv(x)
        return self.wq(x), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor],
               cache: "LayerCache | None" = None) -> Tensor:
        """What `project` returns -> every head's output [B, S, H * head_dim], of whole sequences, which a cache is
        told."""
        q, k, v = self._heads(q, k, v, rope)
        if cache is not None:
            cache.write(k, v)
        return _attend(q, k, v, self.config.head_dim**-0.5)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """By head, queries and keys normalised and rotated: [B, S, heads, head_dim] each."""
        config = self.config
        if config.qk_norm is QKNorm.full:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, config.head_dim)) for t in (q, k, v))
        if config.qk_norm is QKNorm.head:
            q, k = self.q_norm(q), self.k_norm(k)
        return self._rotate(q, rope), self._rotate(k, rope), v

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], cache: "LayerCache") -> Tensor:
        q, k, v = self._heads(q, k, v, rope)
        k, v = (t.transpose(1, 2) for t in cache.append(k, v))

        def attend(q: Tensor, mask: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None],
                                                 scale=self.config.head_dim**-0.5,
                                                 enable_gqa=q.shape[2] != k.shape[1])
            return out.transpose(1, 2)

        return _in_blocks(attend, q, cache.mask, k, v, rows=1).flatten(2)

    def _rotate(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        rotary = _rotary_dim(self.config)
        if rotary == x.shape[-1]:
            return rotate(x, rope, self.config.rope_interleaved)
        turning, still = x[..., :rotary], x[..., rotary:]
        return torch.cat([rotate(turning, rope, self.config.rope_interleaved), still], dim=-1)


def build_attention(config: ModelConfig) -> nn.Module:
    return LatentAttention(config) if config.attention is Attention.mla else GroupedQueryAttention(config)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(head size), times YaRN's squared attention factor where DeepSeek applies one."""
    scale = config.qk_head_dim**-0.5
    if config.rope_factor > 1 and config.rope_scaling is RopeScaling.yarn and config.mscale_all_dim:
        scale *= _mscale(config.rope_factor, config.mscale_all_dim) ** 2
    return scale


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of q [B, S, H, *] over k, v [B, S, KV, *] -> [B, S, H * v].

    The CPU's flash kernel wants keys and values of one size; zero columns cost less than its slow path. MLA's values
    are a part of one product, which would be kept whole for them.
    """
    size = v.shape[-1]
    padded = q.device.type == "cpu" and size < q.shape[-1]
    v = F.pad(v, (0, q.shape[-1] - size)) if padded else v.contiguous()
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                         scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return out[..., :size].transpose(1, 2).flatten(2)


def _in_blocks(attend: Callable[..., Tensor], q: Tensor, mask: Tensor, *kept: Tensor, rows: int) -> Tensor:
    """attend(q, mask, *kept) of queries [B, S, H, *], what each sees [B, S, L] and what is kept of the B sequences,
    block by block, so that the mask, of which the kernel takes `rows` rows a query and makes numbers, stays small
    however long the prompts and however many the sequences."""
    queries = max(1, mask_elements(q.device) // (rows * mask.shape[2]))
    if mask.shape[0] * mask.shape[1] <= queries:
        return attend(q, mask, *kept)
    sequences, out = min(queries, mask.shape[0]), torch.empty_like(q)
    for first in range(0, mask.shape[0], sequences):
        some = slice(first, first + sequences)
        for start in range(0, mask.shape[1], queries // sequences):
            block = some, slice(start, start + queries // sequences)
            out[block] = attend(q[block], mask[block], *(t[some] for t in kept))
    return out


def _rotary_dim(config: ModelConfig) -> int:
    if config.attention is Attention.mla:
        return config.qk_rope_head_dim
    return int(config.head_dim * config.rotary_fraction)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0
