"""`sparing generate`: text from a checkpoint, streamed, and what speculation gains. Decoding is model/generate.py."""

import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.arguments import choice, memory_limit, number, options, positional, tokenizer_named
from orchestrator.errors import BadRequest

HELP = """\
usage: sparing generate CHECKPOINT [prompt=TEXT | file=FILE] [KEY=VALUE ...]

  sparing generate runs/mine prompt='import os'              greedy, up to 200 tokens, streamed
  echo 'import os' | sparing generate runs/mine              a prompt from stdin
  sparing generate runs/mine file=prompts.jsonl              {"prompt": ...} a line, decoded together; JSON lines out
  sparing generate runs/mine prompt='def ' temperature=0.8 top_p=0.95 seed=7 stop='["\\n\\n", "class "]'
  sparing generate runs/mine prompt='def ' speculative=true  drafts by the MTP module: the same text, sooner
  sparing generate runs/mine prompt='def ' speculative=compare     both ways in turns: acceptance, tokens/s, gain

CHECKPOINT is a run directory, a checkpoint in it, or a Hugging Face directory.
  max_tokens=200     tokens after the prompt
  temperature=0      0 is greedy
  top_p=1            sample from the fewest tokens with this share of probability
  seed=0             of sampling
  stop=TEXT          end before this text; or a JSON list of several
  speculative=false  true or compare need a model with an MTP module
  tokenizer=FILE     a tokenizer.json or `byte`, where the checkpoint names none
  memory.max_gib=N   most memory for weights, keys and values: experts stay on disk, the hottest in memory
  weights=fp32       of experts on disk: fp32, bf16, fp8 or int4
Text goes to stdout, what it took to stderr."""

OPTIONS = ("prompt", "file", "max_tokens", "temperature", "top_p", "seed", "stop", "speculative", "tokenizer",
           "memory.max_gib", "weights")
SLOTS = 16
"""Prompts of a file that are decoded at once."""
TURNS = 3


@dataclass(frozen=True)
class Request:
    """What is asked for, checked as far as it can be without the model. `lines`: answer in JSON lines."""

    prompts: list[str]
    lines: bool
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stops: list[str]
    speculative: str
    tokenizer: str
    memory: dict[str, float | str] | None


@dataclass(frozen=True)
class Outcome:
    """One pass over the prompts."""

    rows: list[list[int]]
    seconds: float
    counts: object

    @property
    def rate(self) -> float:
        return self.counts.tokens / self.seconds

    @property
    def acceptance(self) -> float:
        return self.counts.accepted / max(1, self.counts.drafted)


def run(arguments: list[str]) -> int:
    named, rest = options("generate", arguments, OPTIONS, HELP)
    (path,) = positional("generate", rest, 1, HELP)
    request = read_request(named)
    if isinstance(sys.stdout, io.TextIOWrapper):  # where it is not UTF-8, letters that it lacks are told by number
        sys.stdout.reconfigure(errors="backslashreplace")
    from orchestrator.inference import beyond_training, load, look

    weights, tokenizer = look(path, tokenizer=request.tokenizer)
    prompts = encode_prompts(tokenizer, weights.config.max_seq_len, request)
    if request.speculative != "false" and not weights.config.n_mtp_layers:
        raise BadRequest(f"speculative={request.speculative}: {path} has no MTP module to draft with; "
                         "use speculative=false, or train with model.n_mtp_layers=1")
    longest = max(map(len, prompts)) + request.max_tokens
    if notice := beyond_training(weights.trained_len, longest):
        print(notice, file=sys.stderr, flush=True)
    cache_tokens = (longest + 1) * min(SLOTS, len(prompts))
    loaded = load(path, request.memory, tokenizer=request.tokenizer, cache_tokens=cache_tokens)
    first = complete(loaded, prompts, request, speculative=request.speculative == "true", show=_printer(request))
    if request.speculative == "compare":
        compare(loaded, prompts, request)
    else:
        accepted = f", {first.acceptance:.1%} of {first.counts.drafted} drafts accepted" if first.counts.drafted else ""
        print(f"{first.counts.tokens} tokens in {first.seconds:.2f} s, {first.rate:.1f} tokens/s{accepted}",
              file=sys.stderr)
    return 0


def read_request(named: dict[str, str]) -> Request:
    temperature = number(named, "temperature", 0, 0, 100, whole=False)
    top_p = number(named, "top_p", 1, 1e-6, 1, whole=False)
    if top_p < 1 and temperature == 0:
        raise BadRequest(f"top_p={named['top_p']}: chooses nothing where decoding is greedy; add temperature=1")
    memory, tokenizer = memory_limit(named), tokenizer_named(named)
    max_tokens, seed = int(number(named, "max_tokens", 200, 1)), int(number(named, "seed", 0, 0, 2**40))
    speculative = choice(named, "speculative", ("false", "true", "compare"))
    prompts, lines = _read_prompts(named)
    _refuse_empty(prompts)
    return Request(prompts, lines, max_tokens, temperature, top_p, seed, _read_stops(named.get("stop", "")),
                   speculative, tokenizer, memory)


def encode_prompts(tokenizer, window: int, request: Request) -> list[list[int]]:
    """Token ids of each prompt, which must leave room for what is to come."""
    from orchestrator.train.tokenizer import begun

    try:
        prompts = [begun(tokenizer, text, tokenizer.begin) for text in request.prompts]
    except UnicodeEncodeError:
        raise BadRequest("prompt: is no UTF-8 text; give it in that encoding") from None
    _refuse_empty(prompts)
    for index, prompt in enumerate(prompts, 1):
        if len(prompt) + request.max_tokens > window:
            room = window - len(prompt)
            remedy = f"use max_tokens={room} or less" if room > 0 else f"cut the prompt to {window - 1} or fewer"
            raise BadRequest(f"{_which(prompts, index)}: {len(prompt)} tokens and max_tokens="
                             f"{request.max_tokens} must not exceed model.max_seq_len={window}; {remedy}")
    return prompts


def _refuse_empty(prompts: list) -> None:
    """Of texts or of their tokens."""
    for index, prompt in enumerate(prompts, 1):
        if not prompt:
            raise BadRequest(f"{_which(prompts, index)}: is empty; give at least one character")


def _which(prompts: list, index: int) -> str:
    return f"{len(prompts)} prompts, number {index}" if len(prompts) > 1 else "prompt"


def complete(loaded, prompts: list[list[int]], request: Request, *, speculative: bool,
             show: Callable[[int, str, str, int], None] | None = None) -> Outcome:
    """Continue all prompts; `show(row, text, finish, tokens)` hears of text as it becomes certain. finish: empty, or
    at the row's end why it ended."""
    from model.decode import Decoder
    from model.generate import Counts, Sampling, generate
    from orchestrator.inference import TextStream

    decoder = Decoder(loaded.model, slots=min(SLOTS, len(prompts)),
                      capacity=max(map(len, prompts)) + request.max_tokens)
    streams = [TextStream(loaded.tokenizer, request.stops, prompt) for prompt in prompts]
    rows, counts, start = [[] for _ in prompts], Counts(), time.perf_counter()
    for row, token in generate(decoder, prompts, max_tokens=request.max_tokens, seed=request.seed,
                               sampling=Sampling(request.temperature, request.top_p), speculative=speculative,
                               stops=lambda row, token: streams[row].stopped, counts=counts):
        rows[row].append(token)
        text, is_last = streams[row].push(token), len(rows[row]) == request.max_tokens
        text += streams[row].finish() if is_last else ""
        if show is not None:
            show(row, text, "stop" if streams[row].stopped else "length" * is_last, len(rows[row]))
    return Outcome(rows, time.perf_counter() - start, counts)


def compare(loaded, prompts: list[list[int]], request: Request) -> None:
    """Plain and speculative decoding in turns, nothing shown; ratios within a turn, so that a busy machine matters
    less."""
    pairs = [[complete(loaded, prompts, request, speculative=way) for way in (False, True)] for _ in range(TURNS)]
    plain, drafted = pairs[0]
    gains = sorted(fast.rate / slow.rate for slow, fast in pairs)
    rates = [statistics.median(pair[way].rate for pair in pairs) for way in (0, 1)]
    print(f"acceptance   {drafted.acceptance:.1%} of {drafted.counts.drafted} drafts of the second token\n"
          f"plain        {rates[0]:.1f} tokens/s, {plain.counts.tokens} tokens in {plain.counts.steps} steps\n"
          f"speculative  {rates[1]:.1f} tokens/s, {drafted.counts.tokens} tokens in {drafted.counts.steps} steps\n"
          f"gain         {statistics.median(gains):.2f}x (turns {gains[0]:.2f} to {gains[-1]:.2f})", file=sys.stderr)
    if request.temperature == 0:
        same = sum(a == b for a, b in zip(plain.rows, drafted.rows, strict=True))
        print(f"text         the same for {same} of {len(prompts)} prompts", file=sys.stderr)


def _printer(request: Request) -> Callable[[int, str, str, int], None]:
    """One prompt: its text as it comes. Several: a JSON line each, in their order, once all before are over."""
    if not request.lines:
        def stream(row: int, text: str, finish: str, tokens: int) -> None:
            print(text, end="\n" if finish else "", flush=True)

        return stream
    rows, printed = [{"prompt": prompt, "text": "", "finish": "", "tokens": 0} for prompt in request.prompts], 0

    def lines(row: int, text: str, finish: str, tokens: int) -> None:
        nonlocal printed
        rows[row] |= {"text": rows[row]["text"] + text, "finish": finish, "tokens": tokens}
        while printed < len(rows) and rows[printed]["finish"]:
            print(json.dumps(rows[printed]), flush=True)
            printed += 1

    return lines


def _read_prompts(named: dict[str, str]) -> tuple[list[str], bool]:
    if "prompt" in named and "file" in named:
        raise BadRequest(f"file={named['file']}: goes not with prompt=; give one of them")
    if "prompt" in named:
        return [named["prompt"]], False
    if "file" not in named:
        if sys.stdin.isatty():
            raise BadRequest("prompt: must be given; add prompt=TEXT, file=FILE, or pipe a text in")
        try:
            return [sys.stdin.read()], False
        except UnicodeDecodeError:
            raise BadRequest("stdin: is no UTF-8 text; give the prompt in that encoding") from None
    from orchestrator.train.texts import documents, not_utf8

    file, stray = named["file"], set()
    if os.path.isdir(file):
        raise BadRequest(f"file={file}: is a directory; name a text, or JSON lines with a prompt")
    try:
        texts = list(documents(file, "prompt", "", stray=stray))
    except (OSError, ValueError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"file={file}: cannot be read ({error}); name a text, or JSON lines with a prompt") from None
    if stray:
        print(not_utf8(f"file={file}", 1, file), file=sys.stderr, flush=True)
    if not texts:
        raise BadRequest(f"file={file}: holds no prompt; write a line {{\"prompt\": ...}} for each")
    return texts, file.endswith((".jsonl", ".ndjson", ".parquet"))


def _read_stops(text: str) -> list[str]:
    if not text.startswith("["):
        return _short([text] if text else [])
    try:
        stops = json.loads(text)
    except json.JSONDecodeError:
        stops = None
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise BadRequest(f"stop={text}: must be a text or a JSON list of texts; use stop='[\"\\n\", \"def \"]'")
    return _short(stops)


def _short(stops: list[str]) -> list[str]:
    from orchestrator.inference import MAX_STOP

    for stop in stops:
        if len(stop) > MAX_STOP:
            raise BadRequest(f"stop={stop[:20]}...: {len(stop)} characters, must be at most {MAX_STOP}; end at a "
                             "shorter text")
    return stops
