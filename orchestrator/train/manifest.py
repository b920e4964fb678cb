"""What a checkpoint says about itself: `manifest.json`, written last, read strictly.

    {"format": "sparing-checkpoint", "version": 2, "step": 100, "attempt": 3, "fence": "...", "state": {...},
     "files":   {"rank-00000.safetensors": {"bytes": 4096, "sha256": "..."}},
     "experts": {"layers.1": 16, "mtp.0.block": 16},
     "tensors": {"model.layers.1.moe.experts.7.w13": {"dtype": "F32", "shape": [64, 32],
                                                      "pieces": [["rank-00000.safetensors", 0, 64]]}},
     "sha256": "..."}

A piece is rows [start, stop) of dimension 0; a scalar has one row. The pieces of a key tile its rows exactly, and the
experts are a census: each of these blocks has this many routed experts, each exactly once, in every tree of keys
(`model`, `optim.exp_avg`, ...) that holds experts. The last entry is the hash of all bytes before it (version 1 had
none). A manifest that says anything else is refused, by writer and reader.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.errors import BadRequest, NotTrustworthy
from orchestrator.train import storage

FORMAT, VERSION = "sparing-checkpoint", 2
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20
MAX_DIMS = 8
DIGEST_BYTES = 77
_DIGEST = re.compile(rb',"sha256":"([0-9a-f]{64})"}')
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
               "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Element types by the names of the safetensors format."""

SHARD_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")
KEY = re.compile(r"[A-Za-z0-9._-]{1,500}")
EXPERT_KEY = re.compile(r"(?P<tree>.*?)(?P<block>(?:layers|mtp)\.\d+(?:\.block)?)\.moe\.experts\."
                        r"(?P<expert>\d+)\.(?P<matrix>.+)")


class CheckpointNotFound(BadRequest):
    """There is nothing at this path."""


class NotCommitted(BadRequest):
    """Files without a manifest: a save that was interrupted, or is not finished."""


class FutureFormat(BadRequest):
    """Written by a newer version of the program."""


class MissingTensor(BadRequest):
    """A whole checkpoint that does not hold the rows asked for (more experts, no optimizer state, ...)."""


class Damaged(NotTrustworthy):
    """A committed checkpoint that is no longer what was committed; an older one may be whole."""


class CorruptManifest(Damaged):
    """The manifest breaks a rule of its format."""


class MissingShard(Damaged):
    """A file that the manifest names is not there."""


class TruncatedShard(Damaged):
    """A file is shorter than the manifest says."""


class CorruptShard(Damaged):
    """A file's content is not what was saved."""


@dataclass(frozen=True)
class ShardFile:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a global tensor, held by `file`."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Entry:
    """One global tensor; `pieces` in row order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Span, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    step: int
    attempt: int
    fence: str
    state: dict
    files: dict[str, ShardFile]
    experts: dict[str, int]
    tensors: dict[str, Entry]


def tensor_name(key: str, entry: Entry, span: Span) -> str:
    """A piece's name inside its shard: the key itself when the piece is the whole tensor."""
    return key if span.stop - span.start == entry.num_rows else f"{key}@{span.start}"


def read_manifest(path: str, *, retry_s: float = storage.RETRY_S) -> Manifest:
    """The checked manifest of the checkpoint at `path`."""
    file = storage.join(path, MANIFEST)
    try:
        if (num_bytes := storage.size(file, retry_s=retry_s)) > MAX_MANIFEST_BYTES:
            raise CorruptManifest(f"{file}: {num_bytes} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
        data = storage.read_bytes(file, retry_s=retry_s)
    except (FileNotFoundError, NotADirectoryError):
        if storage.list_dir(path, retry_s=retry_s):
            raise NotCommitted(f"{path}: no {MANIFEST}, so this save was never finished; "
                               "use another checkpoint") from None
        raise CheckpointNotFound(f"{path}: no checkpoint here; check the path") from None
    try:
        return parse(data)
    except FutureFormat as error:
        raise FutureFormat(f"{file}: {error}") from None
    except ValueError as error:
        raise CorruptManifest(f"{file}: {error}; use an older checkpoint") from None


def dump(manifest: Manifest) -> bytes:
    tensors = {key: {"dtype": entry.dtype, "shape": entry.shape,
                     "pieces": [[span.file, span.start, span.stop] for span in entry.pieces]}
               for key, entry in sorted(manifest.tensors.items())}
    files = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in sorted(manifest.files.items())}
    data = json.dumps({"format": FORMAT, "version": VERSION, "step": manifest.step, "attempt": manifest.attempt,
                       "fence": manifest.fence, "state": manifest.state, "files": files, "experts": manifest.experts,
                       "tensors": tensors}, allow_nan=False, separators=(",", ":")).encode()[:-1]
    return data + f',"sha256":"{hashlib.sha256(data).hexdigest()}"}}'.encode()


def parse(data: bytes) -> Manifest:
    """The manifest in `data` with every rule of the format checked, else ValueError saying which one is broken."""
    trailer = _DIGEST.fullmatch(data[-DIGEST_BYTES:])
    if trailer and hashlib.sha256(data[:-DIGEST_BYTES]).hexdigest() != trailer[1].decode():
        raise ValueError("its sha256 is not the one that was saved")
    try:
        raw = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f'no "format": "{FORMAT}"')
    if (version := _integer(raw.get("version"), "version")) > VERSION:
        raise FutureFormat(f"format version {version}; this program reads up to {VERSION}: upgrade it")
    keys = {"format", "version", "step", "attempt", "fence", "state", "files", "experts", "tensors"}
    _exactly(raw, keys | {"sha256"} if version > 1 else keys, "manifest")
    if version > 1 and not trailer:
        raise ValueError("its sha256 is not at its end")
    if not isinstance(raw["fence"], str) or not isinstance(raw["state"], dict):
        raise ValueError("fence is not a string, or state is not an object")
    files = {name: _file(name, value) for name, value in _items(raw["files"], "files")}
    tensors = {key: _entry(key, value, files) for key, value in _items(raw["tensors"], "tensors")}
    experts = {block: _integer(count, f"experts {block}", 1) for block, count in _items(raw["experts"], "experts")}
    _check_sizes(tensors, files)
    if (found := expert_census(tensors)) != experts:
        raise ValueError(f"experts: {experts} declared, {found} present")
    return Manifest(_integer(raw["step"], "step"), _integer(raw["attempt"], "attempt"), raw["fence"], raw["state"],
                    files, experts, tensors)


def check_cover(key: str, entry: Entry) -> None:
    """Every row of a tensor in exactly one piece."""
    position, held_by = 0, ""
    for span in entry.pieces:
        if span.start < position:
            raise ValueError(f"{key}: rows {span.start} to {position} are both in {held_by} and in {span.file}")
        if span.start > position:
            raise ValueError(f"{key}: rows {position} to {span.start} of {entry.num_rows} are in no shard")
        position, held_by = span.stop, span.file
    if position > entry.num_rows:
        raise ValueError(f"{key}: {held_by} has it up to row {position} of {entry.num_rows}")
    if position < entry.num_rows:
        raise ValueError(f"{key}: rows {position} to {entry.num_rows} of {entry.num_rows} are in no shard")


def expert_census(keys: Iterable[str], expected: Mapping[str, int] | None = None) -> dict[str, int]:
    """Number of routed experts of each MoE block, each exactly once in every tree and matrix, else ValueError.

    `expected` is what the model has; without it, what the blocks' trees and matrices show together.
    """
    found: dict[tuple[str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for key in keys:
        if match := EXPERT_KEY.fullmatch(key):
            experts = found[match["tree"], match["matrix"]][match["block"]]
            if match["expert"] != str(int(match["expert"])):
                raise ValueError(f"{key}: expert {match['expert']} is not a plain number")
            experts.add(int(match["expert"]))
    census = dict(expected or {})
    if expected is None:
        for blocks in found.values():
            for block, experts in blocks.items():
                census[block] = max(census.get(block, 0), 1 + max(experts))
    if census and not found:
        raise ValueError(f"experts: {len(census)} MoE blocks expected, none present")
    for (tree, matrix), blocks in found.items():
        if strangers := set(blocks) - set(census):
            raise ValueError(f"experts: {tree}{min(strangers)} is no MoE block of this model")
        for block, count in census.items():
            present = blocks.get(block, set())
            if len(present) != count or max(present) != count - 1:
                wrong = sorted(set(range(count)) ^ present) if count < 1 << 20 else []
                raise ValueError(f"experts: {tree}{block}.moe.experts.*.{matrix}: {len(present)} of {count} experts "
                                 f"present; missing or unknown: {wrong[:8]}")
    return census


def _file(name: str, value: object) -> ShardFile:
    if not SHARD_NAME.fullmatch(name):
        raise ValueError(f"files: {name[:80]!r} is not a plain *.safetensors name")
    _exactly(value, {"bytes", "sha256"}, name)
    if not isinstance(value["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", value["sha256"]):
        raise ValueError(f"{name}: sha256 is not 64 hex digits")
    return ShardFile(_integer(value["bytes"], name), value["sha256"])


def _entry(key: str, value: object, files: Mapping[str, ShardFile]) -> Entry:
    if not KEY.fullmatch(key):
        raise ValueError(f"tensors: {key[:80]!r} is not a plain dotted name")
    _exactly(value, {"dtype", "shape", "pieces"}, key)
    shape, pieces = value["shape"], value["pieces"]
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"{key}: dtype {value['dtype']!r} is not known")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not isinstance(pieces, list):
        raise ValueError(f"{key}: shape or pieces is not a list of the right length")
    shape = tuple(_integer(dim, key) for dim in shape)
    spans = []
    for piece in pieces:
        if not isinstance(piece, list) or len(piece) != 3 or not isinstance(piece[0], str) or piece[0] not in files:
            raise ValueError(f"{key}: a piece is not [file of this checkpoint, start, stop]")
        start = _integer(piece[1], key)
        spans.append(Span(piece[0], start, _integer(piece[2], key, start + 1)))
    entry = Entry(value["dtype"], shape, tuple(spans))
    check_cover(key, entry)
    return entry


def _check_sizes(tensors: Mapping[str, Entry], files: Mapping[str, ShardFile]) -> None:
    needed: dict[str, int] = defaultdict(int)
    for entry in tensors.values():
        for span in entry.pieces:
            needed[span.file] += (span.stop - span.start) * entry.row_bytes
    for name, file in files.items():
        if needed[name] > file.bytes:
            raise ValueError(f"{name}: its tensors need {needed[name]} bytes, it has {file.bytes}")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _items(value: object, name: str) -> Iterable[tuple[str, object]]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return value.items()


def _exactly(value: object, keys: set[str], name: str) -> None:
    if not isinstance(value, dict) or set(value) != keys:
        raise ValueError(f"{name}: not an object with exactly {', '.join(sorted(keys))}")


def _integer(value: object, name: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 62:
        raise ValueError(f"{name}: {str(value)[:40]!r} is not an integer of at least {least}")
    return value
