"""Same weights, same function: logits and every gradient against transformers, carried over by exported files."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.config import Attention, ModelConfig, QKNorm, RopeScaling, ScoreFunc
from model.hf import export, to_hf
from model.transformer import Transformer

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5

V3 = ModelConfig(name="v3", vocab_size=97, max_seq_len=64, dim=48, n_layers=3, n_dense_layers=1, inter_dim=80,
                 init_std=0.1, n_heads=3, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
                 v_head_dim=12, n_routed_experts=8, n_shared_experts=2, n_activated_experts=3, moe_inter_dim=24,
                 route_scale=2.5, balance_loss_weight=0.0)
V2 = dataclasses.replace(V3, name="v2", score_func=ScoreFunc.softmax, norm_topk=False, expert_bias=False)
GROUPS = {"n_expert_groups": 4, "n_limited_groups": 2}
YARN = {"rope_factor": 40.0, "original_seq_len": 16, "max_seq_len": 640}
DENSE = {"n_routed_experts": 0, "n_shared_experts": 0, "n_activated_experts": 0, "expert_bias": False}
MIXTRAL = dataclasses.replace(V2, name="mixtral", attention=Attention.gqa, n_heads=6, n_kv_heads=2, head_dim=8,
                              rope_interleaved=False, n_dense_layers=0, n_shared_experts=0, norm_topk=True,
                              route_scale=1.0, norm_eps=1e-5, rope_theta=1e6)
LLAMA = dataclasses.replace(MIXTRAL, name="llama", **DENSE)
GLM = dataclasses.replace(V3, name="glm", attention=Attention.gqa, n_heads=6, n_kv_heads=2, head_dim=8,
                          rope_interleaved=False, qkv_bias=True, rotary_fraction=0.5)

CASES = {
    "DeepseekV3": V3,
    "DeepseekV3 without q-lora": dataclasses.replace(V3, q_lora_rank=0),
    "DeepseekV3 with another eps for blocks than for latents": dataclasses.replace(V3, norm_eps=1e-2),
    "DeepseekV3 with YaRN": dataclasses.replace(V3, **YARN),
    "DeepseekV3 with YaRN, attention factor": dataclasses.replace(V3, **YARN, mscale=0.7, mscale_all_dim=0.9),
    "DeepseekV3 with groups": dataclasses.replace(V3, **GROUPS),
    "DeepseekV3 with half-split rope": dataclasses.replace(V3, rope_interleaved=False),
    "DeepseekV3 tied": dataclasses.replace(V3, tie_embeddings=True),
    "DeepseekV3 dense": dataclasses.replace(V3, n_dense_layers=3, **DENSE),
    "DeepseekV2": V2,
    "DeepseekV2 with groups, YaRN": dataclasses.replace(V2, **GROUPS, **YARN, mscale=0.707, mscale_all_dim=0.707),
    "Llama": LLAMA,
    "Llama with YaRN": dataclasses.replace(LLAMA, **YARN, mscale_all_dim=0.0),
    "Llama 3.1": dataclasses.replace(LLAMA, **YARN | {"original_seq_len": 256, "beta_fast": 4.0, "rope_factor": 8.0},
                                     rope_scaling=RopeScaling.llama3),
    "Qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "Qwen3": dataclasses.replace(LLAMA, qk_norm=QKNorm.head),
    "Mixtral": MIXTRAL,
    "Qwen3Moe": dataclasses.replace(MIXTRAL, qk_norm=QKNorm.head),
    "Qwen3Moe without normalised weights": dataclasses.replace(MIXTRAL, qk_norm=QKNorm.head, norm_topk=False),
    "Olmoe": dataclasses.replace(MIXTRAL, qk_norm=QKNorm.full, norm_topk=False),
    "Glm4Moe": GLM,
    "Glm4Moe with normalised heads": dataclasses.replace(GLM, qk_norm=QKNorm.head),
}


def build(config: ModelConfig) -> Transformer:
    """Weights far from their special values: norms not one, biases not zero."""
    generator = torch.Generator().manual_seed(7)
    model = Transformer(config)
    for name, tensor in model.state_dict().items():
        scale, shift = (0.2, 1.0) if name.endswith("norm.weight") else (0.02 if "bias" in name else 0.1, 0.0)
        tensor.normal_(shift, scale, generator=generator)
    return model.train()


def carried_over(model: Transformer, path) -> torch.nn.Module:
    export(path, model.config, model.state_dict(), max_shard_bytes=60_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return theirs.train()


def on_disk(name: str, tensor: torch.Tensor, mixtral: bool) -> dict[str, torch.Tensor]:
    """A parameter that transformers fuses in memory, by the names that files have."""
    matrices = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    if mixtral:
        name = name.replace(".mlp.", ".block_sparse_moe.")
    if name.endswith("experts.gate_up_proj"):
        prefix = name.removesuffix("gate_up_proj")
        halves = [(e, half, half_tensor) for e, both in enumerate(tensor)
                  for half, half_tensor in zip(matrices[:2], both.chunk(2), strict=True)]
        return {f"{prefix}{e}.{half}.weight": half_tensor for e, half, half_tensor in halves}
    if name.endswith("experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        return {f"{prefix}{e}.{matrices[2]}.weight": matrix for e, matrix in enumerate(tensor)}
    return {name: tensor}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    assert theirs.norm() > 0, what
    assert (ours - theirs).norm() <= TOLERANCE * theirs.norm(), what


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case, tmp_path):
    config = CASES[case]
    model = build(config)
    theirs = carried_over(model, tmp_path / "export")
    assert type(theirs).__name__ == case.split()[0] + "ForCausalLM"
    tokens = torch.randint(config.vocab_size, (4, 49), generator=torch.Generator().manual_seed(1))

    logits, their_logits = model(tokens[:, :-1]), theirs(input_ids=tokens[:, :-1], use_cache=False).logits
    assert_close(logits, their_logits, "logits")
    for out in (logits, their_logits):
        F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    gradients = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    gradients |= {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = {name: grad for name, grad in to_hf(gradients, config) if not name.endswith("correction_bias")}
    found = {}
    for name, parameter in theirs.named_parameters():
        found |= on_disk(name, parameter.grad, case == "Mixtral")
    assert ours.keys() == found.keys()
    for name, grad in ours.items():
        assert_close(grad, found[name], name)


def test_mtp_loss_and_acceptance_equal_those_of_transformers(tmp_path, monkeypatch):
    """Depth 1 of transformers' speculative decoder reads the same files and predicts the same.

    Seven tokens, so that an untrained draft is accepted now and then.
    """
    from transformers.modeling_layers import MtpModel

    config = dataclasses.replace(V3, n_mtp_layers=1, vocab_size=7)
    # transformers knows V3's MTP module by its number, 61.
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"layers\.3\..*"])
    model = build(config).eval()
    theirs = carried_over(model, tmp_path / "export").eval()
    decoder = MtpModel.from_pretrained(theirs).eval()
    tokens = torch.randint(config.vocab_size, (2, 18), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16)[None]
    with torch.no_grad():
        main_loss, mtp_loss, accepted = model(tokens, tokens)[0]
        hidden = theirs.model(tokens[:, :16]).last_hidden_state
        drafted = decoder.layers[0](
            inputs_embeds=theirs.model.embed_tokens(tokens[:, 1:17]), previous_hidden_state=hidden,
            position_embeddings=theirs.model.rotary_emb(hidden, positions), position_ids=positions,
            attention_mask=torch.full((16, 16), float("-inf")).triu(1)[None, None], past_key_values=None)
        for loss, states, targets in ((main_loss, hidden, tokens[:, 1:17]), (mtp_loss, drafted, tokens[:, 2:])):
            expected = F.cross_entropy(theirs.lm_head(states).flatten(0, 1), targets.flatten(), reduction="sum")
            assert_close(loss, expected, "loss")
        greedy, guesses = (theirs.lm_head(states).argmax(-1) for states in (hidden, drafted))
        matches = (guesses[:, :-1] == greedy[:, 1:]).sum()
    assert 0 < matches < 30 and accepted == matches
