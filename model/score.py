"""How likely a model finds given tokens: log-probabilities of rows, and of long texts in strided windows. No text here.

Shapes: B rows of a batch, S tokens of its longest row, N scored tokens, D dim.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import rope_table
from model.decode import padded
from model.transformer import Transformer

BATCH_TOKENS = 8192
GROUP_TOKENS = 1 << 16
"""Of texts' windows that are laid out at a time: they overlap, and may be many times the text."""
HEAD_ELEMENTS = 1 << 22
"""Most logits at a time, in three copies, on a CPU."""


def head_elements(device: torch.device) -> int:
    return HEAD_ELEMENTS if device.type == "cpu" else 4 * HEAD_ELEMENTS


class Score(NamedTuple):
    """Of the scored tokens of one row, [N] each: log-probability (nats), and whether it is the likeliest token."""

    log_prob: Tensor
    is_best: Tensor


@torch.inference_mode()
def score(model: Transformer, rows: Sequence[Sequence[int]], firsts: Sequence[int], *,
          batch_tokens: int = BATCH_TOKENS) -> list[Score]:
    """Tokens of each row from index `first` (at least 1) on, given all before them. Rows of like length go together,
    `batch_tokens` at a time, padding included, or one row."""
    model.eval()
    found: list[Score | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        size = max(1, batch_tokens // len(rows[order[-1]]))
        batch, order = order[-size:], order[:-size]
        hidden = _hidden(model, [rows[i] for i in batch])
        for states, i in zip(hidden, batch, strict=True):
            targets = torch.tensor(rows[i][firsts[i] :], device=states.device)
            states = states[firsts[i] - 1 : len(rows[i]) - 1]
            step = max(1, head_elements(states.device) // model.config.vocab_size)
            parts = [_score(model, *part) for part in zip(states.split(step), targets.split(step), strict=True)]
            found[i] = Score(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return found


def score_texts(model: Transformer, texts: Iterable[Sequence[int]], *, first: int = 1, window: int, stride: int,
                batch_tokens: int = BATCH_TOKENS) -> Iterator[Score]:
    """Of each text, of any length, every token from index `first` (at least 1) on once, with at least `window - stride`
    tokens of context where there are so many. Windows of several texts are read together."""
    def scored() -> Iterator[tuple[int, Score]]:
        for group in _grouped(_rows(texts, window, stride)):
            numbers, rows, firsts = zip(*group, strict=True)
            yield from zip(numbers, score(model, rows, firsts, batch_tokens=batch_tokens), strict=True)

    for _, parts in itertools.groupby(scored(), key=lambda part: part[0]):
        yield Score(*(torch.cat(tensors)[first - 1 :] for tensors in zip(*(found for _, found in parts), strict=True)))


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of the spans that score tokens 1 to length - 1 of a text once each. A span reads
    `window` tokens to predict its last; spans after the first score `stride` tokens, the last one what is left."""
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride}: must lie between 1 and window={window}; use {max(1, window // 2)}")
    scored = 1
    while scored < length:
        stop = min(length, window + 1 if scored == 1 else scored + stride)
        yield max(0, stop - window - 1), stop, scored
        scored = stop


def _rows(texts: Iterable[Sequence[int]], window: int, stride: int) -> Iterator[tuple[int, Sequence[int], int]]:
    """(text's number, tokens, first scored) of all windows; a text that has none is a row of which none is scored."""
    for number, text in enumerate(texts):
        for start, stop, first in windows(len(text), window, stride) if len(text) > 1 else [(0, 1, 1)]:
            yield number, text[start:stop], first - start


def _grouped(rows: Iterator[tuple[int, Sequence[int], int]]) -> Iterator[list[tuple[int, Sequence[int], int]]]:
    """In their order, as many as have GROUP_TOKENS."""
    group, size = [], 0
    for row in rows:
        if group and size + len(row[1]) > GROUP_TOKENS:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row[1])
    if group:
        yield group


def _hidden(model: Transformer, rows: Sequence[Sequence[int]]) -> Tensor:
    """Normalised hidden states [B, S, D]; what pads shorter rows comes after them and is seen by none of theirs."""
    tokens = padded(rows).to(model.tok_embeddings.weight.device)
    x, rope = model.embed(tokens), rope_table(model.config, tokens.shape[1], tokens.device)
    for block in model.layers.values():
        x = block(x, rope)
    return model.norm(x)


def _score(model: Transformer, states: Tensor, targets: Tensor) -> Score:
    logits = model.head(states).float()
    return Score(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu(), (logits.argmax(-1) == targets).cpu())
