"""Files of a Hugging Face directory as mappings of tensors that are read when asked for. No names of ours here."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.quantize import E4M3, TILE, Quantized, weight_dequant

SCALE = "_scale_inv"
"""What DeepSeek's files append to the name of an E4M3 weight for its scales."""
MAPPED_BYTES = 32 * 2**20
"""Read of a directory between two times that its files are closed."""


class SafetensorsDirectory(Mapping[str, Tensor]):
    """Tensors of a model directory by name, each read when asked for. Files are only ever names in `path` itself.

    What was read of a mapped file stays in memory as long as the file is open: now and then all are closed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, safe_open] = {}
        self._bytes_read = 0
        if (path / "model.safetensors.index.json").exists():
            index = read_json(path / "model.safetensors.index.json")
            self.files = index.get("weight_map")
            if not isinstance(self.files, dict):
                raise ValueError(f"{path}/model.safetensors.index.json: has no weight_map; export the model again")
        else:
            self.files = dict.fromkeys(self._handle("model.safetensors").keys(), "model.safetensors")
        for file in set(map(str, self.files.values())):
            if not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", file):
                raise ValueError(f"{path}/model.safetensors.index.json: shard {file!r} must be a plain name ending in "
                                 f".safetensors; do not use this model unless you know who made it")

    def __getitem__(self, key: str) -> Tensor:
        file = self.files[key]
        handle = self._handle(file)
        if key not in handle.keys():
            raise ValueError(f"{self.path / file}: lacks {key}, which the index places there; export the model again")
        tensor = handle.get_tensor(key).clone()
        self._bytes_read += tensor.nbytes
        if self._bytes_read > MAPPED_BYTES:
            self._open, self._bytes_read = {}, 0
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def _handle(self, file: str):
        if file not in self._open:
            if not (self.path / file).is_file():
                raise ValueError(f"{self.path / file}: is missing; copy the whole directory")
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.path / file}: must be whole safetensors; copy it again ({error})") from None
        return self._open[file]


class Dequantized(Mapping[str, Tensor]):
    """Tensors of a DeepSeek FP8 checkpoint in fp32: values times the scales of their 128x128 blocks, exactly."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.names = dict.fromkeys(key for key in tensors if not key.endswith(SCALE))

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.tensors[key]
        if key + SCALE not in self.tensors:
            return tensor
        scale = self.tensors[key + SCALE].float()
        blocks = [-(-size // TILE) for size in tensor.shape]
        if tensor.dtype != E4M3 or list(scale.shape) != blocks:
            raise ValueError(f"{key}: is {tensor.dtype} with {list(scale.shape)} scales, must be {E4M3} with {blocks}, "
                             f"one for each block of {TILE}x{TILE}; take both from the same model")
        return weight_dequant(Quantized(tensor, scale))

    def __contains__(self, key: object) -> bool:
        return key in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]],
                       metadata: dict[str, str] | None = None) -> bytes:
    """Of a file with tensors (name, type as the format has it, shape, bytes) one behind the other: its length as 8
    bytes, then JSON padded with spaces to a multiple of 8."""
    fields, offset = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, dtype, shape, num_bytes in tensors:
        if name in fields:
            raise ValueError(f"{name}: handed in twice")
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; copy the whole directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: must be readable JSON; copy it again ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object; copy it again")
    return values
