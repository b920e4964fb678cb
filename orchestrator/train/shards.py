"""One rank's tensors in one safetensors file: written from copies, hashed on the way, read back, verified before use.

The file is laid out here rather than by the library so that it streams: no second copy in memory, the hash is of
what was in memory (the library checks structure, and loads a flipped bit without a word), and one code path serves
every kind of storage. Reading is the library's.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.hf_files import safetensors_header
from orchestrator.train import storage
from orchestrator.train.manifest import (
    KEY,
    CorruptShard,
    Entry,
    MissingShard,
    MissingTensor,
    ShardFile,
    Span,
    TruncatedShard,
    read_manifest,
    tensor_name,
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + len(tensor)) along dimension 0 of the global tensor `key`; a scalar is its one row.

    Keys are free of any layout: `model.layers.3.moe.experts.17.w13`, one entry per global expert. Across all ranks
    each row is handed in once: of replicas, one rank hands in the piece. A piece without rows is left out.
    """

    key: str
    global_shape: tuple[int, ...]
    start: int
    tensor: Tensor

    @property
    def num_rows(self) -> int:
        return self.tensor.shape[0] if self.tensor.dim() else 1

    def entry(self, file: str) -> Entry:
        """What the manifest will say of this piece, or ValueError: a piece that does not lie in its tensor."""
        shape = tuple(self.global_shape)
        rows, whole_rows = self.num_rows, shape[0] if shape else 1
        if not KEY.fullmatch(self.key) or self.tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{self.key}: not a plain dotted name, or of a type {self.tensor.dtype} that is not saved")
        if tuple(self.tensor.shape[1:]) != shape[1:] or self.tensor.dim() != len(shape) \
                or not 0 <= self.start <= self.start + rows <= whole_rows:
            raise ValueError(f"{self.key}: rows from {self.start} of shape {tuple(self.tensor.shape)} "
                             f"are not part of a tensor of shape {shape}")
        return Entry(_DTYPE_NAMES[self.tensor.dtype], shape, (Span(file, self.start, self.start + rows),))


def snapshot(pieces: Iterable[Piece]) -> list[Piece]:
    """Copies on the CPU that later changes of the tensors do not reach."""
    return [Piece(piece.key, tuple(piece.global_shape), piece.start, piece.tensor.detach().to(
        "cpu", copy=True, memory_format=torch.contiguous_format)) for piece in pieces if piece.num_rows]


def write_shard(path: str, pieces: Sequence[Piece], *, retry_s: float) -> tuple[ShardFile, list[tuple[str, Entry]]]:
    """Write `pieces` (contiguous, on the CPU) to `path`, read them back, and say what the manifest must know."""
    name = path.rsplit("/", 1)[-1]
    pieces = sorted(pieces, key=lambda piece: (-piece.tensor.element_size(), piece.key, piece.start))
    index = [(piece.key, piece.entry(name)) for piece in pieces]
    header = _header(pieces, index)
    num_bytes = len(header) + sum(piece.tensor.nbytes for piece in pieces)
    digest = hashlib.sha256()

    def chunks() -> Iterator:
        yield header
        for piece in pieces:
            yield memoryview(piece.tensor.reshape(-1).view(torch.uint8).numpy())

    def hashed() -> Iterator:
        for chunk in chunks():
            digest.update(chunk)
            yield chunk

    storage.write_chunks(path, hashed(), num_bytes=num_bytes, retry_s=retry_s)
    file = ShardFile(num_bytes, digest.hexdigest())
    check_shard(path, file, content=False, retry_s=retry_s)
    if storage.local_path(path) is not None:  # an object store checks each upload against the client's checksum
        _read_back(path, chunks())
    return file, index


def _read_back(path: str, chunks: Iterable) -> None:
    """Refuse a file whose bytes are not those in memory: compared one by one, which is cheaper than another hash."""
    buffer = bytearray(storage.CHUNK_BYTES)
    with storage.open_read(path) as file:
        for chunk in map(memoryview, chunks):
            for start in range(0, len(chunk), len(buffer)):
                part = chunk[start : start + len(buffer)]
                count = file.readinto(memoryview(buffer)[: len(part)])
                if (buffer if count == len(buffer) else buffer[:count]) != part:
                    raise CorruptShard(f"{path}: corrupt as soon as it was written; check the disk")


def check_shard(path: str, declared: ShardFile, *, content: bool, copy: str | None = None,
                retry_s: float = storage.RETRY_S) -> None:
    """Refuse a shard that is not what was saved: by its size, and with `content` by its hash.

    copy: a downloaded copy to look at instead.
    """
    source = copy or path
    local = storage.local_path(source)
    try:
        if local is not None and os.path.islink(local):
            raise CorruptShard(f"{path}: a symbolic link, which no save writes")
        num_bytes = storage.size(source, retry_s=retry_s)
        if num_bytes < declared.bytes:
            raise TruncatedShard(f"{path}: truncated, {num_bytes} of {declared.bytes} bytes")
        if num_bytes > declared.bytes:
            raise CorruptShard(f"{path}: {num_bytes} bytes where {declared.bytes} were saved")
        if content:
            digest = hashlib.sha256()
            for chunk in storage.read_chunks(source, retry_s=retry_s):
                digest.update(chunk)
            if digest.hexdigest() != declared.sha256:
                raise CorruptShard(f"{path}: corrupt, its sha256 is not the one that was saved")
    except FileNotFoundError:
        raise MissingShard(f"{path}: missing, though the manifest names it") from None


class Loader:
    """Reads rows of a committed checkpoint; opens, and verifies once, only the shards that hold them.

    Local shards are memory-mapped, remote ones downloaded once. Not for use by several threads at a time.
    """

    def __init__(self, path: str):
        self.path = path
        self.manifest = read_manifest(path)
        self._shards: dict[str, object] = {}
        self._downloads: tempfile.TemporaryDirectory | None = None

    @property
    def state(self) -> dict:
        return self.manifest.state

    def keys(self) -> list[str]:
        return list(self.manifest.tensors)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of `key` along dimension 0 (by default all), on the CPU, in memory of their own."""
        entry = self._entry(key)
        stop = entry.num_rows if stop is None else stop
        if not 0 <= start <= stop <= entry.num_rows:
            raise MissingTensor(f"{self.path}: {key} has {entry.num_rows} rows, not [{start}, {stop}); "
                                "use the model it was saved with")
        spans = [(span, max(start, span.start), min(stop, span.stop)) for span in entry.pieces]
        spans = [(span, first, last) for span, first, last in spans if first < last]
        for span, _, _ in spans:
            self._shard(span.file)  # verified before memory is taken on the manifest's word
        out = torch.empty((stop - start, *entry.shape[1:]) if entry.shape else (), dtype=DTYPES[entry.dtype])
        for span, first, last in spans:
            rows = self._rows(key, entry, span, first, last)
            (out[first - start : last - start] if entry.shape else out).copy_(rows)
        return out

    def check(self, *, content: bool = True) -> None:
        """Refuse the checkpoint unless every shard is there, of its size and (with `content`) its hash."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing does not hold the GIL
            checks = [pool.submit(check_shard, storage.join(self.path, name), file, content=content)
                      for name, file in self.manifest.files.items()]
            try:
                for check in checks:
                    check.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        self._shards.clear()
        if self._downloads is not None:
            self._downloads.cleanup()

    def _entry(self, key: str) -> Entry:
        if key not in self.manifest.tensors:
            raise MissingTensor(f"{self.path}: holds no {key}; use the model and optimizer it was saved with")
        return self.manifest.tensors[key]

    def _rows(self, key: str, entry: Entry, span: Span, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the global tensor out of the piece that holds them. May alias the mapped file."""
        shard, name = self._shard(span.file), tensor_name(key, entry, span)
        shape = [span.stop - span.start, *entry.shape[1:]] if entry.shape else []
        try:
            rows = shard.get_slice(name)
            if rows.get_shape() == shape and rows.get_dtype() == entry.dtype:
                return rows[start - span.start : stop - span.start] if shape else shard.get_tensor(name)
            reason = f"is {rows.get_dtype()} {rows.get_shape()}, the manifest says {entry.dtype} {shape}"
        except SafetensorError as error:
            reason = str(error)
        raise CorruptShard(f"{storage.join(self.path, span.file)}: {name}: {reason}")

    def _shard(self, name: str):
        if name not in self._shards:
            path, declared = storage.join(self.path, name), self.manifest.files[name]
            local = storage.local_path(path)
            if local is None:
                check_shard(path, declared, content=False)
                self._downloads = self._downloads or tempfile.TemporaryDirectory(prefix="sparing-checkpoint-")
                local = os.path.join(self._downloads.name, name)
                storage.download(path, local)
            check_shard(path, declared, content=True, copy=local)
            try:
                self._shards[name] = safe_open(local, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CorruptShard(f"{path}: {error}") from error
        return self._shards[name]


def _header(pieces: Sequence[Piece], index: list[tuple[str, Entry]]) -> bytes:
    names = (tensor_name(key, entry, entry.pieces[0]) for key, entry in index)
    return header_of((name, piece.tensor) for name, piece in zip(names, pieces, strict=True))


def header_of(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """Of a safetensors file with these in it, in order."""
    return safetensors_header((name, _DTYPE_NAMES[tensor.dtype], tensor.shape, tensor.nbytes)
                              for name, tensor in tensors)
