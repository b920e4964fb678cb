"""Between this project's checkpoints and Hugging Face directories, both ways, tensor by tensor.

An imported checkpoint holds weights alone; `resume=` on it starts a new run from them.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from model import hf
from model.config import ModelConfig
from orchestrator.config import Config, from_dict, to_dict
from orchestrator.errors import BadRequest, NotFit
from orchestrator.train import storage
from orchestrator.train.checkpoint import Saver
from orchestrator.train.folder import check_new, filled
from orchestrator.train.lineage import TOKENIZER, newest_under, tokenizer_of
from orchestrator.train.shards import Loader, Piece
from orchestrator.train.tokenizer import TEMPLATE, bytes_as_files

FILE_BYTES = 2 << 30
"""Of an imported checkpoint's files, unless one tensor is larger."""
IMPORT_S = 7 * 86400.0
"""By when an import has ended: terabytes take hours."""
GENERATION = "generation_config.json"
BESIDE = (TOKENIZER, "tokenizer_config.json", TEMPLATE, GENERATION)
"""What tells text from tokens, what a conversation looks like and where a text ends; it travels with the weights."""


def export_checkpoint(checkpoint: str, out: str, *, dtype: torch.dtype = torch.float32) -> str:
    """Write the newest checkpoint under `checkpoint` (or itself) as a Hugging Face directory, its tokenizer with it
    where that is still to be found; returns its path."""
    path = newest_under(checkpoint)
    if path is None:
        raise BadRequest(f"{checkpoint}: no whole checkpoint there; name a run directory or a checkpoint in it")
    if storage.local_path(out) is None:
        raise BadRequest(f"{out}: must be a local directory; export there, then copy it")
    with filled(out):
        with contextlib.closing(Loader(path)) as loader, _plain_errors():
            config = from_dict(ModelConfig, loader.state["config"]["model"])
            hf.export(storage.local_path(out), config, StateDict(loader, config), dtype=dtype)
            tokenizer = tokenizer_of(path, loader.state)
        if tokenizer == "byte":
            for name, text in bytes_as_files().items():
                storage.write_bytes(storage.join(out, name), text.encode())
        elif tokenizer:
            _copy_tokenizer(tokenizer, out)
    return path


def import_hf(directory: str, out: str, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Write a Hugging Face directory as a checkpoint of weights under `out`, its tokenizer beside; returns the
    checkpoint's path. Tensors stream: a file or two of it are in memory at a time, not the model.

    on_progress(done, total): parameters.
    """
    if not os.path.isdir(directory):
        raise BadRequest(f"{directory}: is no directory; name one with config.json and model.safetensors")
    check_new(out)
    with _plain_errors():
        config, tensors = hf.load(directory)
    refused: list[Exception] = []

    def files() -> Iterator[list[Piece]]:
        try:
            yield from _grouped(_told(tensors, on_progress))
        except (ValueError, OSError) as error:  # in the saver's thread, which would say that a save has failed
            refused.append(error)
            raise

    with filled(out), _plain_errors():
        saver = Saver(out, rank=0, world_size=1, store=None, keep=0, fence="import", timeout_s=IMPORT_S)
        saver.save(0, [], {"weights_only": True, "config": to_dict(Config(model=config)), "progress": {}},
                   background=False, more=files())
        result = saver.wait()
        if not result.ok:
            raise refused[0] if refused else NotFit(f"{out}: {result.error}")
        _copy_tokenizer(os.path.join(directory, TOKENIZER), out)
    return result.path


def _copy_tokenizer(file: str, out: str) -> None:
    """With what says which token ends a text; that may be in config.json, which is not to be copied."""
    if not os.path.isfile(file):
        return
    folder = os.path.dirname(file)
    found = {name: os.path.join(folder, name) for name in BESIDE if os.path.isfile(os.path.join(folder, name))}
    for name, source in (found | {TOKENIZER: file}).items():
        with open(source, "rb") as read:
            storage.write_bytes(storage.join(out, name), read.read())
    with contextlib.suppress(OSError, ValueError, AttributeError):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as read:
            end = json.load(read).get("eos_token_id")
        if end is not None and GENERATION not in found:
            storage.write_bytes(storage.join(out, GENERATION), json.dumps({"eos_token_id": end}).encode())


EXPERTS = ".moe.experts."
"""Part of the names of stacked experts; a checkpoint keeps each apart."""


class StateDict(Mapping[str, Tensor]):
    """A checkpoint's weights under the model's names, each read when asked for, experts stacked again."""

    def __init__(self, loader: Loader, config: ModelConfig):
        self.loader = loader
        self.names = list(hf.tensor_shapes(config))
        self.num_experts = config.n_routed_experts

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        if EXPERTS not in name:
            return self.loader.read(f"model.{name}")
        return torch.stack(list(self.experts(name)))

    def experts(self, name: str) -> Iterator[Tensor]:
        """One after the other, those that `self[name]` stacks."""
        prefix, matrix = name.rsplit(".", 1)
        return (self.loader.read(f"model.{prefix}.{e}.{matrix}") for e in range(self.num_experts))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _pieces(name: str, tensors: "hf.Assembled") -> Iterator[Piece]:
    if EXPERTS not in name:
        tensor = tensors[name]
        yield Piece(f"model.{name}", tuple(tensor.shape), 0, tensor)
    else:
        prefix, matrix = name.rsplit(".", 1)
        for e, rows in enumerate(tensors.experts(name)):
            yield Piece(f"model.{prefix}.{e}.{matrix}", tuple(rows.shape), 0, rows)


def _told(tensors: "hf.Assembled", on_progress: Callable[[int, int], None]) -> Iterator[Piece]:
    done, total = 0, sum(shape.numel() for shape in tensors.shapes.values())
    for name in tensors:
        for piece in _pieces(name, tensors):
            done += piece.tensor.numel()
            on_progress(done, total)
            yield piece


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """In their order, as many as make a file."""
    group, size = [], 0
    for piece in pieces:
        if group and size + piece.tensor.nbytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.tensor.nbytes
    if group:
        yield group


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What the conversion refuses is a request that cannot be."""
    try:
        yield
    except ValueError as error:
        raise BadRequest(str(error)) from error
