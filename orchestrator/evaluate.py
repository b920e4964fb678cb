"""`sparing evaluate`: bits per byte and perplexity on text, and tasks of lm-evaluation-harness (evaluate_tasks.py)."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from orchestrator.arguments import (
    check_writable,
    memory_limit,
    number,
    options,
    positional,
    tokenizer_named,
    write_file,
)
from orchestrator.errors import BadRequest

HELP = """\
usage: sparing evaluate CHECKPOINT text=FILE[,FILE ...] [KEY=VALUE ...]
       sparing evaluate CHECKPOINT tasks=NAME[,NAME ...] task_dir=DIR [limit=N]

  sparing evaluate runs/mine text=held-out.txt               bits per byte and perplexity
  sparing evaluate runs/mine text='corpus/*.jsonl' stride=1  every token with the most context (slow)
  sparing evaluate runs/mine tasks=mine task_dir=tasks/      DIR/mine.yaml by lm-evaluation-harness, on local data

CHECKPOINT is a run directory, a checkpoint in it, or a Hugging Face directory.
  window=N         tokens read to predict one; default: the length it was trained on
  stride=N         tokens scored per window; default: half of it
  text_key=text    field that holds the text in JSON lines and Parquet
  tokenizer=FILE   a tokenizer.json or `byte`, where the checkpoint names none
  memory.max_gib=N most memory for weights: experts stay on disk, as weights=fp32, bf16, fp8 or int4
  out=FILE.json    the result, for programs"""

OPTIONS = ("text", "tasks", "task_dir", "limit", "window", "stride", "text_key", "tokenizer", "memory.max_gib",
           "weights", "out")
LIMITED_BATCH_TOKENS = 2048
"""Scored at once where experts stay on disk: every batch reads and unpacks nearly all of them."""
TEXT_ALONE = ("window", "stride", "text_key")
TASKS_ALONE = ("task_dir", "limit")


@dataclass(frozen=True)
class TextResult:
    """Sums over one file's documents, and what they make."""

    file: str
    documents: int
    bytes: int
    tokens: int
    nats: float
    right: int
    """Tokens that the model found likeliest."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(min(700.0, self.nats / self.tokens))

    def as_dict(self) -> dict:
        return asdict(self) | {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


def run(arguments: list[str]) -> int:
    named, rest = options("evaluate", arguments, OPTIONS, HELP)
    (path,) = positional("evaluate", rest, 1, HELP)
    if ("text" in named) == ("tasks" in named):
        raise BadRequest("evaluate: takes text=FILE or tasks=NAME, one of them; see `sparing evaluate --help`")
    of = "tasks" if "tasks" in named else "text"
    if other := [key for key in (TEXT_ALONE if of == "tasks" else TASKS_ALONE) if key in named]:
        raise BadRequest(f"{other[0]}={named[other[0]]}: means nothing beside {of}=; leave it out")
    if "tasks" in named and "task_dir" not in named:
        raise BadRequest(f"tasks={named['tasks']}: needs the folder with their YAML files; add task_dir=DIR")
    check_writable(named, "out")
    given = {key: int(number(named, key, 1, 1)) for key in ("limit", "window", "stride") if key in named}
    memory, tokenizer = memory_limit(named), tokenizer_named(named)
    if "text" in named:
        from orchestrator.train.texts import find_files

        find_files(named["text"], "text")
    from orchestrator.inference import look

    weights, _ = look(path, tokenizer=tokenizer)
    if "tasks" in named:
        from orchestrator.evaluate_tasks import evaluate_tasks, table

        loaded = _load(path, memory, tokenizer, weights.trained_len + 1, answer=weights.config.max_seq_len + 1)
        results = evaluate_tasks(loaded, named["tasks"].split(","), named["task_dir"], limit=given.get("limit"))
        print(table(results))
        _write(named, {"path": loaded.path, "tasks": results["results"]})
        return 0
    most = weights.config.max_seq_len
    window = int(number(named, "window", min(weights.trained_len, most), 1, most))
    stride = int(number(named, "stride", max(1, window // 2), 1, window))
    loaded = _load(path, memory, tokenizer, window)
    results = evaluate_text(loaded, named["text"], window=window, stride=stride, text_key=named.get("text_key", "text"))
    _write(named, {"path": loaded.path, "window": window, "stride": stride,
                   "files": [result.as_dict() for result in results[:-1]], "total": results[-1].as_dict()})
    return 0


def _load(path: str, memory: dict[str, float | str] | None, tokenizer: str, window: int, *, answer: int = 0):
    """In fp32; a limited memory has room for a smaller batch of windows, and for one answer of so many tokens."""
    import torch

    from orchestrator.inference import ANSWER_TOKENS, BATCH_TOKENS, load

    cache_tokens = max(answer, ANSWER_TOKENS) if answer and memory is None else answer
    at_once = BATCH_TOKENS if memory is None else LIMITED_BATCH_TOKENS
    loaded = load(path, memory, tokenizer=tokenizer, dtype=torch.float32, at_once=max(window, at_once),
                  cache_tokens=cache_tokens)
    return replace(loaded, batch_tokens=at_once, cache_tokens=cache_tokens)


def evaluate_text(loaded, patterns: str, *, window: int, stride: int, text_key: str = "text") -> list[TextResult]:
    """Score every document by itself, after what a text begins with or, where the model knows nothing of that, the end
    of a document; prints a line a file and, last in the list, the total."""
    from orchestrator.train.texts import documents, find_files, not_utf8

    files, results, stray = find_files(patterns, "text"), [], set()
    width = max(4, *(len(Path(file).name) for file in files))
    head = (f"{'text':{width}}  documents       bytes      tokens  bits/byte  perplexity  top-1   "
            f"(window {window}, stride {stride})")
    for file in files:
        result = _score_file(loaded, file, documents(file, text_key, "text_key=", stray=stray), window, stride)
        if result.tokens:
            if not results:
                print(head)
            results.append(result)
            _print(result, width)
    if not results:
        raise BadRequest(f"text={patterns}: holds no text; name files with at least one character")
    if stray:
        print(not_utf8(f"text={patterns}", len(stray), min(stray)), file=sys.stderr, flush=True)
    total = TextResult("all", 0, 0, 0, 0.0, 0)
    for result in results:
        total = _add(total, result)
    if len(results) > 1:
        _print(total, width)
    return [*results, total]


def _score_file(loaded, file: str, texts: Iterable[str], window: int, stride: int) -> TextResult:
    from model.score import score_texts
    from orchestrator.train.tokenizer import begun

    sizes, tokens, nats, right = [], 0, 0.0, 0
    begin = loaded.tokenizer.begin or (loaded.tokenizer.eos,)

    def rows() -> Iterator[list[int]]:
        for text in filter(None, texts):
            sizes.append(len(text.encode()))
            yield begun(loaded.tokenizer, text, begin)

    for found in score_texts(loaded.model, rows(), first=len(begin), window=window, stride=stride,
                             batch_tokens=loaded.batch_tokens):
        tokens += len(found.log_prob)
        nats -= float(found.log_prob.double().sum())
        right += int(found.is_best.sum())
    return TextResult(Path(file).name, len(sizes), sum(sizes), tokens, nats, right)


def _add(a: TextResult, b: TextResult) -> TextResult:
    return TextResult(a.file, a.documents + b.documents, a.bytes + b.bytes, a.tokens + b.tokens, a.nats + b.nats,
                      a.right + b.right)


def _print(result: TextResult, width: int) -> None:
    print(f"{result.file:{width}}  {result.documents:9,}  {result.bytes:10,}  {result.tokens:10,}  "
          f"{result.bits_per_byte:9.4f}  {result.perplexity:10.4g}  {result.right / result.tokens:5.1%}", flush=True)


def _write(named: dict[str, str], result: dict) -> None:
    if "out" in named:
        write_file(named, "out", json.dumps(result, indent=1) + "\n")
