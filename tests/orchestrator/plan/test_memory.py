"""Predicted memory against what torch's own allocator hands out, and against what others published."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from model import count
from model.transformer import Transformer
from orchestrator.compose import compose_config
from orchestrator.config import Config, Recompute
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.pipeline import Pipeline, build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan import memory
from orchestrator.plan.activations import backward_bytes, block_bytes
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.keeping import MEGATRON, own
from orchestrator.plan.layout import layout_of
from orchestrator.plan.memory import GIB, activation_peaks, memory_gib, rank_memory_gib, state_bytes, too_large
from orchestrator.plan.workload import Workload, pipeline_of, rank_parameters
from orchestrator.train.optim import AdamW, build_optimizer, clip_and_step
from tests.torch_memory import most_allocated


@pytest.fixture(scope="module")
def v3() -> Workload:
    model = compose_config(["model=deepseek_v3"]).model
    return Workload(model, catalogue()["h800"], 4096, 15360, 16, 128, 64, "dualpipe", 120, dtype="fp8",
                    recompute=Recompute.selective)


def measured_peak(model, sequences: int, seq_len: int, microbatches: int, recompute: Recompute) -> int:
    """Bytes of parameters and optimizer, and at most of what a second step allocates on top."""
    network = Transformer(model).train()
    network.recompute = recompute is Recompute.full
    if recompute is Recompute.selective:
        network.keep_less()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in network.buffers():
        buffer.zero_()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    tokens = torch.randint(0, model.vocab_size, (sequences, seq_len + 1 + model.n_mtp_layers))

    def step() -> None:
        for part in tokens.chunk(microbatches):
            network(part, part).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    before = sum(3 * p.numel() * p.element_size() for p in network.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    return most_allocated(recorded, before=before)


@pytest.mark.parametrize("name, recompute", [
    ("tiny", Recompute.none), ("tiny", Recompute.full), ("tiny_dense_active", Recompute.none),
    ("tiny_dense_active", Recompute.selective)])
def test_torchs_measured_peak_is_met_within_five_percent(name, recompute):
    torch.manual_seed(0)
    model = compose_config([f"model={name}"]).model
    work = Workload(model, catalogue()["cpu"], 128, 8, 1, 1, 1, "1f1b", 2, keeping=own("fp32", cpu=True),
                    recompute=recompute)
    assert memory_gib(work)["total"] * GIB == pytest.approx(measured_peak(model, 8, 128, 2, recompute), rel=0.05)


def precision_of(config: Config) -> str:
    return "fp8" if config.precision.fp8 else config.precision.compute_dtype.name.replace("auto", "fp32")


def train_steps(info: RankInfo, overrides: list[str], *, steps: int) -> tuple[Pipeline, AdamW]:
    config = compose_config(["model=tiny", "train.batch_size=8", "train.seq_len=128", *overrides])
    mesh = connect(layout_of(config), info, torch.device("cpu"), timeout_s=60)
    moments = torch.bfloat16 if config.precision.fp8 else torch.float32
    pipeline = build_pipeline(config, mesh, torch.bfloat16 if precision_of(config) == "bf16" else torch.float32)
    optimizer = build_optimizer(pipeline.shards, config.optim, moments_dtype=moments)
    sequences = 8 // config.layout.dp
    tokens = torch.randint(0, config.model.vocab_size, (sequences, 129 + config.model.n_mtp_layers),
                           generator=torch.Generator().manual_seed(info.rank))
    for step in range(steps):
        with record_function(f"step {step}"):
            pipeline.train_step(tokens, step_sequences=8)
            pipeline.finish_grads()
            clip_and_step(optimizer, pipeline.shards, norm=1.0, optim=config.optim, lr=1e-3)
            pipeline.zero_grad()
    return pipeline, optimizer


def peak_of_rank(info: RankInfo, overrides: list[str]) -> int:
    """Bytes that this rank's tensors take at most during its second step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = train_steps(info, overrides, steps=4)
    del held
    return most_allocated(recorded, within="step 1")


def kept_of_rank(info: RankInfo, overrides: list[str]) -> tuple[int, int]:
    """Bytes of gradients, and of buffers that microbatches are received into, that a step leaves behind."""
    pipeline, _ = train_steps(info, overrides, steps=2)
    grads = [value.grad for shard in pipeline.shards for value in (shard.value, shard.parameter)]
    infos = [info for runtime, _ in pipeline.runtimes.values() for stage in getattr(runtime, "_stages", [])
             for table in (stage.args_recv_info, stage.grad_recv_info) for row in table.values() for info in row]
    assert infos
    buffers = [info.buffer for info in infos if info.buffer is not None and info.buffer.device.type != "meta"]
    return sum(grad.nbytes for grad in grads if grad is not None), sum(buffer.nbytes for buffer in buffers)


def test_a_step_leaves_neither_gradients_nor_receive_buffers_behind(ranks):
    overrides = ["layout.pp=2", "layout.dp=2", "layout.schedule=interleaved_1f1b", "layout.microbatches=2"]
    assert ranks.run(kept_of_rank, overrides, world=4) == [(0, 0)] * 4


PP = ["layout.pp=2", "layout.microbatches=4"]
BOTH = ["layout.dp=2", "layout.ep=2"]
SELECTIVE = "layout.recompute=selective"


@pytest.mark.parametrize("overrides", [
    PP, PP + ["layout.schedule=gpipe"], PP + ["layout.schedule=interleaved_1f1b"],
    PP + ["layout.schedule=interleaved_zero_bubble"], PP + ["layout.schedule=zbv"], PP + ["layout.schedule=dualpipev"],
    ["layout.dp=2"], BOTH, [*BOTH, "layout.pp=2", "layout.microbatches=2"],
    ["precision=bf16", *PP], ["precision=bf16", *BOTH], ["precision=fp8", *PP], ["precision=fp8", *BOTH],
    [*PP, SELECTIVE], [*PP, SELECTIVE, "layout.schedule=zbv"], [*PP, SELECTIVE, "layout.schedule=dualpipev"],
    ["precision=bf16", *BOTH, SELECTIVE], ["precision=fp8", *BOTH, SELECTIVE]], ids=" ".join)
def test_the_fullest_ranks_measured_peak_is_met_within_five_percent(ranks, overrides):
    config = compose_config(["model=tiny", *overrides])
    layout = config.layout
    work = Workload(config.model, catalogue()["cpu"], 128, 8, layout.pp, layout.dp, layout.ep, layout.schedule.name,
                    layout.microbatches, stages_per_rank=layout.stages_per_rank, dtype=precision_of(config),
                    recompute=layout.recompute, keeping=own(precision_of(config), cpu=True))
    found = ranks.run(peak_of_rank, overrides, world=layout.pp * layout.dp)
    predicted = memory_gib(work)["total"] * GIB
    print(f"{' '.join(overrides)}: predicted over measured {predicted / max(found) - 1:+.1%}")
    assert predicted == pytest.approx(max(found), rel=0.05)


@pytest.mark.parametrize("schedule, pp, microbatches", [
    ("gpipe", 4, 8), ("1f1b", 4, 40), ("interleaved_1f1b", 4, 32), ("interleaved_zero_bubble", 4, 32), ("zbv", 4, 40),
    ("dualpipev", 4, 40), ("dualpipe", 4, 40)])
def test_the_peak_of_a_long_step_is_read_off_a_short_table(v3, schedule, pp, microbatches, monkeypatch):
    work = replace(v3, pp=pp, microbatches=microbatches, schedule=schedule)
    short = activation_peaks(work)
    monkeypatch.setattr(memory, "_enough", lambda schedule, microbatches, pp: microbatches)
    assert activation_peaks(work) == short


def test_v3s_own_layout_fits_its_devices_by_what_its_report_recomputes(v3):
    """Norms and MLA's up-projections again, DualPipe, FP8, 80 GB (V3 report, sections 3.2.3 and 3.3.3)."""
    assert too_large(v3) is None
    reason = too_large(replace(v3, recompute=Recompute.none))
    assert reason.startswith("needs ") and reason.endswith("of them activations")


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv", "dualpipev", "dualpipe"])
@pytest.mark.parametrize("keeping", [own("bf16"), MEGATRON], ids=["own", "megatron"])
def test_rounds_that_are_left_out_would_show_no_larger_peak(monkeypatch, schedule, keeping):
    model = compose_config(["model=moonlight_16b"]).model
    work = Workload(model, catalogue()["h100"], 4096, 640, 4, 8, 4, schedule, 20, keeping=keeping)
    told, ranks = memory_gib(work), rank_memory_gib(work)
    monkeypatch.setattr(memory, "_enough", lambda schedule, microbatches, pp: microbatches)
    assert told == memory_gib(work) and ranks == rank_memory_gib(work)
    assert told["total"] == max(parts["total"] for parts in ranks)


@pytest.mark.parametrize("schedule, in_flight", [("1f1b", lambda rank: 16 - rank), ("gpipe", lambda rank: 32)])
def test_a_rank_holds_the_microbatches_that_it_is_ahead_of_the_last(schedule, in_flight):
    """Llama 3.1 405B over 16 ranks; the inner ones have as many parameters. The last one's peak is its loss."""
    model = compose_config(["model=llama_3_1_405b"]).model
    work = Workload(model, catalogue()["h100"], 8192, 1024, 16, 32, 1, schedule, 32, tp=8)
    ranges, block = pipeline_of(work)[0], block_bytes(work, False) / GIB
    for rank, parts in enumerate(rank_memory_gib(work)):
        running = backward_bytes(work, False) / GIB if rank < 15 else 0.0
        held = in_flight(rank) * len(ranges[rank]) * block
        assert parts["activations"] - running == pytest.approx(held), rank


def test_zero_stages_shard_one_component_after_the_other(v3):
    """Rajbhandari et al. 2020, figure 1: optimizer state, then gradients, then parameters over the replicas."""
    work = replace(v3, keeping=MEGATRON, ep=1, schedule="1f1b")
    whole, shared = state_bytes(replace(work, zero=0), 1e9, 0), [state_bytes(replace(work, zero=z), 1e9, 0)
                                                                for z in (1, 2, 3)]
    assert sum(whole.values()) == 18e9
    for stage, names in enumerate((("masters", "moments"), ("gradients",), ("weights",))):
        for name in names:
            assert [found[name] for found in shared] == [whole[name]] * stage + [whole[name] / 128] * (3 - stage)


def test_tensor_and_context_ranks_share_activations(v3):
    for axis in ("tp", "cp"):
        one, two = (rank_memory_gib(work)[3]["activations"] for work in (v3, replace(v3, **{axis: 2})))
        assert two == pytest.approx(one / 2, rel=0.05)


def test_a_gpt_layer_keeps_the_34_bytes_of_korthikanti_et_al(v3):
    """Section 4.1: 34 bytes a token and hidden element with dropout, 5 a score of unfused attention."""
    dim, heads, seq = 512, 8, 1024
    model = replace(compose_config(["model=llama_2_7b"]).model, dim=dim, n_heads=heads, n_kv_heads=heads, n_layers=12,
                    n_dense_layers=12, head_dim=dim // heads, inter_dim=8 * dim // 3, vocab_size=50304)
    keeping = replace(MEGATRON, dropout=True, flash=False)
    work = Workload(model, v3.hardware, seq, 4, 1, 1, 1, "1f1b", 1, keeping=keeping)
    assert block_bytes(work, False) == pytest.approx(4 * seq * (34 * dim + 5 * heads * seq), rel=0.001)
    assert block_bytes(replace(work, recompute=Recompute.full), False) == 4 * seq * 2 * dim


def test_a_megatron_tests_peak_on_the_last_rank_is_met(v3):
    """gpt3_mcore_te_tp1_pp4_vp1 of Megatron-LM's tests (dev_dgx_h100, commit adc69dba2d): 3.875 GiB, of which about
    0.11 are libraries' workspaces."""
    model = replace(compose_config(["model=llama_2_7b"]).model, dim=512, n_heads=8, n_kv_heads=8, n_layers=12,
                    n_dense_layers=12, head_dim=64, inter_dim=1365, vocab_size=50304, tie_embeddings=True)
    work = Workload(model, v3.hardware, 1024, 32, 4, 2, 1, "interleaved_1f1b", 4, stages_per_rank=3, even_stages=True,
                    zero=0, keeping=replace(MEGATRON, dropout=True, flash=False, sequence_parallel=False))
    assert rank_memory_gib(work)[-1]["total"] + 0.11 == pytest.approx(3.875, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "deepseek_v2_lite"])
def test_tensor_ranks_each_have_all_of_latents_routers_and_norms(name, v3):
    """Megatron-Core: MLA's projections down are duplicated, and so are routers and norms."""
    with torch.device("meta"):
        network = Transformer(compose_config([f"model={name}"]).model)
    tensors = dict(network.named_parameters()) | {key: value for key, value in network.named_buffers()
                                                  if key.endswith("expert_bias")}
    same = routed = 0
    for key, tensor in tensors.items():
        same += tensor.numel() * any(part in key for part in ("wq_a", "wkv_a", "norm", "router"))
        routed += tensor.numel() * (".experts." in key)
    split = sum(tensor.numel() for tensor in tensors.values()) - same - routed
    work = Workload(network.config, v3.hardware, 256, 16, 1, 2, 4, "1f1b", 2, tp=2)
    ranges, table, _ = pipeline_of(work)
    for tp in (1, 2):
        dense, experts = rank_parameters(replace(work, tp=tp), ranges, table[0])
        assert (dense, experts) == (split / tp + same, routed / 4)
    one, two = (memory_gib(replace(work, tp=tp, keeping=MEGATRON))["weights"] * GIB / 2 for tp in (1, 2))
    assert one - two == pytest.approx(split / 2)


def test_a_v3_rank_keeps_its_share_of_heads_and_all_of_the_latents(v3):
    """Four blocks under pp=16, tp=8, by hand: a block's 17 million of latents and router are not cut in eight."""
    work = replace(v3, tp=8, schedule="1f1b")
    ranges, table, _ = pipeline_of(work)
    latents, norms = 7168 * (1536 + 512 + 64) + 1536 + 512, 2 * 7168
    cut = 128 * (1536 * 192 + 512 * 256 + 128 * 7168) + 3 * 7168 * 2048
    dense, _ = rank_parameters(work, ranges, table[1])
    assert len(ranges[1]) == 4 and dense == 4 * (latents + norms + 256 * 7169 + cut / 8)


def test_a_tied_embedding_on_one_rank_is_held_once(v3):
    model = compose_config(["model=tiny"]).model
    work = replace(v3, model=replace(model, tie_embeddings=True), pp=1, dp=1, ep=1, schedule="1f1b")
    ranges, table, _ = pipeline_of(work)
    assert sum(rank_parameters(work, ranges, table[0])) == count.parameters(work.model, mtp=True).total


def test_gathered_weights_and_reduced_gradients_have_the_experts_that_others_have_too():
    """Mixtral 8x22B on 32 ranks without expert parallelism: a block's experts are 2.4B parameters."""
    model = compose_config(["model=mixtral_8x22b"]).model
    work = Workload(model, catalogue()["h100"], 4096, 128, 1, 32, 1, "1f1b", 4, zero=3, recompute=Recompute.full)
    block = count.layer_parameters(model, 0).total
    assert block > 2.4e9 and memory_gib(work)["buffers"] == pytest.approx((2 * 2 + 4) * block / GIB)
    own_experts = replace(work, ep=8, dp=8)  # one expert on each rank, that no other has
    dense = block - count.layer_parameters(model, 0).routed_experts
    rows = 2 * 2 * own_experts.microbatch_tokens * model.dim * model.n_activated_experts
    assert memory_gib(own_experts)["buffers"] == pytest.approx(((2 * 2 + 4) * dense + rows) / GIB)


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev", "dualpipe"])
def test_mtp_uses_the_embedding_of_its_own_rank(v3, schedule):
    """V3 report, section 3.2.3: one rank has the first layers and the last, and MTP shares its embedding; `train` has a
    copy there too, and whose first stage is on another rank has one."""
    table = v3.model.vocab_size * v3.model.dim
    work = replace(v3, schedule=schedule)
    copied = replace(work, keeping=replace(work.keeping, eager=True))
    sizes = [rank_parameters(each, *(pipeline_of(each)[0], pipeline_of(each)[1][0]))[0] for each in (work, copied)]
    assert sizes[1] - sizes[0] == pytest.approx(v3.model.n_mtp_layers * table)
    apart = replace(v3, schedule="1f1b")
    ranges, rows, _ = pipeline_of(apart)
    last = rank_parameters(apart, ranges, rows[-1])[0]
    assert rank_parameters(replace(apart, keeping=copied.keeping), ranges, rows[-1])[0] == last
