"""Cached decoding against the whole forward, transformers' generate, and speculation against plain decoding."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from model import attention
from model.cache import Cache
from model.config import Attention, QKNorm
from model.generate import Counts, Decoder, Sampling, generate
from model.hf import export
from model.transformer import Transformer
from tests.model.test_hf import MIXTRAL, TINY

V3 = dataclasses.replace(TINY, n_mtp_layers=1, rope_factor=4.0, original_seq_len=16)
QWEN3_MOE = dataclasses.replace(MIXTRAL, name="qwen3_moe", qk_norm=QKNorm.head)
GLM = dataclasses.replace(V3, name="glm", attention=Attention.gqa, n_heads=4, n_kv_heads=2, head_dim=8, qkv_bias=True,
                          rotary_fraction=0.5, rope_interleaved=False, rope_factor=1.0)
MODELS = [V3, dataclasses.replace(V3, name="no q-lora", q_lora_rank=0), QWEN3_MOE, GLM]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [5, 3, 5]]


def build(config) -> Transformer:
    generator, model = torch.Generator().manual_seed(5), Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1.0))
    return model.eval()


def tokens_of(model, prompts, n, slots=None, **options) -> list[list[int]]:
    rows = [[] for _ in prompts]
    decoder = Decoder(model, slots=slots or len(prompts), capacity=64)
    for row, token in generate(decoder, prompts, max_tokens=n, **options):
        rows[row].append(token)
    return rows


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.name)
@torch.no_grad()
def test_decoding_from_the_cache_equals_the_whole_forward_for_rows_that_join_and_leave(config):
    model, texts = build(config), torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    whole, texts = model(texts), texts.tolist()
    decoder = Decoder(model, slots=3, capacity=20)
    decoder.prefill([1], [texts[0][:15]])
    decoder.free(1)
    torch.testing.assert_close(decoder.prefill([2, 0], [texts[2][:9], texts[0][:4]]), whole[[2, 0], [8, 3]],
                               atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoder.decode([0], [texts[0][4]]), whole[[0], [4]], atol=1e-4, rtol=1e-4)
    found = decoder.prefill([0, 1, 2], [texts[0][5:6], texts[1][:17], texts[2][9:11]])
    torch.testing.assert_close(found, whole[[0, 1, 2], [5, 16, 10]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompts", [[list(range(1, 41)), list(range(9, 20))],
                                     [[i % 49 + 1] * (i % 16 + 1) for i in range(90)]], ids=["long", "many"])
@pytest.mark.parametrize("config", [V3, QWEN3_MOE], ids=lambda config: config.name)
def test_prompts_are_read_in_blocks_that_change_nothing(config, prompts, monkeypatch):
    model, slots = build(config), list(range(len(prompts)))[::-1]
    whole = Decoder(model, slots=len(prompts), capacity=64).hidden(slots, prompts)
    sizes, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 1024)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention",
                        lambda *args, **named: sizes.append(named["attn_mask"].numel()) or attend(*args, **named))
    found = Decoder(model, slots=len(prompts), capacity=64).hidden(slots, prompts)
    for row, states, expected in zip(prompts, found, whole, strict=True):
        torch.testing.assert_close(states[: len(row)], expected[: len(row)], atol=1e-5, rtol=1e-5)
    assert max(sizes) <= 1024 and len(sizes) > config.n_layers


LONG = [list(range(1, 41)), [7], list(range(9, 20)), list(range(20, 45))]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.name)
@pytest.mark.parametrize("most", [1, 8, 17])
def test_prompts_are_read_in_forwards_of_so_many_tokens_that_change_nothing(config, most, monkeypatch):
    """Logits, what the MTP module keeps and says, and the texts that follow."""
    model, drafts = build(config), bool(config.n_mtp_layers)

    def read() -> list:
        decoder = Decoder(model, slots=5, capacity=64)
        slots, sizes, embed = [3, 0, 4, 1], [], model.embed
        monkeypatch.setattr(model, "embed", lambda tokens: sizes.append(tokens.numel()) or embed(tokens))
        states = decoder.read(slots, LONG, drafts=drafts)
        monkeypatch.setattr(model, "embed", embed)
        said = decoder.draft(slots, states.split(1), [[5], [6], [7], [8]]) if drafts else states
        kept = [layer[0][slot, : len(row)] for cache in (decoder.cache, decoder.drafts) if cache is not None
                for layer in cache.layers for slot, row in zip(slots, LONG, strict=True)]
        return [sizes, states, said, *kept]

    whole, texts = read(), tokens_of(model, LONG, 12, slots=3, speculative=drafts)
    monkeypatch.setattr("model.generate.CHUNK_TOKENS", most)
    parts = read()
    assert max(whole[0]) > 40 and max(parts[0]) <= most and len(parts[0]) > 1
    for found, wanted in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert tokens_of(model, LONG, 12, slots=3, speculative=drafts) == texts


GROWTH = """
import torch
from model.generate import Batch, Decoder, Sampling
from orchestrator.inference import cache_bytes, forward_bytes
from orchestrator.train.memory import return_freed_memory
from tests.model.test_generate import V3, build, dataclasses

def peak() -> int:
    # ru_maxrss would begin at what the parent had.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
return_freed_memory()
config = dataclasses.replace(V3, dim=256, n_heads=8, inter_dim=512, moe_inter_dim=128, max_seq_len=2048)
batch = Batch(Decoder(build(config), slots=9, capacity=1600), speculative=True)
add = lambda slots, length: batch.add(slots, [[i % 50 for i in range(length)]] * len(slots), [Sampling()] * len(slots),
                                      slots)
add([8], 40)
before = peak()
add(range(8), 1500)
cache = cache_bytes(config, 9 * 1601, torch.float32)  # its pages are taken when they are written
print(peak() - before - cache, forward_bytes(config, 9 * 1601, 0, torch.float32, "cpu"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc and /proc")
def test_long_prompts_take_no_more_memory_than_is_said():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, said = map(int, done.stdout.split())
    assert grown < said + (4 << 20), f"{grown >> 20} MiB, said {said >> 20}"


@pytest.mark.parametrize("config", [V3, QWEN3_MOE], ids=lambda config: config.name)
def test_greedy_tokens_are_those_of_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(config)
    export(tmp_path / "hf", config, model.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for prompt, row in zip(PROMPTS, tokens_of(model, PROMPTS, 24), strict=True):
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                              max_new_tokens=24, eos_token_id=None, pad_token_id=0)
        assert row == out[0, len(prompt):].tolist()


@pytest.mark.parametrize("config", [V3, GLM], ids=lambda config: config.name)
def test_speculative_greedy_tokens_are_those_of_plain_decoding(config):
    model, counts = build(config), Counts()
    assert tokens_of(model, PROMPTS, 30, speculative=True, counts=counts) == tokens_of(model, PROMPTS, 30)
    assert counts.tokens == 90 and 0 < counts.drafted


@torch.no_grad()
def test_the_draft_is_what_the_training_loss_scores():
    model, text = build(V3), torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(2))
    decoder, found = Decoder(model, slots=1, capacity=12), []
    for at in range(10):  # one token at a time, through the module's own cache
        states = decoder.hidden([0], [text[0, at : at + 1].tolist()])
        found.append(decoder.draft([0], list(states), [text[0, at + 1 : at + 2].tolist()])[0])
    loss = torch.nn.functional.cross_entropy(torch.stack(found), text[0, 2:], reduction="sum")
    torch.testing.assert_close(loss, model(text, text)[0, 1], atol=1e-3, rtol=1e-4)


def test_speculative_samples_have_the_distribution_of_plain_ones():
    """Chi-square of three tokens, the later two of them drafted, against their exact probabilities."""
    model = build(dataclasses.replace(V3, vocab_size=5))
    sampling, prompt, n = Sampling(temperature=1.5, top_p=0.9), [1, 2, 3], 4000
    with torch.no_grad():
        first = sampling.probabilities(model(torch.tensor([prompt]))[0, -1])
        second = sampling.probabilities(model(torch.tensor([[*prompt, t] for t in range(5)]))[:, -1])
        third = sampling.probabilities(
            model(torch.tensor([[*prompt, a, b] for a in range(5) for b in range(5)]))[:, -1]).view(5, 5, 5)
    expected = (first[:, None, None] * second[:, :, None] * third).flatten() * n
    counts = Counts()
    rows = tokens_of(model, [prompt] * n, 3, sampling=sampling, speculative=True, counts=counts)
    found = torch.zeros(125)
    for a, b, c in rows:
        found[25 * a + 5 * b + c] += 1
    assert 0.1 < counts.accepted / counts.drafted < 0.9, "both ways must be taken for the test to say anything"
    assert not found[expected == 0].any()
    likely = expected > 5
    rest_found, rest = found[~likely].sum(), expected[~likely].sum()
    chosen = [torch.cat([t[likely], r[None]]) for t, r in ((found, rest_found), (expected, rest))]
    kept = chosen[1] > 0
    total = (chosen[0][kept] - chosen[1][kept]).square().div(chosen[1][kept]).sum()
    assert torch.special.gammaincc((kept.sum() - 1) / 2, total / 2) > 0.01


def test_rows_are_seeded_and_stop_by_themselves():
    model, sampling = build(V3), Sampling(temperature=1.0)
    rows = tokens_of(model, PROMPTS, 12, sampling=sampling, seed=3)
    assert rows == tokens_of(model, PROMPTS, 12, sampling=sampling, seed=3)
    assert rows != tokens_of(model, PROMPTS, 12, sampling=sampling, seed=4)
    assert rows[0] == tokens_of(model, PROMPTS[:1], 12, sampling=sampling, seed=3)[0]
    stopped = tokens_of(model, PROMPTS, 12, slots=2, sampling=sampling, seed=3, stops=lambda row, token: row == 1)
    assert stopped == [rows[0], rows[1][:1], rows[2]], "the third waits for the second's slot"


def test_no_tokens_are_found_where_none_are_asked_for():
    assert tokens_of(build(V3), PROMPTS, 0) == [[], [], []]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    p = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    assert torch.allclose(Sampling(1.0, 0.6).probabilities(p), torch.tensor([0.5, 0.2, 0, 0]) / 0.7)
    assert Sampling().probabilities(p).tolist() == [1, 0, 0, 0]


def test_a_slot_takes_no_more_than_its_capacity():
    with pytest.raises(ValueError, match="slot 1: 0 \\+ 9 tokens, must be at most 8"):
        Cache(V3, n_layers=1, slots=2, capacity=8).step([1], [9])
