"""Decoding: a model over slots of cached tokens, sampling, and speculation with the MTP module.

`Decoder` is what generation, scoring and serving stand on:

    decoder = Decoder(model, slots=8, capacity=1024)
    logits = decoder.prefill([0, 3], [prompt, other])       # [2, V]: of each row's next token
    logits = decoder.decode([0, 3], [token, token])         # rows join and leave from call to call
    decoder.free(0)

No text here: tokens in, tokens out. Shapes: B rows of a step, T tokens of its longest row, D dim, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy, and what is next to it; top_p keeps the fewest tokens with that share of probability
    (Holtzman et al. 2020)."""

    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-6

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [.., V] -> the distribution that is sampled from, fp32; greedy puts all on the best token."""
        logits = logits.float()
        if self.is_greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        p = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            p = torch.zeros_like(p).scatter_(-1, order, ordered)
            p = p / p.sum(-1, keepdim=True)
        return p


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
        """The slot's sequence is over."""
        self.cache.cut(slot, 0)
        if self.drafts is not None:
            self.drafts.cut(slot, 0)

    @torch.inference_mode()
    def read(self, slots: Sequence[int], rows: Sequence[Sequence[int]], *, drafts: bool = False) -> Tensor:
        """Append each row's tokens to its slot, in forwards of `chunk_tokens`; the normalised hidden state of its last
        token, [B, D]. drafts: the MTP module reads every token that the rows tell it."""
        last: list[Tensor | None] = [None] * len(rows)
        for parts in _chunks([len(row) for row in rows], chunk_tokens(self.rope[0].device)):
            hidden = self.hidden([slots[i] for i, _, _ in parts], [rows[i][start:stop] for i, start, stop in parts])
            for states, (i, start, stop) in zip(hidden, parts, strict=True):
                if stop == len(rows[i]):
                    last[i] = states[stop - start - 1].clone()
            told = [(slots[i], states[: stop - start], rows[i][start + 1 : stop + 1])
                    for states, (i, start, stop) in zip(hidden, parts, strict=True) if start + 1 < len(rows[i])]
            if drafts and told:
                self._drafted(*zip(*((slot, states[: len(row)], row) for slot, states, row in told), strict=True))
        return torch.stack(last)

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


@dataclass
class Counts:
    """What a batch did. `drafted` and `accepted` are of speculation."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0


class Batch:
    """Sequences that are continued together and join and leave at any step (continuous batching).

    `speculative` drafts one token a step with the first MTP module and checks it in the next forward: the same
    distribution (Leviathan et al. 2023), greedy the same tokens. The caller ends a row: `remove` it.
    """

    def __init__(self, decoder: Decoder, *, speculative: bool = False):
        assert not speculative or decoder.drafts is not None, "a model without MTP modules cannot draft"
        self.decoder, self.speculative, self.counts = decoder, speculative, Counts()
        self.rows: dict[int, _Row] = {}

    def add(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling],
            seeds: Sequence[int]) -> None:
        """Read prompts of one token or more into free slots. A row's tokens depend on its own seed alone (but for the
        last bits of a batched product)."""
        hidden = self.decoder.read(slots, prompts, drafts=self.speculative)
        self.counts.steps += 1
        for slot, states, sampling, seed in zip(slots, hidden.split(1), samplings, seeds, strict=True):
            row = _Row(slot, sampling, torch.Generator().manual_seed(seed))
            row.states, row.fresh = states, []
            row.logits = self.decoder.head(row.states)
            self.rows[slot] = row

    def step(self) -> list[tuple[int, int]]:
        """(slot, token) of what is found next: one token of each row, or two where a draft was accepted."""
        going = [row for row in self.rows.values() if row.logits is None]
        if going:
            self._advance(going)
        found = [(slot, token) for slot, row in self.rows.items()
                 for token in row.settle(self.decoder.cache, self.counts)]
        self.counts.tokens += len(found)
        return found

    def remove(self, slot: int) -> None:
        """The row is over, its slot free."""
        del self.rows[slot]
        self.decoder.free(slot)

    def _advance(self, rows: list["_Row"]) -> None:
        """One forward of the model for all rows, after one of the MTP module where tokens are drafted."""
        decoder, slots = self.decoder, [row.slot for row in rows]
        new = [[row.fresh[-1]] for row in rows]
        if self.speculative:
            logits = decoder.draft(slots, [row.states for row in rows], [row.fresh for row in rows]).cpu()
            for row, tokens, scores in zip(rows, new, logits, strict=True):
                # A row at the end of its slot has no room for a draft.
                if decoder.cache.lengths[row.slot] + 2 <= decoder.cache.capacity:
                    q = row.sampling.probabilities(scores)
                    row.proposed = (row.draw(q), q)
                    tokens.append(row.proposed[0])
        hidden = decoder.hidden(slots, new)
        logits = decoder.head(hidden)
        self.counts.steps += 1
        for row, tokens, states, scores in zip(rows, new, hidden, logits, strict=True):
            row.states, row.logits, row.fresh = states[: len(tokens)], scores[: len(tokens)], []


class _Row:
    """One sequence between steps. `logits`: of the tokens to settle next; `fresh`: settled tokens that the MTP module
    has not read, with the states before them in `states`; `proposed`: the draft under test and its distribution."""

    def __init__(self, slot: int, sampling: Sampling, generator: torch.Generator):
        self.slot, self.sampling, self.generator = slot, sampling, generator
        self.proposed: tuple[int, Tensor] | None = None

    def draw(self, p: Tensor) -> int:
        return int(p.argmax() if self.sampling.is_greedy else torch.multinomial(p, 1, generator=self.generator))

    def settle(self, cache: Cache, counts: Counts) -> list[int]:
        """The tokens that this step's logits [1 or 2, V] decide; a rejected draft is forgotten."""
        p, tokens = self.sampling.probabilities(self.logits.cpu()), []
        self.logits = None
        if self.proposed is not None:
            (token, q), self.proposed = self.proposed, None
            counts.drafted += 1
            if torch.rand((), generator=self.generator) * q[token] < p[0, token]:
                counts.accepted += 1
                tokens.append(token)
                p = p[1:]
            else:
                self.states = self.states[:-1]
                cache.cut(self.slot, cache.lengths[self.slot] - 1)
                left = (p[:1] - q).clamp(min=0)
                p = left if left.any() else p[:1]  # which differ by rounding alone
        tokens.append(self.draw(p[0]))
        self.fresh += tokens
        return tokens


def generate(decoder: Decoder, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling = Sampling(),
             seed: int = 0, speculative: bool = False, stops: Callable[[int, int], bool] = lambda row, token: False,
             counts: Counts | None = None) -> Iterator[tuple[int, int]]:
    """Yield (row, token) as they are found, up to `max_tokens` of a row or a token for which `stops(row, token)`.

    More prompts than the decoder has slots wait for one. Row i is seeded by (seed, i). `counts` is filled on the way.
    """
    if max_tokens < 1:
        return
    batch = Batch(decoder, speculative=speculative)
    batch.counts = counts if counts is not None else batch.counts
    waiting, free, rows = list(range(len(prompts)))[::-1], list(range(len(decoder.cache.lengths)))[::-1], {}
    lengths = [0] * len(prompts)
    while waiting or rows:
        joining = {free.pop(): waiting.pop() for _ in range(min(len(free), len(waiting)))}
        if joining:
            batch.add(list(joining), [prompts[row] for row in joining.values()], [sampling] * len(joining),
                      [seed * 1_000_003 + row for row in joining.values()])
            rows |= joining
        for slot, token in batch.step():
            if slot not in rows:  # what was accepted behind the row's last token
                batch.counts.tokens -= 1
                continue
            row = rows[slot]
            lengths[row] += 1
            yield row, token
            if lengths[row] == max_tokens or stops(row, token):
                batch.remove(slot)
                free.append(slot)
                del rows[slot]


def _chunks(lengths: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Parts (row, start, stop) of rows of such lengths, all of them once and in order, to be read together: as many
    tokens at once as `most`, padding included."""
    left = [(row, 0) for row in range(len(lengths))]
    while left:
        width = max(1, most // len(left[:most]))
        parts = [(row, start, min(start + width, lengths[row])) for row, start in left[:most]]
        yield parts
        left = [(row, stop) for row, _, stop in parts if stop < lengths[row]] + left[most:]
