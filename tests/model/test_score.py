"""Scores against transformers' loss, and strided windows against one forward per token."""

import pytest
import torch

from model.hf import export
from model.score import Score, score, score_texts, windows
from tests.model.test_generate import V3, build

TEXT = torch.randint(50, (33,), generator=torch.Generator().manual_seed(3)).tolist()


def test_rows_of_any_length_have_transformers_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, rows = build(V3), [TEXT, TEXT[5:9], TEXT[:20]]
    export(tmp_path / "hf", V3, model.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for row, found in zip(rows, score(model, rows, [1, 1, 1]), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([row]), labels=torch.tensor([row])).loss
        torch.testing.assert_close(-found.log_prob.mean(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("window, stride", [(8, 3), (8, 8), (64, 5)])
def test_each_token_is_scored_once_with_its_windows_context(window, stride):
    model, text = build(V3), [0, *TEXT]
    (found,) = score_texts(model, [text], window=window, stride=stride)
    assert len(found.log_prob) == len(TEXT)
    for i, (log_prob, is_best) in enumerate(zip(*found, strict=True), 1):
        start = next(start for start, stop, first in windows(len(text), window, stride) if first <= i < stop)
        assert i - start >= min(i, window - stride + 1)
        alone = model(torch.tensor([text[start:i]]))[0, -1].log_softmax(-1)
        torch.testing.assert_close(log_prob, alone[text[i]], atol=1e-4, rtol=1e-4)
        assert is_best == (alone.argmax() == text[i])


def test_a_text_without_tokens_has_no_scores():
    for found in score_texts(build(V3), [[0], [0, 1], [0, 2]], first=2, window=8, stride=4):
        assert found.log_prob.shape == found.is_best.shape == (0,) and found.is_best.dtype == torch.bool


def test_texts_are_read_together_and_scored_as_each_alone(monkeypatch):
    model, texts, sizes = build(V3), [[0, 1, *TEXT[:n]] for n in (5, 0, 33, 1, 20, 6)], []
    alone = [next(score_texts(model, [text], first=2, window=8, stride=3)) for text in texts]
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda tokens: sizes.append(tokens.numel()) or embed(tokens))
    for found, expected, text in zip(score_texts(model, iter(texts), first=2, window=8, stride=3, batch_tokens=60),
                                     alone, texts, strict=True):
        assert len(found.log_prob) == len(text) - 2 and torch.equal(found.is_best, expected.is_best)
        torch.testing.assert_close(found.log_prob, expected.log_prob, atol=1e-5, rtol=1e-5)
    assert max(sizes) <= 60 and len(sizes) <= 4


def test_the_windows_of_a_long_text_are_never_all_laid_out_at_once(monkeypatch):
    held = []

    def scored(model, rows, firsts, batch_tokens):
        held.append(sum(map(len, rows)))
        return [Score(*(torch.tensor(row[first:], dtype=torch.float32),) * 2)
                for row, first in zip(rows, firsts, strict=True)]

    monkeypatch.setattr("model.score.score", scored)
    text = list(range(3000))
    for found in score_texts(None, ([9, *text] for _ in range(2)), window=512, stride=1):
        assert found.log_prob.tolist() == text
    assert max(held) <= 1 << 16 and sum(held) > 1 << 21


def test_rows_are_read_so_many_tokens_at_a_time(monkeypatch):
    model, sizes = build(V3), []
    whole, embed = score(model, [TEXT] * 4, [1] * 4), model.embed
    monkeypatch.setattr(model, "embed", lambda tokens: sizes.append(tokens.numel()) or embed(tokens))
    for found, wanted in zip(score(model, [TEXT] * 4, [1] * 4, batch_tokens=70), whole, strict=True):
        torch.testing.assert_close(found.log_prob, wanted.log_prob, atol=1e-5, rtol=1e-5)
    assert sizes == [66, 66]
