"""Hugging Face's names and files, both directions; no other file knows them.

`config_to_hf`/`config_from_hf` translate config.json, `to_hf`/`from_hf` the tensors, `export`/`load` whole
directories of safetensors. Tensors stream: at most one shard is in memory. Nothing is unpickled, no code is run,
and every tensor must be there, known and of the right shape, or the whole is refused.

A family is what `transformers` calls a model type; a shape belongs to the first family that implies nothing false
of it. On disk every expert has its own three matrices, as in the released files. MTP modules are the extra layers
`model.layers.{n_layers + k}` of DeepSeek-V3's files, with their copies of embedding and head; `transformers` loads
the rest and leaves them be. Training settings (biases' speed, loss weights) have no place in config.json.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import Attention, ModelConfig, QKNorm, ScoreFunc
from model.transformer import Transformer


def export(path: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor], *,
           dtype: torch.dtype = torch.float32, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads; config.json comes last.

    tensors: our state dict, or a mapping that reads each tensor as it is asked for. Router biases stay fp32.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path={path}: must be a new or empty directory; name another one")
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
            # A clone, since safetensors refuses tensors that share memory, as one matrix's gate and up rows do.
            shard[key] = tensor.to(_dtype_of(key, dtype), copy=True).contiguous()
            total += shard[key].nbytes
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(path / "config.json", metadata)


def load(path: str | Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The shape and, one by one, our tensors of a directory with config.json and safetensors.

    MTP modules that config.json announces and the files do not have (`transformers` drops them on saving) are
    left out of the shape.
    """
    path = Path(path)
    config = config_from_hf(_read_json(path / "config.json"), name=path.resolve().name)
    files = SafetensorsDirectory(path)
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
            piece = tensor[part.index]
            yield part.key, _swap_halves(piece) if part.swapped else piece


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors in the model's order, from a mapping of Hugging Face's that may read lazily."""
    shapes = tensor_shapes(config)
    parts = {name: _parts(name, shape, config) for name, shape in shapes.items()}
    required = {part.key for group in parts.values() for part in group if not part.copy}
    known = {part.key for group in parts.values() for part in group}
    # Old files hold rotary frequencies, which are computed here, and a tied head beside its embedding.
    ignored = {key for key in tensors if key.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        ignored.add("lm_head.weight")
    _check_names(set(tensors) - ignored, required, known)
    for name, shape in shapes.items():
        yield name, _assemble(tensors, shape, parts[name])


def config_to_hf(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> dict:
    """config.json. `ValueError` for a shape that no family of `transformers` has."""
    model_type = _family_of(config)
    family = FAMILIES[model_type]
    _check_top_1(config)
    values = {key: _TO_HF.get(key, lambda value: value)(getattr(config, ours))
              for key, ours in (COMMON | family.keys).items()}
    if model_type == "deepseek_v2":
        values["topk_method"] = "group_limited_greedy" if config.n_expert_groups > 1 else "greedy"
    return {"architectures": [family.architecture], "model_type": model_type,
            "torch_dtype": str(dtype).removeprefix("torch."), **values, **family.constants,
            "rope_theta": config.rope_theta, "rope_scaling": _yarn_to_hf(config),
            "hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def config_from_hf(values: Mapping, *, name: str = "custom") -> ModelConfig:
    """The shape that a config.json describes. `ValueError` names what cannot be expressed."""
    family = _family_named(values.get("architectures"))
    for key, only in {**family.constants, "hidden_act": "silu", "quantization_config": None}.items():
        if values.get(key, only) != only:
            raise ValueError(f"config.json: {key}={values[key]}: must be {only}, nothing else is implemented; "
                             f"convert the model first or choose another")
    rope = values.get("rope_parameters") or {**(values.get("rope_scaling") or {}),
                                             "rope_theta": values.get("rope_theta", 10000.0)}
    found = {"name": name, **family.implied, **_yarn_from_hf(rope)}
    for key, ours in (COMMON | family.keys).items():
        found[ours] = _FROM_HF.get(key, lambda value: value)(_look_up(key, {**rope, **values}))
    if found.get("n_routed_experts"):
        found |= family.implied_of_experts
    else:
        found |= dict(n_dense_layers=found["n_layers"], n_routed_experts=0, n_shared_experts=0, moe_inter_dim=0,
                      n_activated_experts=0, expert_bias=False, balance_loss_weight=0.0)
    defaults = vars(ModelConfig())
    config = ModelConfig(**{key: type(defaults[key])(value) for key, value in found.items()})
    config.check()
    _check_top_1(config)
    return config


def tensor_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the model's state dict, built without memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


class SafetensorsDirectory(Mapping[str, Tensor]):
    """Tensors of a model directory by name, each read when asked for. Files are only ever names in `path` itself."""

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, safe_open] = {}
        if (path / "model.safetensors.index.json").exists():
            index = _read_json(path / "model.safetensors.index.json")
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
        return handle.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def _handle(self, file: str):
        if file not in self._open:
            if not (self.path / file).is_file():
                raise ValueError(f"{self.path / file}: is missing; copy the whole directory")
            self._open[file] = safe_open(self.path / file, framework="pt")
        return self._open[file]


@dataclass(frozen=True)
class Family:
    architecture: str
    implied: dict[str, object]
    """Our fields that have this value in every model of the family."""
    implied_of_experts: dict[str, object] | None
    """The same where there are routed experts; none if the family has none."""
    keys: dict[str, str]
    """config.json's keys, beside the common ones, and our fields."""
    constants: dict[str, object]
    """config.json's keys that can have this value only."""
    experts: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")
    """The routed layer's module and an expert's three matrices."""


COMMON = {"vocab_size": "vocab_size", "max_position_embeddings": "max_seq_len", "hidden_size": "dim",
          "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "intermediate_size": "inter_dim",
          "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std",
          "num_nextn_predict_layers": "n_mtp_layers"}
_MLA = {key: key for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
_GQA = {"num_key_value_heads": "n_kv_heads", "head_dim": "head_dim"}
_DEEPSEEK_MOE = {"first_k_dense_replace": "n_dense_layers", "n_routed_experts": "n_routed_experts",
                 "n_shared_experts": "n_shared_experts", "num_experts_per_tok": "n_activated_experts",
                 "moe_intermediate_size": "moe_inter_dim", "n_group": "n_expert_groups",
                 "topk_group": "n_limited_groups", "routed_scaling_factor": "route_scale"}
_QWEN_MOE = {"num_experts": "n_routed_experts", "num_experts_per_tok": "n_activated_experts",
             "norm_topk_prob": "norm_topk"}
_BIASED = {"score_func": ScoreFunc.sigmoid, "expert_bias": True}
_SOFTMAX = {"score_func": ScoreFunc.softmax, "expert_bias": False}
_ROUTED_ALONE = _SOFTMAX | {"n_dense_layers": 0, "n_shared_experts": 0, "n_expert_groups": 1, "n_limited_groups": 1,
                            "route_scale": 1.0}
_PLAIN = {"attention": Attention.gqa, "qk_norm": QKNorm.none, "qkv_bias": False, "rotary_fraction": 1.0,
          "rope_interleaved": False}

FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", {"attention": Attention.mla}, _BIASED,
        _MLA | _DEEPSEEK_MOE | {"norm_topk_prob": "norm_topk", "rope_interleave": "rope_interleaved"},
        {"attention_bias": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM", {"attention": Attention.mla, "rope_interleaved": True},
        _SOFTMAX | {"norm_topk": False}, _MLA | _DEEPSEEK_MOE,
        {"attention_bias": False, "scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1}),
    "llama": Family("LlamaForCausalLM", _PLAIN, None, _GQA, {"attention_bias": False, "mlp_bias": False}),
    "qwen2": Family("Qwen2ForCausalLM", _PLAIN | {"qkv_bias": True}, None, _GQA, {"use_sliding_window": False}),
    "qwen3": Family("Qwen3ForCausalLM", _PLAIN | {"qk_norm": QKNorm.head}, None, _GQA,
                    {"attention_bias": False, "use_sliding_window": False}),
    "mixtral": Family(
        "MixtralForCausalLM", _PLAIN, _ROUTED_ALONE | {"norm_topk": True},
        _GQA | {"intermediate_size": "moe_inter_dim", "num_local_experts": "n_routed_experts",
                "num_experts_per_tok": "n_activated_experts"},
        {"sliding_window": None}, ("block_sparse_moe", "w1", "w3", "w2")),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", _PLAIN | {"qk_norm": QKNorm.head}, _ROUTED_ALONE,
        _GQA | _QWEN_MOE | {"moe_intermediate_size": "moe_inter_dim"},
        {"attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "olmoe": Family(
        "OlmoeForCausalLM", _PLAIN | {"qk_norm": QKNorm.full}, _ROUTED_ALONE,
        _GQA | _QWEN_MOE | {"intermediate_size": "moe_inter_dim"}, {"attention_bias": False, "clip_qkv": None}),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM", {"attention": Attention.gqa, "rope_interleaved": False}, _BIASED,
        _GQA | _DEEPSEEK_MOE | {"norm_topk_prob": "norm_topk", "use_qk_norm": "qk_norm", "attention_bias": "qkv_bias",
                                "partial_rotary_factor": "rotary_fraction"}, {}),
}

_TO_HF = {"q_lora_rank": lambda rank: rank or None, "use_qk_norm": lambda norm: norm is QKNorm.head}
_FROM_HF = {"q_lora_rank": lambda rank: rank or 0, "use_qk_norm": lambda on: QKNorm.head if on else QKNorm.none}
