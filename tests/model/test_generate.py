"""Cached decoding against the whole forward, transformers' generate, and speculation against plain decoding."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from model import attention
from model.cache import Cache
from model.config import Attention, QKNorm
from model.decode import Decoder, _next_parts
from model.generate import Batch, Counts, Sampling, generate
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

    def rest_read() -> torch.Tensor:
        """What follows a first token, under a mask."""
        decoder = Decoder(model, slots=len(prompts), capacity=64)
        decoder.decode(slots, [8] * len(prompts))
        return decoder.hidden(slots, prompts)

    whole = rest_read()
    sizes, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 1024)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention",
                        lambda *args, **named: sizes.append(named["attn_mask"].numel() if "attn_mask" in named else 0)
                        or attend(*args, **named))
    found = rest_read()
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
    monkeypatch.setattr("model.decode.CHUNK_TOKENS", most)
    parts = read()
    assert max(whole[0]) > 40 and max(parts[0]) <= most and len(parts[0]) > 1
    for found, wanted in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert tokens_of(model, LONG, 12, slots=3, speculative=drafts) == texts


GROWTH = """
import torch
from model.decode import Decoder
from model.generate import Batch, Sampling
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
def add(number, length):
    prompts = [[(i + first) % 50 for i in range(length)] for first in range(number)]
    batch.add(prompts, [Sampling()] * number, range(number))
    while batch.reading:
        batch.read()
add(1, 40)
before = peak()
add(8, 1500)
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


@pytest.mark.parametrize("speculative", [False, True])
@torch.no_grad()
def test_a_tokens_odds_are_those_of_the_whole_forward_at_temperature_1(speculative):
    model, n = build(dataclasses.replace(V3, vocab_size=5)), 12
    sampling = Sampling(temperature=1.3, top_p=0.9, tops=3)
    samplings = [sampling, sampling, dataclasses.replace(sampling, tops=None)]
    batch = Batch(Decoder(model, slots=3, capacity=32), speculative=speculative)
    slots = batch.add([[1, 2, 3], [4], [2, 2]], samplings, range(3))
    read_all(batch)
    odds = {slot: [] for slot in slots}
    while any(len(batch.rows[slot].tokens) < n for slot in slots):
        for slot, token in batch.step():
            odds[slot].append(batch.odds(slot))
            assert slot == slots[2] or odds[slot][-1].token == token
    assert not speculative or 0 < batch.counts.accepted < batch.counts.drafted
    assert not any(odds[slots[2]]) and batch.odds(slots[0]) is None
    for slot in slots[:2]:
        tokens = batch.rows[slot].tokens
        scores = model(torch.tensor([tokens]))[0].log_softmax(-1)[-len(odds[slot]) - 1 : -1]
        found = torch.tensor([one.logprob for one in odds[slot]])
        torch.testing.assert_close(found, scores.gather(1, torch.tensor(tokens[-len(found):])[:, None])[:, 0],
                                   atol=1e-4, rtol=1e-4)
        for one, row in zip(odds[slot], scores, strict=True):
            values, ids = row.topk(3)
            assert [token for token, _ in one.tops] == ids.tolist()
            torch.testing.assert_close(torch.tensor([value for _, value in one.tops]), values, atol=1e-4, rtol=1e-4)


def read_all(batch: Batch, forwards: int = 100) -> int:
    """The tokens that so many forwards, or those that are left, read."""
    counts = batch.counts
    before = counts.prompt_tokens
    while batch.reading and forwards:
        batch.read()
        forwards -= 1
    return counts.prompt_tokens - before


def read_and_go_on(batch: Batch, prompts: list[list[int]], n: int) -> tuple[list[list[int]], int]:
    """Greedy tokens of each prompt, and how many tokens were read for them."""
    slots = batch.add(prompts, [Sampling()] * len(prompts), range(len(prompts)))
    rows = {slot: [] for slot in slots}
    read = read_all(batch)
    while any(len(row) < n for row in rows.values()):
        for slot, token in batch.step():
            if slot in rows:
                rows[slot].append(token)
    for slot in slots:
        batch.remove(slot)
    return [rows[slot][:n] for slot in slots], read


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("config", [V3, GLM], ids=lambda config: config.name)
def test_what_a_slot_holds_of_a_prompt_is_not_read_again(config, speculative):
    model = build(config)
    batch = Batch(Decoder(model, slots=3, capacity=64), speculative=speculative)
    talk, other = list(range(1, 21)), [30, 31, 32, 33]
    (said, same), read = read_and_go_on(batch, [talk, talk], 6)
    assert said == same == tokens_of(model, [talk], 6)[0] and read == len(talk), "one prompt is read once"
    turn = [*talk, *said[:4], 40, 41]  # goes on from the answer
    found, read = read_and_go_on(batch, [turn, other], 6)
    assert found == tokens_of(model, [turn, other], 6) and read == 3 + len(other)
    found, read = read_and_go_on(batch, [[*talk[:10], 9], turn[:8]], 6)
    assert found == tokens_of(model, [[*talk[:10], 9], turn[:8]], 6) and read == 2 + 1
    (slot,) = batch.add([turn], [Sampling()], [0])  # while it runs, another begins alike
    batch.read()
    batch.step()
    found, read = read_and_go_on(batch, [[*turn[:-1], 7]], 6)
    assert found == tokens_of(model, [[*turn[:-1], 7]], 6) and read == 2
    batch.remove(slot, forget=True)
    assert batch.held[slot] == [] and not batch.decoder.cache.layers[0][0][slot, :60].any()


def test_a_row_that_leaves_while_its_prompt_is_read_leaves_what_was_read_to_the_others(monkeypatch):
    monkeypatch.setattr("model.decode.CHUNK_TOKENS", 8)
    model, prompt = build(V3), list(range(1, 21))
    batch = Batch(Decoder(model, slots=3, capacity=64))
    slots = batch.add([prompt, prompt, [4, 2]], [Sampling()] * 3, [0] * 3)
    assert read_all(batch, 1) == 2, "the shortest prompt is first"
    assert [slot for slot, _ in batch.step()] == slots[2:] and read_all(batch, 1) == 8, "one prompt holds up no other"
    batch.remove(slots[0])
    assert read_all(batch, 2) == 12 and not batch.reading
    assert [token for slot, token in batch.step() if slot == slots[1]] == tokens_of(model, [prompt], 1)[0]
    batch.add([[9, 9, 9]], [Sampling()], [0])
    batch.remove(slots[0])
    assert not batch.reading and batch.free == [slots[0]]


def test_no_prompt_waits_for_all_that_come_after_it(monkeypatch):
    monkeypatch.setattr("model.decode.CHUNK_TOKENS", 8)
    batch = Batch(Decoder(build(V3), slots=2, capacity=64))
    (long,) = batch.add([list(range(1, 41))], [Sampling()], [0])
    forwards = 0
    while long not in batch.rows:
        (short,) = batch.add([[forwards, 3]], [Sampling()], [0])
        while short not in batch.rows and long not in batch.rows:
            batch.read()
            forwards += 1
        batch.remove(short)
    assert forwards == 10, "every other one"


def test_what_is_no_number_stays_with_its_own_sequence():
    model = build(QWEN3_MOE)
    decoder = Decoder(model, slots=2, capacity=64)
    decoder.prefill([0], [list(range(1, 41))])
    for tables in decoder.cache.layers:
        for table in tables:
            table[0, :40] = torch.nan
    decoder.free(0)
    found = decoder.prefill([0, 1], [[5], list(range(1, 31))])
    assert torch.isfinite(found).all() and torch.isfinite(decoder.decode([0, 1], [3, 4])).all()


def test_slots_side_by_side_are_read_where_they_are():
    cache = Cache(V3, n_layers=1, slots=5, capacity=8)
    for slots, is_view in [([2, 3, 4], True), ([1], True), ([1, 3], False), ([3, 2], False)]:
        _, (view,) = cache.step(slots, [1] * len(slots))
        (kept,) = view.append(torch.ones(len(slots), 1, cache.layers[0][0].shape[-1]))
        assert (kept.untyped_storage().data_ptr() == cache.layers[0][0].untyped_storage().data_ptr()) == is_view


def test_prompts_are_read_the_shortest_first_and_padded_to_twice_their_length_at_most():
    assert _next_parts([31, *[5] * 15], 512) == [(row, 5) for row in range(1, 16)]
    assert _next_parts([31, 0, 16, 40], 512) == [(2, 16), (0, 31)]
    assert _next_parts([31, 20, 25], 64) == [(1, 20), (2, 25)]
    assert _next_parts([900, 600], 512) == [(1, 512)]


def test_no_tokens_are_found_where_none_are_asked_for():
    assert tokens_of(build(V3), PROMPTS, 0) == [[], [], []]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    p = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    assert torch.allclose(Sampling(1.0, 0.6).probabilities(p), torch.tensor([0.5, 0.2, 0, 0]) / 0.7)
    assert Sampling().probabilities(p).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("spread", [0.1, 4.0], ids=["flat", "peaked"])
def test_top_p_among_the_likeliest_is_top_p_among_all(spread, monkeypatch):
    logits = spread * torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("model.generate.NUCLEUS", 500)
    whole = Sampling(1.0, 0.9).probabilities(logits)
    monkeypatch.setattr("model.generate.NUCLEUS", 100)
    assert torch.equal(Sampling(1.0, 0.9).probabilities(logits), whole) and (whole == 0).any()


def test_a_slot_takes_no_more_than_its_capacity():
    with pytest.raises(ValueError, match="slot 1: 0 \\+ 9 tokens, must be at most 8"):
        Cache(V3, n_layers=1, slots=2, capacity=8).step([1], [9])
