"""Which tokens a step sees: a pure function of (seed, sample index), the same under every layout.

Sample i of a stream covers tokens [i * seq_len, i * seq_len + seq_len + n_extra): the look-ahead overlaps the next
sample. grain permutes the samples anew each epoch, and mixes those of several sources by their weights, each with
epochs of its own; a run's position is the number of samples before it.
"""

import hashlib
import logging
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from model.config import ModelConfig
from orchestrator.config import Config, DataConfig, DataKind, TrainConfig
from orchestrator.errors import BadRequest, NotTrustworthy
from orchestrator.plan.layout import ramp_parts
from orchestrator.train.progress import Progress
from orchestrator.train.texts import not_utf8
from orchestrator.train.tokens import BLOCK_BYTES, build_index, checksums_of, read_index

OPEN_SHARDS = 64
"""Memory-mapped at a time, with two file descriptors each: a rank of a large corpus has thousands of shards."""


class TokenStream:
    """The shards of one split as one long row of tokens. What is read is compared with its checksums, so that a shard
    that was altered, even a moment ago, ends the run instead of teaching it something else."""

    def __init__(self, folder: Path, dtype: str, shards: list[dict]):
        self.folder, self.dtype = folder, np.dtype(dtype).newbyteorder("<")
        self.files = [folder / shard["file"] for shard in shards]
        self.mapped = lru_cache(maxsize=OPEN_SHARDS)(_map)
        self.sizes = [shard["tokens"] for shard in shards]
        self.ends = np.cumsum(self.sizes)
        self.num_tokens = int(self.ends[-1])
        self.num_bytes = sum(shard["bytes"] for shard in shards)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) as int64."""
        assert 0 <= start and start + length <= self.num_tokens, (start, length, self.num_tokens)
        parts, shard = [], int(np.searchsorted(self.ends, start, side="right"))
        while length:
            offset = start - int(self.ends[shard] - self.sizes[shard])
            part = self._checked(shard, offset, min(length, self.sizes[shard] - offset))
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def _checked(self, shard: int, offset: int, length: int) -> np.ndarray:
        """Tokens of one shard, out of a copy of their blocks that is compared."""
        begin, end = offset * self.dtype.itemsize, (offset + length) * self.dtype.itemsize
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        tokens, checksums = self.mapped(self.files[shard])
        data = tokens[first * BLOCK_BYTES : last * BLOCK_BYTES].tobytes()
        for block in range(first, last):
            at = (block - first) * BLOCK_BYTES
            if zlib.crc32(memoryview(data)[at : at + BLOCK_BYTES]) != checksums[block]:
                raise NotTrustworthy(f"{self.files[shard]}: its content is not what was written; delete {self.folder} "
                                     "and it is made again")
        return np.frombuffer(data, self.dtype, length, begin - first * BLOCK_BYTES)


def _map(shard: Path) -> tuple[np.ndarray, np.ndarray]:
    """Its bytes and its blocks' checksums, read as they are asked for."""
    return np.memmap(shard, dtype=np.uint8, mode="r"), np.memmap(checksums_of(shard), dtype="<u4", mode="r")


@dataclass(frozen=True)
class Corpus:
    """A prepared data set: the streams of each source by split; `sources` is None for random tokens."""

    digest: str
    """Identity of the tokens: a run resumes on the same ones or not at all."""
    vocab_size: int
    sources: list[dict[str, TokenStream]] | None
    baselines: dict[str, float | None]
    """Bits per byte of a bigram model and of gzip -9 on the validation split."""
    bytes_per_token: float | None
    """Of the validation split, to turn nats per token into bits per byte."""
    weights: tuple[float, ...] = (1.0,)
    """Each source's share of the sequences, in training and in validation."""
    notice: str | None = None
    """What every run on these tokens is to be told of them."""


def prepare(config: DataConfig, *, model: ModelConfig, seq_len: int, n_extra: int,
            on_progress: Callable[[int, int], None] | None = None) -> Corpus:
    """Tokenise if nobody has yet, map the shards, and refuse data that this model or length cannot use."""
    if config.kind is DataKind.random:
        return Corpus("random", model.vocab_size, None, {"bigram": None, "gzip": None}, None)
    parts = config.parts if config.weights else [config.path]
    folders = [build_index(replace(config, path=part), on_progress) for part in parts]
    indexes = [read_index(folder) for folder in folders]
    vocab_size = indexes[0]["vocab_size"]
    if vocab_size > model.vocab_size:
        raise BadRequest(f"model.vocab_size={model.vocab_size}: must hold the {vocab_size} tokens of "
                         f"data.tokenizer={config.tokenizer}; use model.vocab_size={-(-vocab_size // 8) * 8}")
    sources = [{split: TokenStream(folder, index["dtype"], shards) for split, shards in index["shards"].items()}
               for folder, index in zip(folders, indexes, strict=True)]
    for part, streams in zip(parts, sources, strict=True):
        for split, stream in streams.items():
            if stream.num_tokens < seq_len + n_extra:
                raise BadRequest(f"train.seq_len={seq_len}: the {split} split of data.path={part} has only "
                                 f"{stream.num_tokens} tokens; use shorter sequences, more data or another "
                                 "data.validation_fraction")
    weights = tuple(each / sum(config.weights) for each in config.weights) or (1.0,)
    hashes = [shard["sha256"] for index, streams in zip(indexes, sources, strict=True) for split in sorted(streams)
              for shard in index["shards"][split]] + [str(weights)] * bool(config.weights)
    stray = [index["not_utf8"] for index in indexes if index["not_utf8"]["files"]]
    notice = not_utf8(f"data.path={config.path}", sum(each["files"] for each in stray), stray[0]["first"]
                      ) if stray else None
    read = [weight * streams["validation"].num_bytes / streams["validation"].num_tokens
            for weight, streams in zip(weights, sources, strict=True)]
    baselines = {name: sum(bytes_ * index["baselines"][name] for bytes_, index in zip(read, indexes, strict=True))
                 / sum(read) for name in indexes[0]["baselines"]}
    return Corpus(hashlib.sha256("".join(hashes).encode()).hexdigest(), vocab_size, sources, baselines, sum(read),
                  weights, notice)


def prepare_here(config: Config, progress: Progress) -> Corpus:
    """`prepare` what a run would read, on this machine and in front of a person."""
    corpus = prepare(config.data, model=config.model, seq_len=config.train.seq_len,
                     n_extra=1 + config.model.n_mtp_layers, on_progress=partial(progress.amount, "tokenising", "MB"))
    progress.warn(corpus.notice)
    return corpus


def compare_over_ranks(corpus: Corpus, config: DataConfig, rank: int, store, on_progress: Callable[[], None]) -> None:
    """Refuse data that another node's copy makes other tokens of: a pipeline's ends would train on different texts.

    store: rank 0 tells the others by it, who may have to wait until it has tokenised; None for a rank alone."""
    if store is None:
        return
    if rank == 0:
        store.set("data", corpus.digest)
    while not store.check(["data"]):
        on_progress()
        time.sleep(0.1)
    if store.get("data").decode() != corpus.digest:
        raise BadRequest(f"data.path={config.path}: the files of rank {rank}'s node are not those of rank 0's; copy "
                         "the same to all nodes, or name a folder that they share or a URL")


def batch(corpus: Corpus, *, seed: int, first_sample: int, num: int, seq_len: int, n_extra: int) -> np.ndarray:
    """Samples [first_sample, first_sample + num) of the run's order, int64 [num, seq_len + n_extra]."""
    if corpus.sources is None:
        return np.stack([_random_row(corpus.vocab_size, seed, i, seq_len + n_extra)
                         for i in range(first_sample, first_sample + num)])
    streams = [source["train"] for source in corpus.sources]
    order = sample_order(tuple((stream.num_tokens - n_extra) // seq_len for stream in streams), corpus.weights, seed)
    places = [order[i] for i in range(first_sample, first_sample + num)]
    return np.stack([streams[source].read(int(sample) * seq_len, seq_len + n_extra) for source, sample in places])


def validation_batch(corpus: Corpus, asked: range, num: int, seq_len: int, n_extra: int) -> np.ndarray:
    """Those `asked` of `num` sequences spread evenly over the held-out tokens of each source, which has its share of
    them, always the same ones, int64 [len(asked), seq_len + n_extra]."""
    if corpus.sources is None:
        return np.stack([_random_row(corpus.vocab_size, -1, i, seq_len + n_extra) for i in asked])
    ends = [round(num * share) for share in accumulate(corpus.weights)]
    rows = []
    for i in asked:
        source = bisect_right(ends, i)
        begin, end = [0, *ends][source : source + 2]
        stream = corpus.sources[source]["validation"]
        last = stream.num_tokens - seq_len - n_extra
        rows.append(stream.read(last * (i - begin) // max(1, end - begin - 1), seq_len + n_extra))
    return np.stack(rows)


@lru_cache(maxsize=4)
def sample_order(sizes: tuple[int, ...], weights: tuple[float, ...], seed: int):
    """`order[i]` for any global index i >= 0: a source by its weight and one of its samples, a permutation of them per
    epoch of the source, each epoch another one. sizes: samples of each source."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # else the import warns that there is no jax
    import grain

    orders = [grain.MapDataset.range(size).seed(seed + source).shuffle().repeat().map(partial(_of_source, source))
              for source, size in enumerate(sizes)]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def _of_source(source: int, sample: int) -> tuple[int, int]:
    return source, sample


def samples_before(step: int, train: TrainConfig) -> int:
    """Sequences of all steps before `step`: the global index of its first sample."""
    samples = 0
    for steps, sequences in ramp_parts(train):
        if step <= steps:
            return samples + step * sequences
        samples, step = samples + steps * sequences, step - steps
    return samples + step * train.batch_size


def _random_row(vocab_size: int, seed: int, index: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed + 1, index]).integers(0, vocab_size, length, dtype=np.int64)
