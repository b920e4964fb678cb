"""Round trips through Hugging Face's form, bit for bit, and refusals of files that are not what they say."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from model.config import Attention, ModelConfig, QKNorm, RopeScaling, ScoreFunc
from model.hf import config_from_hf, config_to_hf, export, from_hf, load, tensor_shapes, to_hf
from orchestrator.config import from_dict

SHAPES = Path(__file__).parents[2] / "conf" / "model"
TRAINING = ("name", "bias_update_speed", "balance_loss_weight", "mtp_loss_weight")
# transformers has no class for these: V2's router over plain attention.
NO_FAMILY = {"deepseek_moe_16b", "deepseek_moe_2b"}

TINY = ModelConfig(name="tiny", vocab_size=50, max_seq_len=64, dim=32, n_layers=3, n_dense_layers=1, inter_dim=48,
                   n_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                   n_routed_experts=4, n_activated_experts=2, moe_inter_dim=24, n_mtp_layers=2)
MIXTRAL = ModelConfig(name="mixtral", vocab_size=50, dim=32, n_layers=2, n_dense_layers=0, attention=Attention.gqa,
                      n_heads=4, n_kv_heads=2, head_dim=8, rope_interleaved=False, n_routed_experts=4,
                      n_shared_experts=0, n_activated_experts=2, moe_inter_dim=24, score_func=ScoreFunc.softmax,
                      expert_bias=False)
LLAMA = dataclasses.replace(MIXTRAL, name="llama", n_routed_experts=0)
MODELS = [TINY, dataclasses.replace(TINY, name="tied", tie_embeddings=True), MIXTRAL,
          dataclasses.replace(MIXTRAL, name="qwen3_moe", qk_norm=QKNorm.head), LLAMA,
          dataclasses.replace(LLAMA, name="qwen2", qkv_bias=True),
          dataclasses.replace(LLAMA, name="llama_3_1", rope_scaling=RopeScaling.llama3, rope_factor=8.0, beta_fast=4.0,
                              original_seq_len=64)]


def random_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def all_files(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def exported(tmp_path) -> Path:
    export(tmp_path / "model", TINY, random_tensors(TINY), max_shard_bytes=50_000)
    return tmp_path / "model"


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.name)
def test_export_then_load_is_bit_equal(config, tmp_path):
    tensors = random_tensors(config)
    export(tmp_path / "model", config, tensors, max_shard_bytes=20_000)
    found, loaded = load(tmp_path / "model")
    assert_equal(dict(loaded), tensors)
    assert config_to_hf(found) == config_to_hf(config)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.name)
def test_load_then_export_is_bit_equal(config, tmp_path):
    export(tmp_path / "first", config, random_tensors(config))
    found, loaded = load(tmp_path / "first")
    export(tmp_path / "second", found, dict(loaded))
    assert_equal(all_files(tmp_path / "second"), all_files(tmp_path / "first"))


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.name)
def test_files_of_save_pretrained_come_back_bit_equal(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(config, n_mtp_layers=0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config_to_hf(config)))
    theirs.save_pretrained(tmp_path / "theirs")
    found, loaded = load(tmp_path / "theirs")
    assert config_to_hf(found) == config_to_hf(config)
    export(tmp_path / "ours", found, dict(loaded))
    assert_equal(all_files(tmp_path / "ours"), all_files(tmp_path / "theirs"))


def test_names_are_those_of_the_released_files():
    names = {name for name, _ in to_hf(random_tensors(TINY), TINY)}
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight",
            "model.layers.2.mlp.gate.e_score_correction_bias", "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
            "model.layers.1.mlp.shared_experts.down_proj.weight", "model.layers.3.eh_proj.weight",
            "model.layers.3.enorm.weight", "model.layers.4.hnorm.weight", "model.layers.4.shared_head.norm.weight",
            "model.layers.3.embed_tokens.weight", "model.layers.4.shared_head.head.weight"} <= names
    assert "model.layers.0.block_sparse_moe.experts.1.w3.weight" in dict(to_hf(random_tensors(MIXTRAL), MIXTRAL))


def test_mtp_projection_reads_the_embedding_first():
    tensors = random_tensors(TINY)
    theirs = dict(to_hf(tensors, TINY))["model.layers.3.eh_proj.weight"]
    hidden, embedding = tensors["mtp.0.proj.weight"].chunk(2, dim=1)
    assert torch.equal(theirs, torch.cat([embedding, hidden], dim=1))


@pytest.mark.parametrize("path", sorted(SHAPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_shapes_survive_config_json(path):
    values = yaml.safe_load(path.read_text())
    values.pop("defaults")
    config = from_dict(ModelConfig, values)
    if config.name in NO_FAMILY:
        with pytest.raises(ValueError, match=f"model.name={config.name}: no model type of transformers"):
            config_to_hf(config)
        return
    found = config_from_hf(json.loads(json.dumps(config_to_hf(config))))
    kept = {field: getattr(config, field) for field in TRAINING}
    assert dataclasses.replace(found, **kept) == config


def test_bf16_export_keeps_router_biases_in_fp32(tmp_path):
    export(tmp_path / "model", TINY, random_tensors(TINY), dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in all_files(tmp_path / "model").items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == \
        {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3, 4)}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_keep_to_their_size(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    largest = max(tensor.nbytes for tensor in all_files(exported).values())
    for file in exported.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= max(50_000, largest)
    assert set(index["weight_map"].values()) == {file.name for file in exported.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in all_files(exported).values())


def test_mtp_that_transformers_dropped_is_left_out_of_the_shape(tmp_path):
    short = dataclasses.replace(TINY, n_mtp_layers=0)
    export(tmp_path / "model", short, random_tensors(short))
    edit_json(tmp_path / "model" / "config.json", num_nextn_predict_layers=1)
    assert load(tmp_path / "model")[0].n_mtp_layers == 0


@pytest.mark.parametrize("file", ["../model.safetensors", "/tmp/model.safetensors", "a/b.safetensors",
                                  "model.bin", "..\\model.safetensors", "model.safetensors\n"])
def test_an_index_that_leaves_its_directory_is_refused(exported, file):
    index = exported / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.norm.weight": file})
    with pytest.raises(ValueError, match="must be a plain name ending in .safetensors"):
        load(exported)


def second_shard(path: Path) -> Path:
    return next(path.glob("model-00002-of-*.safetensors"))


def test_a_missing_shard_is_named(exported):
    shard = second_shard(exported)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: is missing; copy the whole directory"):
        dict(load(exported)[1])


def test_a_torn_shard_is_named(exported):
    shard = second_shard(exported)
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{shard.name}: must be whole safetensors"):
        dict(load(exported)[1])


@pytest.mark.parametrize("wrong", [
    {"rope_scaling": "yarn"}, {"quantization_config": "fp8"}, {"rope_parameters": {"rope_type": "default"}},
    {"num_attention_heads": [4]}, {"architectures": [["x"]]}, {"hidden_size": float("inf")}], ids=str)
def test_a_value_of_the_wrong_kind_is_no_traceback(wrong):
    with pytest.raises(ValueError, match=r"config\.json: "):
        config_from_hf(config_to_hf(TINY) | wrong)


def test_keys_that_ask_for_nothing_are_none():
    whole = config_to_hf(TINY)
    asked = {"layer_types": ["full_attention"] * TINY.n_layers, "sliding_window": None, "index_topk": 0}
    assert config_from_hf(whole | asked) == config_from_hf(whole)
    qwen = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False, "sliding_window": 4096}
    assert config_from_hf(config_to_hf(LLAMA) | qwen).n_routed_experts == 0
    with pytest.raises(ValueError, match="sliding_window=1024: LlamaForCausalLM has no such part here"):
        config_from_hf(config_to_hf(LLAMA) | {"sliding_window": 1024})


def test_tensors_missing_unknown_or_misshapen_are_named():
    theirs = dict(to_hf(random_tensors(TINY), TINY))
    with pytest.raises(ValueError, match="1 tensors are missing, such as model.norm.weight; take all shards"):
        dict(from_hf({key: value for key, value in theirs.items() if key != "model.norm.weight"}, TINY))
    with pytest.raises(ValueError, match="1 tensors are not of this shape, such as model.layers.9.x; take config"):
        dict(from_hf(theirs | {"model.layers.9.x": torch.zeros(1)}, TINY))
    with pytest.raises(ValueError, match=r"experts.3.up_proj.weight: has shape \[24, 31\], must have \[24, 32\]"):
        dict(from_hf(theirs | {"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(24, 31)}, TINY))
    with pytest.raises(ValueError, match="model.layers.3.embed_tokens.weight: must equal model.embed_tokens.weight"):
        dict(from_hf(theirs | {"model.layers.3.embed_tokens.weight": torch.zeros(50, 32)}, TINY))
    with pytest.raises(ValueError, match="model.norm.weight: is torch.int8, must be bf16, fp16 or fp32"):
        dict(from_hf(theirs | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, TINY))


def test_our_tensors_must_be_whole():
    tensors = random_tensors(TINY)
    with pytest.raises(ValueError, match=r"layers.1.moe.experts.w2: has shape \[2, 32, 24\], must have \[4, 32, 24\]"):
        dict(to_hf(tensors | {"layers.1.moe.experts.w2": torch.zeros(2, 32, 24)}, TINY))
    with pytest.raises(ValueError, match="1 tensors are missing, such as norm.weight"):
        dict(to_hf({name: tensor for name, tensor in tensors.items() if name != "norm.weight"}, TINY))


def test_old_files_rotary_frequencies_and_spare_heads_are_passed_over():
    config = dataclasses.replace(LLAMA, tie_embeddings=True)
    tensors = random_tensors(config)
    extra = {"lm_head.weight": torch.zeros(50, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert_equal(dict(from_hf(dict(to_hf(tensors, config)) | extra, config)), tensors)


@pytest.mark.parametrize("config", [TINY, MIXTRAL], ids=lambda config: config.name)
def test_experts_come_one_by_one_and_files_are_closed_on_the_way(config, tmp_path, monkeypatch):
    monkeypatch.setattr("model.hf_files.MAPPED_BYTES", 10_000)
    tensors = random_tensors(config)
    export(tmp_path / "hf", config, tensors)
    found = load(tmp_path / "hf")[1]
    for name in tensors:
        if ".moe.experts." in name:
            assert torch.equal(torch.stack(list(found.experts(name))), tensors[name])
    assert found.tensors._bytes_read <= 10_000 and name in found and "x" not in found
    assert_equal(dict(found), tensors)


def test_a_directory_in_use_is_not_overwritten(exported):
    with pytest.raises(ValueError, match="must be a new or empty directory"):
        export(exported, TINY, random_tensors(TINY))


@pytest.mark.parametrize("changes, message", [
    ({"architectures": ["GPT2LMHeadModel"]}, r"architectures=\['GPT2LMHeadModel'\]: must be one of Deepseek"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size=None: must be"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method=gptq: must be fp8"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu: must be silu"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "must be null, llama3 or yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}},
     "high_freq_factor is missing"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False}},
     "rope_scaling.truncate=false: must be true"),
    ({"index_topk": 2048}, "index_topk=2048: DeepseekV3ForCausalLM has no such part here; take it out"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types=.*: DeepseekV3ForCausalLM has no such"),
    ({"architectures": []}, r"architectures=\[\]: must be one of .* by model=NAME and model"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"hidden_size": "big"}, r"^config\.json: hidden_size='big': must be a whole number; take the file from the model"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: must be a whole number"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': must be a number"),
    ({"rope_theta": True}, "rope_theta=True: must be a number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
    ({"num_attention_heads": 0}, "model.n_heads=0: must be at least 1"),
    ({"num_experts_per_tok": 1}, "n_activated_experts=1.*use norm_topk=false"),
])
def test_a_config_that_cannot_be_expressed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(config_to_hf(TINY) | changes)


@pytest.mark.parametrize("changes, needed", [
    ({"expert_bias": False}, "deepseek_v3, needs expert_bias=True"),
    ({"n_shared_experts": 0}, "deepseek_v3, needs a shared expert"),
    ({"attention": Attention.gqa, "qk_norm": QKNorm.full}, "needs"),
])
def test_a_shape_without_a_family_is_told_what_the_nearest_needs(changes, needed):
    with pytest.raises(ValueError, match=needed):
        config_to_hf(dataclasses.replace(TINY, **changes))


def test_a_file_without_an_index_is_loaded(tmp_path):
    tensors = random_tensors(LLAMA)
    path = tmp_path / "model"
    export(path, LLAMA, tensors)
    (path / "model.safetensors.index.json").unlink()
    (path / "model-00001-of-00001.safetensors").rename(path / "model.safetensors")
    assert_equal(dict(load(path)[1]), tensors)


def test_a_tensor_that_the_index_misplaces_is_named(exported):
    file = second_shard(exported)
    shard = load_file(file)
    name = sorted(shard)[0]
    save_file({key: value for key, value in shard.items() if key != name}, file)
    with pytest.raises(ValueError, match=f"lacks {name}, which the index places there"):
        dict(load(exported)[1])


def test_an_fp8_export_has_deepseeks_layout_and_reads_back_as_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, dim=256, inter_dim=384, n_mtp_layers=1)
    tensors = random_tensors(config)
    export(tmp_path / "model", config, tensors, dtype=torch.float8_e4m3fn, max_shard_bytes=100_000)
    files, values = all_files(tmp_path / "model"), json.loads((tmp_path / "model" / "config.json").read_text())
    quantized = {name for name, tensor in files.items() if tensor.dtype == torch.float8_e4m3fn}
    # As in the release: all projections of a block but the MTP module's own, and neither router, embedding nor head.
    assert {name for name in files if name.endswith(("_proj.weight", "_mqa.weight"))} - quantized == {
        "model.layers.3.eh_proj.weight"}
    assert all(files[f"{name}_scale_inv"].shape == (-(-files[name].shape[0] // 128), -(-files[name].shape[1] // 128))
               for name in quantized)
    assert {files[name].dtype for name in files if name.endswith("_scale_inv")} == {torch.float32}
    assert {str(tensor.dtype) for name, tensor in files.items() if name not in quantized and "_scale" not in name} == {
        "torch.bfloat16", "torch.float32"}
    assert set(json.loads((tmp_path / "model/model.safetensors.index.json").read_text())["weight_map"]) == set(files)
    assert transformers.FineGrainedFP8Config.from_dict(values["quantization_config"]).weight_block_size == [128, 128]
    found, loaded = load(tmp_path / "model")
    loaded = dict(loaded)
    assert found.n_mtp_layers == 1 and loaded.keys() == tensors.keys()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True)).state_dict()
    for ours, key in [("layers.0.ffn.w2.weight", "model.layers.0.mlp.down_proj.weight"),
                      ("layers.1.attention.wkv_a.weight", "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"),
                      ("layers.2.moe.experts.w13", "model.layers.2.mlp.experts.gate_up_proj"),
                      ("lm_head.weight", "lm_head.weight")]:
        assert torch.equal(loaded[ours].float(), theirs[key].float()), ours
        assert (loaded[ours] - tensors[ours]).abs().max() <= tensors[ours].abs().max() / 28


def test_fp8_scales_of_another_shape_are_refused(tmp_path):
    export(tmp_path / "model", LLAMA, random_tensors(LLAMA), dtype=torch.float8_e4m3fn)
    file = next((tmp_path / "model").glob("*.safetensors"))
    shard = load_file(file)
    save_file(shard | {"model.layers.0.mlp.down_proj.weight_scale_inv": torch.ones(3, 1)}, file)
    with pytest.raises(ValueError, match=r"down_proj.weight: is torch.float8_e4m3fn with \[3, 1\] scales"):
        dict(load(tmp_path / "model")[1])
