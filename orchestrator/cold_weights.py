"""Loading a model into less memory than it takes: its experts go into a store on disk once, and stay there.

`load_within` is `load_for_inference` with a limit. Stores are kept by content under `cache_dir`, so a second start is
quick; they may be deleted whenever no process uses them.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from model import hf
from model.cold_experts import Ahead, ColdExperts, HotExperts, Store, write_store
from model.packed import FORMATS, packed_bytes, unpacking_bytes
from model.transformer import Transformer
from orchestrator.errors import BadRequest, NotFit
from orchestrator.inference import (
    Loaded,
    Weights,
    cache_bytes,
    finish_loading,
    forward_bytes,
    free_bytes,
    open_weights,
    plain_errors,
    read_tokenizer,
)
from orchestrator.train import storage
from orchestrator.train.export import EXPERTS, StateDict
from orchestrator.train.memory import return_freed_memory

GIB = 2**30


def load_within(path: str, *, max_gib: float, form: str = "fp32", tokenizer: str = "", cache_tokens: int = 0,
                at_once: int = 0, read_ahead: bool = True, device: torch.device | str = "cpu",
                dtype: torch.dtype = torch.float32, cache_dir: str = "") -> Loaded:
    """Read all but the experts into memory; hot experts fill what is left of `max_gib`.

    form: of the experts (model/packed.py). cache_tokens: whose keys and values will be kept. at_once: tokens that one
    forward reads, where more than a prompt's chunk. cache_dir: by default sparing/experts in the user's cache folder.
    BadRequest where the rest alone is more than the limit.
    """
    if form not in FORMATS:
        raise BadRequest(f"weights={form}: must be one of {', '.join(FORMATS)}; use weights=bf16")
    with open_weights(path) as weights, plain_errors():
        shapes = hf.tensor_shapes(weights.config)
        if not any(EXPERTS in name for name in shapes):
            raise BadRequest(f"memory.max_gib={max_gib:g}: {path} has no experts that could stay on disk; leave it out")
        cache = cache_bytes(weights.config, cache_tokens, dtype)
        rest = sum(shape.numel() * dtype.itemsize for name, shape in shapes.items() if EXPERTS not in name)
        try:
            first = _first_layer(shapes)
            expert = [shape[1:] for name, shape in shapes.items() if name.startswith(first)]
            each = sum(packed_bytes(*shape, form) for shape in expert)
        except ValueError as error:
            raise BadRequest(f"weights={form}: {error}") from error
        # A forward's own memory, and room to unpack an expert in.
        working = forward_bytes(weights.config, cache_tokens, at_once, dtype, device, in_turn=True)
        working += sum(unpacking_bytes(*shape, form, dtype) for shape in expert)
        least = rest + cache + working + 2 * each
        if max_gib * GIB < least:
            raise BadRequest(f"memory.max_gib={max_gib:g}: must be at least {least / GIB * 1.005:.3g}, what all but "
                             f"the experts ({rest / GIB:.3g}), keys and values ({cache / GIB:.3g}), a forward "
                             f"({working / GIB:.3g}) and two experts take; use memory.max_gib={least / GIB * 1.1:.2g}")
        _check_free(shapes, form, int(max_gib * GIB), rest + cache + working, device)
        return_freed_memory()
        text = read_tokenizer(weights, tokenizer)
        folder, kept = _prepare(weights, shapes, form, _cache(cache_dir))
        tensors = kept or {name: weights.tensors[name] for name in weights.tensors if EXPERTS not in name}
        with torch.device("meta"):
            model = Transformer(weights.config)
        hot = HotExperts(int(max_gib * GIB) - rest - cache - working)
        _place(model, folder, hot, read_ahead=read_ahead)
        return finish_loading(weights, model, tensors.items(), text, device=device, dtype=dtype)


def _cache(folder: str) -> Path:
    try:
        return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sparing", "experts")).expanduser()
    except RuntimeError as error:
        raise NotFit(f"memory.max_gib: experts have no place on disk ({error}); set XDG_CACHE_HOME to a "
                     "folder") from None


def _check_free(shapes: dict[str, torch.Size], form: str, limit: int, rest: int, device: torch.device | str) -> None:
    """Refuse a limit that is more than there is, unless the model takes less."""
    free = free_bytes(device)
    if free is not None and min(limit, rest + _stored_bytes(shapes, form)) > free:
        raise BadRequest(f"memory.max_gib={limit / GIB:g}: only {free / GIB:.2f} GiB are free here; end other "
                         f"programs, or use memory.max_gib={free / GIB * 0.8:.2g}")


def _stored_bytes(shapes: dict[str, torch.Size], form: str) -> int:
    return sum(shape[0] * packed_bytes(*shape[1:], form) for name, shape in shapes.items() if EXPERTS in name)


def _place(model: Transformer, folder: Path, hot: HotExperts, *, read_ahead: bool) -> None:
    """Cold experts instead of those on the meta device, each knowing the next layer's."""
    before: ColdExperts | None = None
    for layer, (name, module) in enumerate((name, module) for name, module in model.named_modules()
                                           if hasattr(module, "experts") and hasattr(module, "router")):
        stores = [Store(folder / f"{name}.experts.{matrix}.safetensors") for matrix in ("w13", "w2")]
        module.experts = ColdExperts(layer, stores, hot)
        if before is not None and read_ahead:
            before.ahead = Ahead(module.experts, module.router)
        before = module.experts


def _prepare(weights: Weights, shapes: dict[str, torch.Size], form: str,
             cache: Path) -> tuple[Path, dict[str, Tensor]]:
    """The store's directory, written first if it is not there; then also all tensors but the experts, if at hand."""
    target = cache / f"{_identity(weights)}-{form}"
    _remove_unfinished(cache)
    if target.is_dir():
        return target, {}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary, lock = _unfinished(cache)
    except OSError as error:
        raise NotFit(f"{cache}: {error.strerror}; make it writable") from error
    kept: dict[str, Tensor] = {}
    size = _stored_bytes(shapes, form) / GIB
    print(f"writing experts to {target} once ({size:.3g} GiB)", file=sys.stderr, flush=True)
    try:
        for name in weights.tensors:
            if EXPERTS not in name:
                kept[name] = weights.tensors[name]
                continue
            number, *shape = shapes[name]
            write_store(temporary / f"{name}.safetensors", weights.tensors.experts(name), number=number,
                        shape=tuple(shape), form=form)
        os.replace(temporary, target)
    except OSError as error:
        if not target.is_dir():  # another process was quicker
            raise NotFit(f"{target}: {error.strerror}; make room there") from error
    except (ImportError, ValueError) as error:
        raise BadRequest(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)
    return target, kept


def _unfinished(cache: Path) -> tuple[Path, int]:
    """A new directory to write a store into, and its lock, which ends with this process however it ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".", dir=cache))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():  # unless it was removed before the lock was ours
            return folder, lock
        os.close(lock)


def _remove_unfinished(cache: Path) -> None:
    """What processes that were killed left of their stores: directories that nobody holds the lock of."""
    for folder in cache.glob(".*/"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _identity(weights: Weights) -> str:
    """Changes with the weights: of a checkpoint by its manifest, of a directory by its place and its files' names,
    sizes, times."""
    digest = hashlib.sha256()
    if isinstance(weights.tensors, StateDict):
        digest.update(repr(sorted(weights.tensors.loader.manifest.files.items())).encode())
    else:
        digest.update(os.path.realpath(weights.path).encode())
        for file in sorted(Path(storage.local_path(weights.path)).glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _first_layer(shapes: dict[str, torch.Size]) -> str:
    name = next(name for name in shapes if EXPERTS in name)
    return name[: name.index(EXPERTS) + len(EXPERTS)]


def experts_of(model: nn.Module) -> list[ColdExperts]:
    """All of a model's, in order; empty where its experts are in memory."""
    return [module for module in model.modules() if isinstance(module, ColdExperts)]
