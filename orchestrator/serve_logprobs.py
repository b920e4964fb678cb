"""Log probabilities of an answer's tokens in the forms of OpenAI's API: of completions, of chat."""

from collections.abc import Sequence
from dataclasses import dataclass

from model.generate import Odds
from orchestrator.train.tokenizer import REPLACED, Tokenizer


@dataclass(frozen=True)
class Told:
    """A token's odds as texts. Bytes that are no character by themselves are told as U+FFFD."""

    text: str
    logprob: float
    tops: list[tuple[str, float]]


def in_words(tokenizer: Tokenizer, odds: Odds, before: Sequence[int]) -> Told:
    """before: the token before it, if any, since a word's first token has a blank behind another word only."""
    def text(token: int) -> str:
        read = tokenizer.stream(before)
        return read(token) + read(None)

    return Told(text(odds.token), odds.logprob, [(text(token), logprob) for token, logprob in odds.tops])


def of_chat(tokens: Sequence[Told]) -> dict:
    return {"content": [_entry(one.text, one.logprob) | {"top_logprobs": [_entry(*top) for top in one.tops]}
                        for one in tokens], "refusal": None}


def of_completion(tokens: Sequence[Told], begin: int) -> dict:
    """begin: characters of the answer before these tokens. Of tokens with one text the likeliest is told."""
    offsets = [begin + sum(len(one.text) for one in tokens[:i]) for i in range(len(tokens))]
    return {"tokens": [one.text for one in tokens], "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [dict(reversed(one.tops)) for one in tokens], "text_offset": offsets}


def _entry(text: str, logprob: float) -> dict:
    return {"token": text, "logprob": logprob, "bytes": None if REPLACED in text else list(text.encode())}
