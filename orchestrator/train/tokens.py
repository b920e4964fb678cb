"""Text into token shards, once: flat little-endian integers beside one JSON index, memory-mapped ever after.

    <cache_dir>/<key>/index.json                  version, tokenizer, baselines, files that are not UTF-8, and per shard
                                                  tokens, bytes, sha256
    <cache_dir>/<key>/train-00000.bin ...         uint16 or uint32 by vocabulary; documents end in the eos token
    <cache_dir>/<key>/train-00000.crc ...         CRC-32 of each 32 KiB of it as uint32
    <cache_dir>/<key>/validation-00000.bin ...    a split by document: a document's content decides its side

The key is a digest of the files' names, sizes and times and of what is done to them. Concurrent processes build it
once, under a lock that dies with its holder; readers see a whole directory or none.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from orchestrator.config import DataConfig
from orchestrator.errors import BadRequest, NotFit, NotTrustworthy
from orchestrator.train.processes import try_lock
from orchestrator.train.texts import documents, find_files
from orchestrator.train.tokenizer import Tokenizer, load_tokenizer

VERSION = 3
SHARD_TOKENS = 1 << 28
BLOCK_BYTES = 1 << 15
"""Of a shard, with a checksum of their own: what a step reads is compared in about 5 microseconds a block."""
LOCK_TIMEOUT_S = 3600.0
"""A process that tokenises for others is given up when it has written nothing for this long."""
TELL_CHARACTERS = 1 << 22
SPLITS = ("train", "validation")


def build_index(config: DataConfig, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """The directory of this data's shards, made if it is not there. on_progress(bytes done, bytes in all)."""
    stamps = find_files(config.path)
    tokenizer = load_tokenizer(config.tokenizer)
    cache = Path(config.cache_dir).expanduser()
    sizes = {file: size for file, (size, _) in stamps.items()}
    target = cache / _key(stamps, tokenizer, config)
    if (target / "index.json").exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / f"{target.name}.lock").touch()
    except OSError as error:
        raise NotFit(f"data.cache_dir={cache}: cannot be made or written ({error.strerror}); choose another directory"
                     ) from error
    on_progress = on_progress or (lambda done, total: None)
    with _locked(cache, target.name, on_wait=lambda: on_progress(0, sum(sizes.values()))):
        if not (target / "index.json").exists():
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
            try:
                _build(sizes, tokenizer, config, temporary, on_progress)
                temporary.chmod(cache.stat().st_mode & 0o777)  # whoever shares the cache reads it, too
                shutil.rmtree(target, ignore_errors=True)
                os.rename(temporary, target)
            except OSError as error:
                raise NotFit(f"data.cache_dir={cache}: {error.strerror or error}; "
                             "make room there, or choose another directory") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def _build(sizes: dict[str, int], tokenizer: Tokenizer, config: DataConfig, folder: Path,
           on_progress: Callable[[int, int], None]) -> None:
    """Write shards and index. A corpus of few documents may hold out none: then the one of lowest share is held out,
    and of a single document its end."""
    fraction = config.validation_fraction
    writer, stray, lowest, number = _Writer(folder, tokenizer), set(), (1.0, 0), 0
    for number, (text, share) in enumerate(_read(sizes, config.text_key, on_progress, stray), start=1):
        writer.add(text, "validation" if share < fraction else "train")
        lowest = min(lowest, (share, number))
    if not writer.sound:
        writer = _Writer(folder, tokenizer)
        for i, (text, _) in enumerate(_read(sizes, config.text_key, on_progress), start=1):
            end = min(len(text) - 1, int(len(text) * (1 - fraction))) if number == 1 else 0
            writer.add(text[end:], "validation" if i == lowest[1] else "train")
            if end:
                writer.add(text[:end], "train")
    if not writer.sound:
        raise BadRequest(f"data.path={config.path}: has too little text for two splits ({len(sizes)} files); give more")
    index = writer.index() | {"not_utf8": {"files": len(stray), "first": min(stray, default=None)}}
    data = json.dumps(index, indent=1)
    (folder / "index.json").write_text(
        json.dumps({"sha256": hashlib.sha256(data.encode()).hexdigest(), "index": json.loads(data)}))


def _read(sizes: dict[str, int], text_key: str, on_progress: Callable[[int, int], None],
          stray: set[str] | None = None) -> Iterator[tuple[str, float]]:
    """Every text of these files (name and bytes) that is not empty, with its share: a hash of its content in [0, 1)."""
    total, done, read, told = sum(sizes.values()), 0, 0, 0
    for file, size in sizes.items():
        for text in documents(file, text_key, stray=stray):
            read += len(text)
            if read - told > TELL_CHARACTERS:
                told = read
                on_progress(min(read, done + size), total)
            if text:
                yield text, int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64
        done = read = told = done + size
        on_progress(done, total)


class _Writer:
    """Both splits' shards, and the baselines counted on the way."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.splits = {split: _ShardWriter(folder, split, tokenizer.vocab_size) for split in SPLITS}
        self.bigrams = _Bigrams()
        self.packer, self.packed = zlib.compressobj(9, wbits=31), 0

    def add(self, text: str, split: str) -> None:
        raw = text.encode()
        self.splits[split].add(self.tokenizer.encode(text), self.tokenizer.eos, len(raw))
        self.bigrams.add(raw, split)
        if split == "validation":
            self.packed += len(self.packer.compress(raw))

    @property
    def sound(self) -> bool:
        return all(writer.documents for writer in self.splits.values())

    def index(self) -> dict:
        """Close the shards and describe them."""
        shards = {split: writer.close() for split, writer in self.splits.items()}
        held_out = sum(shard["bytes"] for shard in shards["validation"])
        packed = self.packed + len(self.packer.flush())
        return {"version": VERSION, "tokenizer": self.tokenizer.identity, "vocab_size": self.tokenizer.vocab_size,
                "eos": self.tokenizer.eos, "dtype": self.splits["train"].dtype.name,
                "documents": {split: writer.documents for split, writer in self.splits.items()}, "shards": shards,
                "baselines": {"bigram": self.bigrams.bits_per_byte(), "gzip": 8 * packed / held_out}}


def read_index(folder: Path) -> dict:
    """The checked index: its own hash, and every shard there at its size. Content is compared as it is read (data.py).
    """
    path = folder / "index.json"
    try:
        outer = json.loads(path.read_text())
        index = outer["index"]
        sound = hashlib.sha256(json.dumps(index, indent=1).encode()).hexdigest() == outer["sha256"]
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise NotTrustworthy(f"{path}: is damaged; delete {folder} and it is made again")
    for split in SPLITS:
        for shard in index["shards"][split]:
            file, wanted = folder / shard["file"], shard["tokens"] * np.dtype(index["dtype"]).itemsize
            for path, size in ((file, wanted), (checksums_of(file), 4 * -(-wanted // BLOCK_BYTES))):
                actual = path.stat().st_size if path.exists() else None
                if actual != size:
                    raise NotTrustworthy(f"{path}: has {actual} bytes, the index says {size}; delete {folder} and it "
                                         "is made again")
    return index


def checksums_of(shard: Path) -> Path:
    """The file beside a shard with the CRC-32 of each of its blocks, little-endian uint32."""
    return shard.with_suffix(".crc")


class _ShardWriter:
    def __init__(self, folder: Path, split: str, vocab_size: int):
        self.folder, self.split = folder, split
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.shards: list[dict] = []
        self.file, self.documents = None, 0

    def add(self, ids: np.ndarray, eos: int, num_bytes: int) -> None:
        if self.file is None or self.tokens >= SHARD_TOKENS:
            self._finish()
            self.name = f"{self.split}-{len(self.shards):05d}.bin"
            self.file, self.digest = open(self.folder / self.name, "wb"), hashlib.sha256()
            self.checksums = open(checksums_of(self.folder / self.name), "wb")
            self.tokens = self.bytes = self.crc = self.filled = 0
        data = np.append(ids, eos).astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self._sum_up(data)
        self.tokens, self.bytes, self.documents = self.tokens + len(ids) + 1, self.bytes + num_bytes, self.documents + 1

    def close(self) -> list[dict]:
        self._finish()
        return self.shards

    def _sum_up(self, data: bytes) -> None:
        """A checksum whenever a block is full."""
        left = memoryview(data)
        while left:
            part, left = left[: BLOCK_BYTES - self.filled], left[BLOCK_BYTES - self.filled :]
            self.crc, self.filled = zlib.crc32(part, self.crc), self.filled + len(part)
            if self.filled == BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        self.checksums.write(self.crc.to_bytes(4, "little"))
        self.crc = self.filled = 0

    def _finish(self) -> None:
        if self.file is not None:
            if self.filled:
                self._end_block()
            self.file.close()
            self.checksums.close()
            self.shards.append({"file": self.name, "tokens": self.tokens, "bytes": self.bytes,
                                "sha256": self.digest.hexdigest()})
            self.file = None


class _Bigrams:
    """A byte-level bigram model: counts of (previous byte, byte), 256 standing for a document's start."""

    def __init__(self) -> None:
        self.counts = {split: np.zeros((257, 256), dtype=np.int64) for split in SPLITS}

    def add(self, raw: bytes, split: str) -> None:
        after = np.frombuffer(raw, dtype=np.uint8).astype(np.int64)
        before = np.concatenate([[256], after[:-1]])
        self.counts[split] += np.bincount(before * 256 + after, minlength=257 * 256).reshape(257, 256)

    def bits_per_byte(self) -> float:
        """On the validation split, interpolated with unigrams as strongly as suits it best: a generous baseline."""
        seen, held_out = self.counts["train"].astype(float), self.counts["validation"]
        single = (seen.sum(0) + 1) / (seen.sum() + 256)
        rows = seen.sum(1, keepdims=True)
        bits = [-(held_out * np.log2((seen + weight * single) / (rows + weight))).sum() / held_out.sum()
                for weight in (0.1, 1.0, 3.0, 10.0, 30.0, 100.0)]
        return float(min(bits))


def _key(stamps: dict[str, tuple], tokenizer: Tokenizer, config: DataConfig) -> str:
    parts = [VERSION, tokenizer.identity, config.text_key, config.validation_fraction]
    parts += [(file, *stamp) for file, stamp in stamps.items()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _locked(cache: Path, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """An advisory lock that the kernel drops with its holder; others wait while it gets on."""
    path, written, deadline = cache / f"{name}.lock", None, 0.0
    with open(path, "w") as file:
        while not try_lock(file, "data.cache_dir", cache):
            if written != (written := _bytes_under(cache, f".{name}-*/*")):
                deadline = time.monotonic() + LOCK_TIMEOUT_S
            if time.monotonic() > deadline:
                raise NotFit(f"{path}: the process that holds it has written no tokens for {LOCK_TIMEOUT_S:.0f} s; "
                             "see what it does, or choose another data.cache_dir")
            on_wait()
            time.sleep(0.1)
        yield


def _bytes_under(folder: Path, pattern: str) -> int:
    total = 0
    for file in folder.glob(pattern):
        with contextlib.suppress(OSError):  # gone meanwhile
            total += file.stat().st_size
    return total
