"""What a model says next: sampling, sequences that are continued together, and speculation with the MTP module.

    decoder = Decoder(model, slots=8, capacity=1024)
    for row, token in generate(decoder, [prompt, other], max_tokens=200):
        ...

No text here: tokens in, tokens out. `Batch` is what serving stands on. V is the vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import Cache
from model.decode import Decoder

NUCLEUS = 2048
"""Likeliest tokens among which `top_p` is looked for first: a tenth of the time of sorting a vocabulary."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy, and what is next to it; top_p keeps the fewest tokens with that share of probability
    (Holtzman et al. 2020). tops: each token's log probability is told, and so many of the likeliest; None: neither."""

    temperature: float = 0.0
    top_p: float = 1.0
    tops: int | None = None

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
            ordered, order = p.topk(min(NUCLEUS, p.shape[-1]))
            if (ordered.sum(-1) < self.top_p).any():
                ordered, order = p.sort(dim=-1, descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            p = torch.zeros_like(p).scatter_(-1, order, ordered)
            p = p / p.sum(-1, keepdim=True)
        return p


@dataclass(frozen=True)
class Odds:
    """Of one token and of the likeliest in its place: log probabilities by the model itself, at temperature 1."""

    token: int
    logprob: float
    tops: list[tuple[int, float]]


@dataclass
class Counts:
    """What a batch did. steps: forwards; `cached_tokens` of the prompts' were held by a slot; `drafted` and `accepted`
    are of speculation."""

    tokens: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class _Prompt:
    """What is left of one to read, and the rows that begin with it. It is read into the first one's slot."""

    left: Sequence[int]
    rows: list["_Row"]


class Batch:
    """Sequences that are continued together and join and leave at any step (continuous batching).

        slots = batch.add([prompt, other], samplings, seeds)
        batch.read()                        # one forward of the prompts that are not read yet, if any
        batch.step()                        # the next token of each of the others: [(slot, token), ...]
        batch.remove(slots[0])

    `speculative` drafts one token a step with the first MTP module and checks it in the next forward: the same
    distribution (Leviathan et al. 2023), greedy the same tokens. A slot holds its tokens beyond the sequence's end,
    until it is taken again: a prompt that begins like what any slot holds is read from where they part.
    """

    def __init__(self, decoder: Decoder, *, speculative: bool = False):
        assert not speculative or decoder.drafts is not None, "a model without MTP modules cannot draft"
        self.decoder, self.speculative, self.counts = decoder, speculative, Counts()
        self.rows: dict[int, _Row] = {}
        self.reading: list[_Prompt] = []
        self.is_oldests_turn = True
        self.free = list(range(len(decoder.cache.lengths)))
        """Slots that no row has, the longest free first."""
        self.held: list[Sequence[int]] = [[] for _ in self.free]
        """Tokens of each slot, the last of which its cache may not have yet."""

    def add(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], seeds: Sequence[int]) -> list[int]:
        """Take a free slot for each prompt of one token or more. A row's tokens depend on its own seed alone (but for
        the last bits of a batched product); rows of one prompt read it once."""
        slots, same = [], {}
        for prompt, sampling, seed in zip(prompts, samplings, seeds, strict=True):
            key = tuple(prompt)
            if key in same:
                slot = self.free.pop(0)
            else:
                slot, kept = self._begin(prompt)
                same[key] = _Prompt(prompt[kept:], [])
                self.counts.prompt_tokens += kept
                self.counts.cached_tokens += kept
            self.held[slot] = list(prompt)
            same[key].rows.append(_Row(slot, self.held[slot], sampling, torch.Generator().manual_seed(seed)))
            slots.append(slot)
        self.reading += same.values()
        return slots

    def _begin(self, prompt: Sequence[int]) -> tuple[int, int]:
        """A free slot that holds all but the last token of what the prompt shares with any slot, and how many these
        are: the MTP module, too, knows what came after each of them."""
        caches = [self.decoder.cache, *([self.decoder.drafts] if self.speculative else [])]
        shared = [max(0, min(_alike(prompt, held) - 1, *(cache.lengths[slot] for cache in caches)))
                  for slot, held in enumerate(self.held)]
        kept = max(shared)
        source = shared.index(kept) if kept else self.free[0]
        slot = source if source in self.free else self.free[0]
        self.free.remove(slot)
        self.decoder.keep(source, slot, kept)
        return slot, kept

    def read(self) -> None:
        """One forward of prompts: in turns the shortest and the oldest first, so that none waits for all others."""
        self.is_oldests_turn = not self.is_oldests_turn
        least = len(self.reading[0].left) if self.is_oldests_turn else 0
        prompts = [prompt for prompt in self.reading if len(prompt.left) >= least]
        found = self.decoder.read_on([prompt.rows[0].slot for prompt in prompts], [prompt.left for prompt in prompts],
                                     drafts=self.speculative)
        self.counts.steps += 1
        for i, number, state in found:
            prompt = prompts[i]
            prompt.left = prompt.left[number:]
            self.counts.prompt_tokens += number
            if not prompt.left:
                self._start(prompt.rows, state[None])
        self.reading = [prompt for prompt in self.reading if prompt.left]

    def _start(self, rows: list["_Row"], states: Tensor) -> None:
        """Rows whose prompt is in the slot of the first, the state after it in `states` [1, D]."""
        first, logits = rows[0].slot, self.decoder.head(states).cpu()
        for row in rows:
            if row.slot != first:
                self.decoder.keep(first, row.slot, self.decoder.cache.capacity)
            row.states, row.logits = states, logits
            self.rows[row.slot] = row

    def step(self) -> list[tuple[int, int]]:
        """(slot, token) of what is found next: one token of each row, or two where a draft was accepted."""
        going = [self.rows[slot] for slot in sorted(self.rows) if self.rows[slot].logits is None]
        if going:
            self._advance(going)
        found = [(slot, token) for slot, row in self.rows.items()
                 for token in row.settle(self.decoder.cache, self.counts)]
        self.counts.tokens += len(found)
        return found

    def odds(self, slot: int) -> Odds | None:
        """Of the row's oldest token that nobody has asked this of, if its sampling tells any."""
        return self.rows[slot].odds.popleft() if self.rows[slot].odds else None

    def remove(self, slot: int, *, forget: bool = False) -> None:
        """The row is over, its slot free. forget: nothing of it may be used again, as after an error."""
        if self.rows.pop(slot, None) is None:
            prompt = next(one for one in self.reading if any(row.slot == slot for row in one.rows))
            prompt.rows = [row for row in prompt.rows if row.slot != slot]
            if not prompt.rows:
                self.reading.remove(prompt)
            elif not forget:
                self.decoder.keep(slot, prompt.rows[0].slot, self.decoder.cache.capacity)
        if forget:
            self.held[slot] = []
            self.decoder.free(slot)
        self.free.append(slot)

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
        logits = decoder.head(hidden).cpu()
        self.counts.steps += 1
        for row, tokens, states, scores in zip(rows, new, hidden, logits, strict=True):
            row.states, row.logits, row.fresh = states[: len(tokens)], scores[: len(tokens)], []


class _Row:
    """One sequence between steps. `tokens`: all of it; `logits`: of the tokens to settle next, in the CPU's memory;
    `fresh`: settled tokens that the MTP module has not read, with the states before them in `states`; `proposed`: the
    draft under test and its distribution."""

    def __init__(self, slot: int, tokens: list[int], sampling: Sampling, generator: torch.Generator):
        self.slot, self.tokens, self.sampling, self.generator = slot, tokens, sampling, generator
        self.fresh: list[int] = []
        self.odds: deque[Odds] = deque()
        """Of settled tokens, where they are asked for, until somebody takes them."""
        self.proposed: tuple[int, Tensor] | None = None

    def draw(self, p: Tensor) -> int:
        return int(p.argmax() if self.sampling.is_greedy else torch.multinomial(p, 1, generator=self.generator))

    def settle(self, cache: Cache, counts: Counts) -> list[int]:
        """The tokens that this step's logits [1 or 2, V] decide; a rejected draft is forgotten."""
        p, tokens, logits = self.sampling.probabilities(self.logits), [], self.logits
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
        self.tokens += tokens
        if self.sampling.tops is not None:
            self.odds += map(self._odds, tokens, logits)
        return tokens

    def _odds(self, token: int, logits: Tensor) -> Odds:
        """logits: [V]"""
        scores = logits.float().log_softmax(-1)
        values, ids = scores.topk(min(self.sampling.tops, len(scores)))
        return Odds(token, scores[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


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
    waiting, rows, lengths = list(range(len(prompts)))[::-1], {}, [0] * len(prompts)
    while waiting or rows:
        joining = [waiting.pop() for _ in range(min(len(batch.free), len(waiting)))]
        slots = batch.add([prompts[row] for row in joining], [sampling] * len(joining),
                          [seed * 1_000_003 + row for row in joining])
        rows |= zip(slots, joining, strict=True)
        if batch.reading:
            batch.read()
        for slot, token in batch.step():
            if slot not in rows:  # what was accepted behind the row's last token
                batch.counts.tokens -= 1
                continue
            row = rows[slot]
            lengths[row] += 1
            yield row, token
            if lengths[row] == max_tokens or stops(row, token):
                batch.remove(slot)
                del rows[slot]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
