"""Continuous batching in one thread: sequences join and leave the batch at any step. Knows nothing of HTTP.

    engine = Engine(loaded, slots=8, capacity=2048)
    engine.submit(Sequence(prompt, Sampling(), seed=0, max_tokens=64, tell=print))

`tell` is called from the engine's thread and must not block.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from model.decode import Decoder
from model.generate import Batch, Sampling
from orchestrator.inference import Loaded, TextStream
from orchestrator.plan.published import serving_cost
from orchestrator.serve_logprobs import Told, in_words


@dataclass(frozen=True)
class Piece:
    """News of a sequence: text that became certain, tokens so far, and at its end why it ended."""

    text: str
    tokens: int
    finish: str | None = None
    """`stop`, `length`, `timeout`, `cancelled` or `error`; None while it goes on."""
    error: str = ""
    odds: tuple[Told, ...] = ()
    """Of the tokens since the last piece, if they were asked for."""


@dataclass
class Sequence:
    """One sequence to be continued. prompt: token ids, one at least. deadline: of time.monotonic()."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    max_tokens: int
    tell: Callable[[Piece], None]
    stops: list[str] = field(default_factory=list)
    deadline: float = float("inf")
    cancelled: bool = False
    """Set by whoever no longer listens; the slot is free within a step."""
    tokens: int = 0
    stream: TextStream | None = None
    last: int | None = None
    """The newest token."""
    odds: list[Told] = field(default_factory=list)
    """Of tokens whose text was not told yet."""

    def told(self) -> tuple[Told, ...]:
        odds, self.odds = tuple(self.odds), []
        return odds


@dataclass
class Usage:
    """Since the start: tokens, and the seconds that they took. What is neither prefill nor decode was idle."""

    began: float = field(default_factory=time.monotonic)
    input_tokens: int = 0
    cached_tokens: int = 0
    """Of the input, not read again: a slot held them already."""
    output_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    requests: int = 0

    def report(self, usd_per_h: float | None) -> dict:
        """Rates and dollars per million tokens, both of the seconds at work; `charged_usd` counts idle time, too."""
        up = time.monotonic() - self.began
        found = {"requests": self.requests, "input_tokens": self.input_tokens, "cached_tokens": self.cached_tokens,
                 "output_tokens": self.output_tokens, "prefill_s": self.prefill_s, "decode_s": self.decode_s,
                 "up_s": up, "usd_per_h": usd_per_h}
        if usd_per_h is None:
            return found | {"charged_usd": None, "usd_per_million_input": None, "usd_per_million_output": None}
        rates = {"input_tokens_per_s": self.input_tokens / self.prefill_s if self.prefill_s else 0.0,
                 "output_tokens_per_s": self.output_tokens / self.decode_s if self.decode_s else 0.0}
        cost = serving_cost(usd_per_h=usd_per_h, devices=1, **rates)
        return found | rates | {"charged_usd": up / 3600 * usd_per_h, "usd_per_million_input": cost["input"],
                                "usd_per_million_output": cost["output"]}


class Full(Exception):
    """As many sequences wait as may."""


class Engine:
    """Decodes on `slots` sequences at once; up to `max_waiting` more wait, in order."""

    def __init__(self, loaded: Loaded, *, slots: int, capacity: int, max_waiting: int = 64, speculative: bool = False):
        self.loaded, self.capacity, self.max_waiting, self.usage = loaded, capacity, max_waiting, Usage()
        self.batch = Batch(Decoder(loaded.model, slots=slots, capacity=capacity), speculative=speculative)
        self.going, self.waiting = {}, deque()
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self.thread.start()

    def submit(self, *sequences: Sequence) -> None:
        """Queue all of them or, if there is no room, none: `Full`."""
        with self.changed:
            if self.closed:
                for sequence in sequences:
                    sequence.tell(Piece("", 0, "cancelled"))
                return
            if len(self.waiting) + len(sequences) > self.max_waiting + len(self.batch.free):
                raise Full
            for sequence in sequences:
                sequence.stream = TextStream(self.loaded.tokenizer, sequence.stops, sequence.prompt)
                sequence.last = sequence.prompt[-1]
                self.waiting.append(sequence)
            self.usage.requests += 1
            self.changed.notify()

    @property
    def room(self) -> int:
        """The most sequences that one `submit` may ever bring."""
        return self.max_waiting + len(self.batch.decoder.cache.lengths)

    def load(self) -> dict[str, int]:
        return {"running": len(self.going), "waiting": len(self.waiting)}

    def close(self) -> None:
        """Every sequence ends as cancelled."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.going or self.closed):
                    self.changed.wait()
                if self.closed:
                    break
                self._drop_the_late()
                self._join()
            if self.batch.reading:
                self._attempt(self._read, [row.slot for prompt in self.batch.reading for row in prompt.rows])
            if self.batch.rows:
                self._attempt(self._step, list(self.batch.rows))
        for sequence in [*self.going.values(), *self.waiting]:
            sequence.tell(Piece("", sequence.tokens, "cancelled"))

    def _attempt(self, work: Callable[[], None], slots: list[int]) -> None:
        """An error is of the model's arithmetic: the sequences of `slots` are lost, the server is not."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            for slot in slots:
                if slot in self.going:
                    self._end(slot, "error", error=f"{type(error).__name__}: {error}")

    def _drop_the_late(self) -> None:
        now = time.monotonic()
        for slot, sequence in list(self.going.items()):
            if sequence.cancelled or sequence.deadline < now:
                self._end(slot, "cancelled" if sequence.cancelled else "timeout")
        for sequence in [one for one in self.waiting if one.cancelled or one.deadline < now]:
            self.waiting.remove(sequence)
            sequence.tell(Piece("", 0, "cancelled" if sequence.cancelled else "timeout"))

    def _join(self) -> None:
        joining = [self.waiting.popleft() for _ in range(min(len(self.batch.free), len(self.waiting)))]
        slots = self.batch.add([one.prompt for one in joining], [one.sampling for one in joining],
                               [one.seed for one in joining])
        self.going |= zip(slots, joining, strict=True)

    def _read(self) -> None:
        """One forward of prompts, so that no long one holds up who is being answered."""
        began = time.perf_counter()
        self.batch.read()
        self.batch.decoder.wait()
        self.usage.prefill_s += time.perf_counter() - began
        counts = self.batch.counts
        self.usage.input_tokens, self.usage.cached_tokens = counts.prompt_tokens, counts.cached_tokens

    def _step(self) -> None:
        began = time.perf_counter()
        found = self.batch.step()
        self.usage.decode_s += time.perf_counter() - began
        for slot, token in found:
            sequence = self.going.get(slot)
            if sequence is None:  # what was accepted behind the sequence's last token
                continue
            sequence.tokens += 1
            self.usage.output_tokens += 1
            if (odds := self.batch.odds(slot)) and token not in sequence.stream.ends:
                sequence.odds.append(in_words(self.loaded.tokenizer, odds, [sequence.last]))
            sequence.last = token
            text, is_last = sequence.stream.push(token), sequence.tokens == sequence.max_tokens
            text += sequence.stream.finish() if is_last else ""
            if sequence.stream.stopped or is_last:
                self._end(slot, "stop" if sequence.stream.stopped else "length", text)
            elif text:
                sequence.tell(Piece(text, sequence.tokens, odds=sequence.told()))

    def _end(self, slot: int, finish: str, text: str = "", *, error: str = "") -> None:
        sequence = self.going.pop(slot)
        self.batch.remove(slot, forget=finish == "error")
        sequence.tell(Piece(text, sequence.tokens, finish, error, sequence.told()))
