"""config.json of Hugging Face's model types, both directions.

A family is what `transformers` calls a model type. A shape belongs to the family that implies nothing false of it;
a shape that none has is refused, with what the nearest one lacks. Training settings (bias speed, loss weights) have
no place in config.json and come back as this project's defaults.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model.config import Attention, ModelConfig, QKNorm, RopeScaling, ScoreFunc

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
"""`quantization_config` of DeepSeek-V3's release (README_WEIGHTS.md)."""


def config_to_hf(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> dict:
    """config.json, with E4M3 as DeepSeek's FP8 releases have it. `ValueError` for a shape that no family of
    `transformers` has."""
    fp8 = dtype == torch.float8_e4m3fn
    model_type = family_of(config)
    family = FAMILIES[model_type]
    _check_expressible(config)
    values = {key: _TO_HF.get(key, lambda value: value)(getattr(config, ours))
              for key, ours in (COMMON | family.keys).items()}
    if model_type == "deepseek_v2":
        values["topk_method"] = "group_limited_greedy" if config.n_expert_groups > 1 else "greedy"
    return {"architectures": [family.architecture], "model_type": model_type,
            "torch_dtype": str(torch.bfloat16 if fp8 else dtype).removeprefix("torch."),
            **({"quantization_config": dict(FP8)} if fp8 else {}), **values, **family.constants,
            "rope_theta": config.rope_theta, "rope_scaling": _scaling_to_hf(config),
            "hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def config_from_hf(values: Mapping, *, name: str = "custom") -> ModelConfig:
    """The shape that a config.json describes. `ValueError` names what cannot be expressed."""
    try:
        return _config_from_hf(values, name)
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise ValueError(f"config.json: a value is missing or of the wrong kind ({type(error).__name__}: {error}); "
                         "take the file from the model's release") from error


def _config_from_hf(values: Mapping, name: str) -> ModelConfig:
    family = _family_named(values.get("architectures"))
    for key, only in {**family.constants, "hidden_act": "silu"}.items():
        if values.get(key, only) != only:
            raise ValueError(f"config.json: {key}={values[key]}: must be {only}, nothing else is implemented; "
                             f"convert the model first or choose another")
    _check_all_read(values, family)
    _check_quantization(values.get("quantization_config"))
    rope = values.get("rope_parameters") or {**(values.get("rope_scaling") or {}),
                                             "rope_theta": values.get("rope_theta", 10000.0)}
    found = {"name": name, **family.implied, **_scaling_from_hf(rope)}
    defaults = vars(ModelConfig())
    for key, ours in (COMMON | family.keys).items():
        found[ours] = _of_kind(key, _FROM_HF.get(key, lambda value: value)(_look_up(key, {**rope, **values})),
                               type(defaults[ours]))
    found.setdefault("inter_dim", 0)
    if values.get("topk_method") == "greedy":
        found |= {"n_expert_groups": 1, "n_limited_groups": 1}
    if found.get("n_routed_experts"):
        found |= family.experts
    else:
        found |= dict(n_dense_layers=found["n_layers"], n_routed_experts=0, n_shared_experts=0, moe_inter_dim=0,
                      n_activated_experts=0, expert_bias=False, balance_loss_weight=0.0)
    config = ModelConfig(**{key: _of_kind(key, value, type(defaults[key])) for key, value in found.items()})
    config.check()
    _check_expressible(config)
    return config


@dataclass(frozen=True)
class Family:
    architecture: str
    implied: dict[str, object]
    """Our fields that have this value in every model of the family."""
    experts: dict[str, object] | None
    """The same where there are routed experts; none if the family has none."""
    keys: dict[str, str]
    """config.json's keys, beside the common ones, and our fields."""
    constants: dict[str, object]
    """config.json's keys that can have this value only."""
    routed: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")
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

_ALIASES = {"num_experts": "num_local_experts", "n_routed_experts": "num_local_experts",
            "num_nextn_predict_layers": "num_mtp_layers"}
_ABSENT = {"q_lora_rank": None, "tie_word_embeddings": False, "initializer_range": 0.02, "first_k_dense_replace": 0,
           "num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1, "rope_interleave": True,
           "use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 0.5}
_TO_HF = {"q_lora_rank": lambda rank: rank or None, "use_qk_norm": lambda norm: norm is QKNorm.head}
_FROM_HF = {"q_lora_rank": lambda rank: rank or 0, "use_qk_norm": lambda on: QKNorm.head if on else QKNorm.none}


def family_of(config: ModelConfig) -> str:
    """The model type of a shape; `ValueError` says what the nearest one would need."""
    mismatches = {model_type: _mismatches(family, config) for model_type, family in FAMILIES.items()}
    nearest = min(mismatches, key=lambda model_type: len(mismatches[model_type]))
    if mismatches[nearest]:
        raise ValueError(f"model.name={config.name}: no model type of transformers has this shape; the nearest, "
                         f"{nearest}, needs {', '.join(mismatches[nearest])}")
    return nearest


def _mismatches(family: Family, config: ModelConfig) -> list[str]:
    needs = dict(family.implied)
    has_dense_layers = family.experts is None or "first_k_dense_replace" in family.keys
    if config.n_routed_experts and family.experts is None:
        needs["n_routed_experts"] = 0
    elif config.n_routed_experts:
        needs |= family.experts
    found = [f"{key}={getattr(value, 'name', value)}" for key, value in needs.items() if getattr(config, key) != value]
    if not config.n_routed_experts and not has_dense_layers:
        found.append("routed experts")
    if config.n_routed_experts and "n_shared_experts" in family.keys and not config.n_shared_experts:
        found.append("a shared expert")
    if "use_qk_norm" in family.keys and config.qk_norm is QKNorm.full:
        found.append("qk_norm=head")
    return found


def _family_named(architectures: object) -> Family:
    named = {family.architecture: family for family in FAMILIES.values()}
    architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if not isinstance(architecture, str) or architecture not in named:
        raise ValueError(f"config.json: architectures={architectures}: must be one of {', '.join(named)}; another "
                         "model may be planned as its nearest shape, by model=NAME and model.* keys")
    return named[architecture]


def _look_up(key: str, values: Mapping) -> object:
    """A key's value, by its other name or what its absence means."""
    for name in (key, _ALIASES.get(key)):
        if values.get(name) is not None:
            return values[name]
    if key in ("num_key_value_heads", "head_dim"):
        heads = values["num_attention_heads"]
        return heads if key == "num_key_value_heads" else values["hidden_size"] // heads
    if key not in _ABSENT:
        raise ValueError(f"config.json: {key} is missing; take the file from the model's release")
    return _ABSENT[key]


def _of_kind(key: str, value: object, kind: type) -> object:
    """A value as our field has it; numbers alone are converted."""
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, kind.__name__)
    is_number = kind in (int, float) and type(value) in (int, float) and (kind is float or value % 1 == 0)
    if not is_number and type(value) is not kind:
        raise ValueError(f"config.json: {key}={value!r}: must be {wanted}; take the file from the model's release")
    return kind(value)


def _check_expressible(config: ModelConfig) -> None:
    if config.n_routed_experts and config.n_activated_experts == 1 and config.norm_topk:
        raise ValueError("model.norm_topk=true: with n_activated_experts=1 transformers gives every chosen expert "
                         "weight 1, where this model keeps the affinity; use norm_topk=false, the same function here")
    yarn = config.rope_factor > 1 and config.rope_scaling is RopeScaling.yarn
    if yarn and not config.mscale_all_dim and config.mscale != 1:
        raise ValueError(f"model.mscale={config.mscale}: must be 1 where mscale_all_dim=0, as in transformers; set it")


PARTS = re.compile(r"^index_|^linear_|expert|^sliding_window$|^layer_types$")
"""Keys of what changes a model's arithmetic: sparse and linear attention, windows, experts."""


def _check_all_read(values: Mapping, family: Family) -> None:
    """Nothing that makes another model of it is passed over."""
    read = {*COMMON, *family.keys, *family.constants, *_ALIASES.values()}
    for key, value in values.items():
        means_nothing = not value or key == "layer_types" and set(value) == {"full_attention"} or (
            key == "sliding_window" and "use_sliding_window" in family.constants)
        if PARTS.search(key) and key not in read and not means_nothing:
            raise ValueError(f"config.json: {key}={value}: {family.architecture} has no such part here; take it out of "
                             "the file for the model without it")


def _check_quantization(found: Mapping | None) -> None:
    """Weights in the blocks of DeepSeek's FP8 releases can be read, whatever else their keys say of activations."""
    for key in ("quant_method", "fmt", "weight_block_size") if found is not None else ():
        if found.get(key, FP8[key] if key == "fmt" else None) != FP8[key]:
            raise ValueError(f"config.json: quantization_config.{key}={found.get(key)}: must be {FP8[key]}, nothing "
                             f"else is implemented; convert the model first or choose another")


def _scaling_to_hf(config: ModelConfig) -> dict | None:
    if config.rope_factor <= 1:
        return None
    if config.rope_scaling is RopeScaling.llama3:
        return {"rope_type": "llama3", "factor": config.rope_factor,
                "original_max_position_embeddings": config.original_seq_len, "low_freq_factor": config.beta_slow,
                "high_freq_factor": config.beta_fast}
    return {"type": "yarn", "rope_type": "yarn", "factor": config.rope_factor,
            "original_max_position_embeddings": config.original_seq_len, "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow, "mscale": config.mscale, "mscale_all_dim": config.mscale_all_dim}


def _scaling_from_hf(rope: Mapping) -> dict[str, object]:
    found, kind = {"rope_theta": rope["rope_theta"]}, rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return found
    if kind not in ("yarn", "llama3") or rope.get("attention_factor") is not None:
        raise ValueError(f"config.json: rope_scaling={dict(rope)}: must be null, llama3 or yarn without "
                         f"attention_factor; other scalings are not implemented")
    found |= {"rope_factor": _look_up("factor", rope), "rope_scaling": RopeScaling[kind],
              "original_seq_len": _look_up("original_max_position_embeddings", rope)}
    if kind == "llama3":
        return found | {"beta_fast": _look_up("high_freq_factor", rope), "beta_slow": _look_up("low_freq_factor", rope)}
    if rope.get("truncate") is False:
        raise ValueError("config.json: rope_scaling.truncate=false: must be true, or left out; YaRN's ramp between "
                         "whole pairs alone is implemented")
    all_dims = rope.get("mscale_all_dim") or 0.0
    return found | {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0,
                    "mscale": (rope.get("mscale") or 1.0) if all_dims else 1.0, "mscale_all_dim": all_dims}
