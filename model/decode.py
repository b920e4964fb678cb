"""Decoding: a model over slots of cached tokens.

    decoder = Decoder(model, slots=8, capacity=1024)
    logits = decoder.prefill([0, 3], [prompt, other])       # [2, V]: of each row's next token
    logits = decoder.decode([0, 3], [token, token])         # rows join and leave from call to call
    decoder.free(0)

No text here, and no choice: tokens in, logits out. Shapes: B rows of a step, T tokens of its longest row, D dim, V
vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.attention import rope_table
from model.cache import Cache
from model.transformer import Transformer

CHUNK_TOKENS = 512
"""Of prompts, read in one forward, padding included, by a CPU: its activations are part of what a limited memory holds.
A GPU has room for more, and wants it."""


def chunk_tokens(device: torch.device) -> int:
    return CHUNK_TOKENS if device.type == "cpu" else 16 * CHUNK_TOKENS


class Decoder:
    """Runs a whole model on `slots` sequences of at most `capacity` tokens each. Puts it into eval mode."""

    def __init__(self, model: Transformer, *, slots: int, capacity: int):
        weight = model.tok_embeddings.weight
        like = {"slots": slots, "capacity": capacity, "device": weight.device, "dtype": weight.dtype}
        self.model, self.config = model.eval(), model.config
        self.cache = Cache(model.config, n_layers=model.config.n_layers, **like)
        self.drafts = Cache(model.config, n_layers=1, **like) if model.config.n_mtp_layers else None
        self.rope = rope_table(model.config, capacity, weight.device)

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each slot; logits [B, V] after the last of each row."""
        return self.head(self.read(slots, prompts))

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One more token of each slot; logits [B, V] of the next."""
        return self.prefill(slots, [[token] for token in tokens])

    def wait(self) -> None:
        """Until a GPU, which computes behind the program's back, has done what it was told: for clocks."""
        if self.rope[0].is_cuda:
            torch.cuda.synchronize(self.rope[0].device)

    def free(self, slot: int) -> None:
        """The slot's sequence is over, and nothing of it is left."""
        self.keep(slot, slot, 0)

    def keep(self, source: int, slot: int, length: int) -> None:
        """A slot begins with what `source`, itself or another one, holds of its first `length` tokens."""
        for cache in (self.cache, self.drafts) if self.drafts is not None else (self.cache,):
            some = min(length, cache.lengths[source])
            cache.clear(slot, some) if slot == source else cache.copy(source, slot, some)

    def read(self, slots: Sequence[int], rows: Sequence[Sequence[int]], *, drafts: bool = False) -> Tensor:
        """Append each row's tokens to its slot, in forwards of `chunk_tokens`; the normalised hidden state of its last
        token, [B, D]. drafts: the MTP module reads every token that the rows tell it."""
        last, left = [None] * len(rows), list(rows)
        while any(left):
            for i, number, state in self.read_on(slots, left, drafts=drafts):
                last[i], left[i] = state, left[i][number:]
        return torch.stack(last)

    @torch.inference_mode()
    def read_on(self, slots: Sequence[int], rows: Sequence[Sequence[int]], *,
                drafts: bool = False) -> list[tuple[int, int, Tensor]]:
        """One forward of `read`: which rows it read, how many of their tokens, and the state [D] after these."""
        parts = _next_parts([len(row) for row in rows], chunk_tokens(self.rope[0].device))
        hidden = self.hidden([slots[i] for i, _ in parts], [rows[i][:number] for i, number in parts])
        told = [(slots[i], states[: len(row)], row) for (i, number), states in zip(parts, hidden, strict=True)
                if (row := rows[i][1 : number + 1])]
        if drafts and told:
            self._drafted(*zip(*told, strict=True))
        return [(i, number, states[number - 1].clone()) for (i, number), states in zip(parts, hidden, strict=True)]

    @torch.inference_mode()
    def hidden(self, slots: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
        """Append each row's tokens to its slot; normalised hidden states [B, T, D], padding after shorter rows."""
        positions, views = self.cache.step(slots, [len(row) for row in rows])
        rope = tuple(table[positions] for table in self.rope)
        x = self.model.embed(self._padded(rows))
        for block, view in zip(self.model.layers.values(), views, strict=True):
            x = block(x, rope, view)
        return self.model.norm(x)

    @torch.inference_mode()
    def draft(self, slots: Sequence[int], hidden: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] of the token after the last in `rows`, by the first MTP module (V3 report, section 2.3).

        hidden: for each row the states [T, D] of the positions before its tokens. The module keeps a cache of its own.
        """
        out = self._drafted(slots, hidden, rows)
        last = torch.tensor([len(row) for row in rows], device=out.device) - 1
        return self.head(out[torch.arange(len(rows), device=out.device), last])

    def _drafted(self, slots: Sequence[int], hidden: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
        """What the MTP module makes of them, before the head [B, T, D]."""
        positions, views = self.drafts.step(slots, [len(row) for row in rows])
        rope = tuple(table[positions] for table in self.rope)
        states = pad_sequence(list(hidden), batch_first=True)
        module = self.model.mtp["0"]
        return module.norm(module(states, self._padded(rows), self.model.tok_embeddings, rope, views[0]))

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return padded(rows).to(self.rope[0].device)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, S], zeros after the tokens of shorter rows."""
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)


def _next_parts(left: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(row, tokens) of rows with so many tokens left that a forward reads together: whole rows, the shortest first, of
    which none is padded to more than twice its length, `most` tokens in all, padding included; or a part of one."""
    order = sorted((row for row in range(len(left)) if left[row]), key=lambda row: left[row])
    together = 1
    while together < len(order):
        longest = left[order[together]]
        if longest > 2 * left[order[0]] or longest * (together + 1) > most:
            break
        together += 1
    return [(row, min(left[row], most)) for row in order[:together]]
