"""Tensors and files in Hugging Face's form, both directions.

`to_hf`/`from_hf` translate tensors, `export`/`load` whole directories of safetensors and config.json
(model/hf_config.py). Tensors stream: at most one shard is in memory. Nothing is unpickled, no code is run, and every
tensor must be there, known and of the right shape, or the whole is refused.

On disk every expert has its own three matrices, as in released files (transformers 5 fuses them on loading). MTP
modules are the extra layers `model.layers.{n_layers + k}` of DeepSeek-V3's files, with their copies of embedding and
head; `transformers` loads the rest and leaves them be. No rotary dimension is reordered: both sides read DeepSeek's
interleaved pairs as they are.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.config import Attention, ModelConfig
from model.hf_config import FAMILIES, config_from_hf, config_to_hf, family_of
from model.hf_files import SCALE, Dequantized, SafetensorsDirectory, read_json
from model.quantize import E4M3, weight_quant
from model.transformer import Transformer

PROJECTION = re.compile(r"(?<!\.eh)_proj(_with_mqa)?\.weight$|\.w[123]\.weight$")
"""What they hold in E4M3: every projection of a block, not the router, nor the MTP module's own (`eh_proj`)."""


def export(path: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor], *,
           dtype: torch.dtype = torch.float32, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads; config.json comes last.

    tensors: our state dict, or a mapping that reads each tensor as it is asked for. Router biases stay fp32. With
    dtype=torch.float8_e4m3fn the files are as DeepSeek releases them: projections in 128x128 blocks of E4M3, each with
    a `weight_scale_inv` in fp32 beside it, the rest bf16.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: must be a new or empty directory; name another one")
    metadata = config_to_hf(config, dtype=dtype)
    shards = _plan_shards(config, dtype, max_shard_bytes)
    path.mkdir(parents=True, exist_ok=True)
    weight_map, total, stream = {}, 0, to_hf(tensors, config)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {}
        for name in names:
            key, tensor = next(stream)
            assert key == name
            shard |= _as_stored(key, tensor, dtype)
        total += sum(tensor.nbytes for tensor in shard.values())
        _save(shard, path / file)
        weight_map |= dict.fromkeys(shard, file)
    _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(path / "config.json", metadata)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """What the disk refuses is the system's error, as of any file; the library has its number in its words alone."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error


def load(path: str | Path) -> tuple[ModelConfig, "Assembled"]:
    """The shape and our tensors of a directory with config.json and safetensors, each read when asked for.

    MTP modules that config.json announces and the files do not have (`transformers` drops them on saving) are
    left out of the shape.
    """
    path = Path(path)
    config = config_from_hf(read_json(path / "config.json"), name=path.resolve().name)
    files = SafetensorsDirectory(path)
    if any(key.endswith(SCALE) for key in files):
        files = Dequantized(files)
    if not any(key.startswith(f"model.layers.{config.n_layers}.") for key in files):
        config = dataclasses.replace(config, n_mtp_layers=0)
    return config, from_hf(files, config)


def to_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names and tensors in the model's order; views of ours where a view will do."""
    shapes = tensor_shapes(config)
    _check_names(set(tensors), set(shapes), set(shapes))
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}, must have {list(shape)}; "
                             f"give the whole model's tensor and the shape it was built from")
        for part in _parts(name, shape, config):
            yield part.key, part.of_ours(tensor)


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> "Assembled":
    """Our tensors in the model's order, from a mapping of Hugging Face's that may read lazily."""
    return Assembled(tensors, config)


class Assembled(Mapping[str, Tensor]):
    """Our tensors, each put together from Hugging Face's when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], config: ModelConfig):
        self.tensors, self.shapes = tensors, tensor_shapes(config)
        self.parts = {name: _parts(name, shape, config) for name, shape in self.shapes.items()}
        required = {part.key for group in self.parts.values() for part in group if not part.copy}
        known = {part.key for group in self.parts.values() for part in group}
        # Old files hold rotary frequencies, which are computed here, and a tied head beside its embedding.
        ignored = {key for key in tensors if key.endswith("rotary_emb.inv_freq")}
        if config.tie_embeddings:
            ignored.add("lm_head.weight")
        _check_names(set(tensors) - ignored, required, known)

    def __getitem__(self, name: str) -> Tensor:
        return _assemble(self.tensors, self.shapes[name], self.parts[name])

    def experts(self, name: str) -> Iterator[Tensor]:
        """One after the other, those that `self[name]` stacks."""
        number, *shape = self.shapes[name]
        groups = [[] for _ in range(number)]
        for part in self.parts[name]:
            groups[part.index[0]].append(dataclasses.replace(part, index=part.index[1:]))
        return (_assemble(self.tensors, torch.Size(shape), group) for group in groups)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def tensor_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the model's state dict, built without memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor as a piece of ours."""

    key: str
    index: tuple = ()
    """Which piece: an expert, then rows."""
    swapped: bool = False
    """Whether the two halves of the last axis trade places."""
    copy: bool = False
    """Whether it repeats what another holds: written always, and on reading compared where present."""

    def of_ours(self, tensor: Tensor) -> Tensor:
        return self.of_theirs(tensor[self.index])

    def of_theirs(self, piece: Tensor) -> Tensor:
        return piece.roll(piece.shape[-1] // 2, -1) if self.swapped else piece


# Modules of a block, and of an MTP module around its block.
_MODULES = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "attention.k_norm": "self_attn.k_norm",
    "attention.wq_a": "self_attn.q_a_proj", "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa", "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "ffn": "mlp", "moe.shared_experts": "mlp.shared_experts",
    "embed_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm",
}


def _parts(name: str, shape: torch.Size, config: ModelConfig) -> list[Part]:
    """Where a tensor of ours lies among Hugging Face's."""
    mtp = [f"model.layers.{config.n_layers + depth}." for depth in range(config.n_mtp_layers)]
    heads = [Part(f"{prefix}shared_head.head.weight", copy=True) for prefix in mtp]
    if name == "tok_embeddings.weight":
        tables = [Part(f"{prefix}embed_tokens.weight", copy=True) for prefix in mtp]
        return [Part("model.embed_tokens.weight"), *tables, *(heads if config.tie_embeddings else [])]
    if name == "lm_head.weight":
        return [Part(name), *heads]
    if name == "norm.weight":
        return [Part("model.norm.weight")]
    kind, number, rest = name.split(".", 2)
    prefix = f"model.layers.{number}." if kind == "layers" else mtp[int(number)]
    return _block_parts(prefix, rest.removeprefix("block."), shape, config)


def _block_parts(prefix: str, rest: str, shape: torch.Size, config: ModelConfig) -> list[Part]:
    module, leaf = rest.rsplit(".", 1)
    if module.startswith("moe.router") or module == "moe.experts":
        routed, *matrices = FAMILIES[family_of(config)].routed
        if module == "moe.experts":
            return _expert_parts(f"{prefix}{routed}.experts", leaf, shape, *matrices)
        return [Part(f"{prefix}{routed}.gate.{'e_score_correction_bias' if leaf == 'expert_bias' else leaf}")]
    outer, _, matrix = module.rpartition(".")
    if matrix == "w13":
        gate, up = slice(0, shape[0] // 2), slice(shape[0] // 2, None)
        return [Part(f"{prefix}{_MODULES[outer]}.{matrix}.{leaf}", (rows,))
                for matrix, rows in (("gate_proj", gate), ("up_proj", up))]
    if matrix == "w2":
        return [Part(f"{prefix}{_MODULES[outer]}.down_proj.{leaf}")]
    if module == "attention.q_norm":
        return [Part(f"{prefix}self_attn.{'q_a_layernorm' if config.attention is Attention.mla else 'q_norm'}.{leaf}")]
    # Ours reads [hidden; embedding], the released files' [embedding; hidden].
    return [Part(f"{prefix}{_MODULES[module]}.{leaf}", swapped=module == "proj")]


def _expert_parts(prefix: str, leaf: str, shape: torch.Size, gate: str, up: str, down: str) -> list[Part]:
    if leaf == "w2":
        return [Part(f"{prefix}.{e}.{down}.weight", (e,)) for e in range(shape[0])]
    half = shape[1] // 2
    return [Part(f"{prefix}.{e}.{matrix}.weight", (e, rows)) for e in range(shape[0])
            for matrix, rows in ((gate, slice(0, half)), (up, slice(half, None)))]


def _assemble(tensors: Mapping[str, Tensor], shape: torch.Size, parts: list[Part]) -> Tensor:
    out, whole = None, torch.empty(shape, device="meta")
    for part in parts:
        if part.copy and part.key not in tensors:
            continue
        piece, expected = tensors[part.key], whole[part.index].shape
        if piece.shape != expected:
            raise ValueError(f"{part.key}: has shape {list(piece.shape)}, must have {list(expected)} by config.json; "
                             f"take both from the same model")
        if not piece.dtype.is_floating_point or piece.dtype.itemsize == 1:
            raise ValueError(f"{part.key}: is {piece.dtype}, must be bf16, fp16 or fp32, or E4M3 with {SCALE[1:]}; "
                             f"convert the model first")
        if part.copy:
            if not torch.equal(piece, out):
                raise ValueError(f"{part.key}: must equal {parts[0].key}, which MTP modules share; "
                                 f"an own table for them is not implemented")
            continue
        piece = part.of_theirs(piece)
        if not part.index:
            out = piece
            continue
        out = torch.empty(shape, dtype=piece.dtype) if out is None else out
        out[part.index] = piece
    return out


def _check_names(present: set[str], required: set[str], known: set[str]) -> None:
    for what, names, remedy in [("missing", required - present, "take all shards of the model"),
                                ("not of this shape", present - known, "take config and tensors from the same model")]:
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"{len(names)} tensors are {what}, such as {some}; {remedy}")


def _plan_shards(config: ModelConfig, dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """Names of each shard, in the order of `to_hf`, none larger than `max_bytes` unless one tensor is."""
    shards, room = [[]], max_bytes
    for name, shape in tensor_shapes(config).items():
        whole = torch.empty(shape, device="meta")
        for part in _parts(name, shape, config):
            size = sum(tensor.nbytes for tensor in _as_stored(part.key, whole[part.index], dtype).values())
            if size > room and shards[-1]:
                shards.append([])
                room = max_bytes
            shards[-1].append(part.key)
            room -= size
    return shards


def _as_stored(key: str, tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the files hold of a tensor. Clones, since safetensors refuses tensors that share memory, as one matrix's
    gate and up rows do."""
    if dtype == E4M3 and PROJECTION.search(key):
        quantized = weight_quant(tensor)
        return {key: quantized.data, key + SCALE: quantized.scale}
    kept = torch.bfloat16 if dtype == E4M3 else dtype
    kept = torch.float32 if key.endswith("e_score_correction_bias") else kept
    return {key: tensor.to(kept, copy=True).contiguous()}


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
