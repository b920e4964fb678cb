"""The language model, whole or one pipeline stage of it, with the same parameter names either way.

Shapes: B sequences, S tokens, D dim, V vocabulary, M multi-token-prediction depths.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import RMSNorm, build_attention, rope_table
from model.cache import LayerCache
from model.config import ModelConfig
from model.moe import FeedForward, GroupedExperts, MoE, Router
from model.ops import autocast_dtype, linear_cross_entropy
from model.recompute import again, made_again

READ_A_NORM = ("wq_a", "wq", "wkv_a", "wk", "wv", "w13")
"""Linear layers of a block whose input is a norm's output."""


class Block(nn.Module):
    """Pre-norm attention and feed-forward, dense or routed, each added to its input."""

    keeps_less = False
    """The norms' outputs and attention up to its core are computed again in backward (`model.recompute`)."""

    def __init__(self, config: ModelConfig, layer: int, num_local_experts: int | None = None):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        if config.is_moe(layer):
            self.moe = MoE(config, num_local_experts)
        else:
            self.ffn = FeedForward(config.dim, config.inter_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        feed_forward = self.moe if hasattr(self, "moe") else self.ffn
        if self.keeps_less and self.training and cache is None:
            projected = made_again(self.attention_norm, x, self.attention.project)
            x = x + self.attention.wo(again(self.attention.attend, *projected, rope, but_cores=True))
            return x + made_again(self.ffn_norm, x, feed_forward)
        x = x + self.attention(self.attention_norm(x), rope, cache)
        return x + feed_forward(self.ffn_norm(x))


class MTPModule(nn.Module):
    """One depth of multi-token prediction (V3 report section 2.2, eq. 21-23); embedding and head are the model's.

    As released weights expect it, depth 1 reads the main model's output after its final norm, and each later
    depth reads the block output of the one before.
    """

    def __init__(self, config: ModelConfig, layer: int, num_local_experts: int | None = None):
        super().__init__()
        self.hidden_norm = RMSNorm(config.dim, config.norm_eps)
        self.embed_norm = RMSNorm(config.dim, config.norm_eps)
        self.proj = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.block = Block(config, layer, num_local_experts)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, hidden: Tensor, tokens: Tensor, embed: nn.Module | None, rope: tuple[Tensor, Tensor],
                cache: LayerCache | None = None) -> Tensor:
        """hidden [B, S, D] of positions i, ids [B, S] of tokens i + depth -> hidden of this depth.

        embed: the model's embedding where it is at hand, else this module's own copy serves.
        """
        embedded = (embed or self.tok_embeddings)(tokens)
        joined = torch.cat([self.hidden_norm(hidden), self.embed_norm(embedded.to(hidden.dtype))], dim=-1)
        return self.block(self.proj(joined), rope, cache)


class Transformer(nn.Module):
    """Blocks `layers` of the model; the first stage also embeds, the last also predicts.

    The last stage of several holds copies of the embedding, one for each place that needs it (MTP module, tied
    head): torch's split backward takes a parameter only once along a path of the graph. `parallel/shard.py` keeps
    them equal by summing their gradients.
    """

    def __init__(self, config: ModelConfig, *, layers: range | None = None, num_local_experts: int | None = None):
        super().__init__()
        layers = range(config.n_layers) if layers is None else layers
        self.config = config
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.n_layers
        self.recompute = self.keeps_less = False
        whole = self.is_first and self.is_last
        if self.is_first:
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): Block(config, i, num_local_experts) for i in layers})
        if self.is_last:
            self.norm = RMSNorm(config.dim, config.norm_eps)
            if not (config.tie_embeddings and whole):
                self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
            if config.n_mtp_layers:
                self.mtp = nn.ModuleDict({str(k): MTPModule(config, config.n_layers + k, num_local_experts)
                                          for k in range(config.n_mtp_layers)})
                for module in self.mtp.values() if not whole else ():
                    module.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """One stage on one microbatch.

        x: token ids [B, S] (or [B, S + 1 + M] with `tokens`) on the first stage, else hidden states [B, S, D].
        tokens [B, S + 1 + M]: ids with the look-ahead that targets need; then the last stage returns the
        cross-entropies of the main head and of each MTP depth, summed over tokens, [1, 1 + M], in evaluation
        followed by the accepted guesses of each depth (`_accepted`), [1, 1 + 2M]; else logits.
        """
        if self.is_first:
            x = self.embed(x if tokens is None else x[:, : self._seq_len(tokens)])
        rope = rope_table(self.config, x.shape[1], x.device)
        for block in self.layers.values():
            x = self._run(block, x, rope)
        if not self.is_last:
            return x
        x = self.norm(x)
        return self.head(x) if tokens is None else self._losses(x, tokens, rope)

    def embed(self, tokens: Tensor) -> Tensor:
        """ids -> the residual stream, in the dtype of products from here on."""
        x = self.tok_embeddings(tokens)
        return x.to(autocast_dtype(x))

    def head(self, x: Tensor) -> Tensor:
        """Normalised hidden states [.., D] -> logits [.., V]."""
        weight = self._head_weight
        return F.linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype))

    @property
    def _head_weight(self) -> nn.Parameter:
        return self.lm_head.weight if hasattr(self, "lm_head") else self.tok_embeddings.weight

    def _losses(self, x: Tensor, tokens: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        seq_len, guesses = self._seq_len(tokens), []
        losses = [self._loss(x, tokens[:, 1 : 1 + seq_len], guesses)]
        for k in range(self.config.n_mtp_layers):
            module = self.mtp[str(k)]
            x = self._run(module, x, tokens[:, 1 + k : 1 + k + seq_len], getattr(self, "tok_embeddings", None), rope)
            losses.append(self._loss(module.norm(x), tokens[:, 2 + k : 2 + k + seq_len], guesses))
        accepted = [_accepted(guess, guesses[0], depth=k) for k, guess in enumerate(guesses) if k]
        return torch.stack(losses + accepted, dim=-1)

    def _loss(self, x: Tensor, targets: Tensor, guesses: list[Tensor]) -> Tensor:
        """Normalised hidden states [B, S, D] -> cross-entropy summed over tokens, [1]. In evaluation the greedy tokens
        [B, S] are added to `guesses`."""
        if self.training:
            return linear_cross_entropy(x.flatten(0, 1), self._head_weight, targets.flatten(),
                                        again=self.recompute or self.keeps_less)
        logits = self.head(x)
        guesses.append(logits.argmax(-1))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").reshape(1)

    def keep_less(self) -> None:
        """Selective recompute, of every block, MTP's too, and of logits."""
        for name, module in self.named_modules():
            if isinstance(module, Transformer | Block | FeedForward | GroupedExperts):
                module.keeps_less = True
            if name.rpartition(".")[2] in READ_A_NORM:
                module.keeps_input = True

    def _run(self, module: nn.Module, *inputs) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False,
                              context_fn=lambda: (contextlib.nullcontext(), _not_counting(module)))
        return module(*inputs)

    def _seq_len(self, tokens: Tensor) -> int:
        return tokens.shape[1] - 1 - self.config.n_mtp_layers


def _accepted(guesses: Tensor, greedy: Tensor, *, depth: int) -> Tensor:
    """How many of B * (S - depth) guesses of a depth are the main model's own greedy token for the same place, [1].

    Depth d at position i guesses token i + 1 + d, which the main model predicts at position i + d: what speculative
    decoding would accept after this text (V3 report section 5.4.3 calls the share the acceptance rate).
    """
    return (guesses[:, :-depth] == greedy[:, depth:]).sum().float().reshape(1)


def routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Every router with its layer's name (`layers.3`, `mtp.0`), in model order."""
    for name, module in model.named_modules():
        if isinstance(module, Router):
            yield name.removesuffix(".moe.router").removesuffix(".block"), module


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """Every mixture-of-experts layer with the prefix of its parameter names."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            yield name, module


@contextlib.contextmanager
def _not_counting(module: nn.Module) -> Iterator[None]:
    """A second forward, for recompute, must not count a router's choices again."""
    found = [router for _, router in routers(module)]
    for router in found:
        router.counting = False
    try:
        yield
    finally:
        for router in found:
            router.counting = True
