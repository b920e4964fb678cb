"""Every schedule and grid equals the one-process run: five optimizer steps with MTP, balance loss and bias all on.

Tolerance: 1e-5 relative, per loss and per parameter (norm of the difference over the norm), fp32; routing
decisions, counted per expert and step, and expert biases are identical.
"""

import gc

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from model import init
from model.config import ModelConfig
from model.transformer import routers
from orchestrator.config import Config, Recompute, Schedule
from orchestrator.parallel import shard
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.pipeline import build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import check_run, layout_of
from orchestrator.train.optim import build_optimizer, clip_and_step, learning_rate, squared_norm

STEPS, SEQUENCES, SEQ_LEN, VOCAB = 5, 16, 24, 96
TOLERANCE = 1e-5

PIPELINES = [(pp, dp, ep, schedule) for schedule in Schedule.__members__ for pp, dp, ep in [(2, 1, 1), (2, 2, 2)]]
GRIDS = [(1, 2, 1, "1f1b"), (1, 2, 2, "1f1b"), (1, 4, 1, "1f1b"), (1, 4, 2, "1f1b"), (1, 4, 4, "1f1b"),
         (2, 2, 1, "1f1b"), (2, 2, 1, "dualpipev"), (4, 1, 1, "1f1b"), (4, 1, 1, "zbv"), (4, 1, 1, "dualpipev"),
         (4, 1, 1, "interleaved_zero_bubble")]


def make_config(pp: int, dp: int, ep: int, schedule: str, *, depths: int = 1, tied: bool = False,
                experts: int = 8) -> Config:
    config = Config()
    config.model = ModelConfig(
        vocab_size=VOCAB, dim=48, n_layers=8, n_dense_layers=1, inter_dim=96, n_heads=4, q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=experts, n_activated_experts=2,
        moe_inter_dim=32, n_expert_groups=experts // 2, n_limited_groups=2, n_mtp_layers=depths,
        balance_loss_weight=1e-2, bias_update_speed=1e-2, init_std=0.05, route_scale=2.5, tie_embeddings=tied)
    config.layout.pp, config.layout.dp, config.layout.ep = pp, dp, ep
    config.layout.schedule = Schedule[schedule]
    config.layout.microbatches = (16 if schedule in ("zbv", "dualpipev") else 8) // dp  # more than fill a V
    config.train.batch_size, config.train.seq_len, config.train.validate_sequences = SEQUENCES, SEQ_LEN, SEQUENCES
    config.optim.lr = 1e-3
    check_run(config)
    return config


def train(info: RankInfo, config: Config, device: str = "cpu", steps: int = STEPS) -> dict:
    """Steps on this rank's sequences; losses summed over ranks, counts over data-parallel ranks."""
    mesh = connect(layout_of(config), info, torch.device(device), timeout_s=60)
    pipeline = build_pipeline(config, mesh, torch.float32)
    optimizer = build_optimizer(pipeline.shards, config.optim)
    losses, counts, norms = [], {}, []
    share = SEQUENCES // mesh.layout.dp
    for step in range(steps):
        batch = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN + 1 + config.model.n_mtp_layers),
                              generator=torch.Generator().manual_seed(step)).to(device)
        mine = batch[mesh.coordinate.dp * share :][:share]
        sums = pipeline.train_step(mine, step_sequences=SEQUENCES).double()
        pipeline.finish_grads()
        packed = torch.cat([sums, squared_norm(pipeline.shards)[None]])
        if mesh.world is not None:
            dist.all_reduce(packed)
        for name, router in (pair for stage in pipeline.stages for pair in routers(stage)):
            tokens_per_expert = router.tokens_per_expert.clone()
            if mesh.dp_mesh is not None:
                dist.all_reduce(tokens_per_expert, group=mesh.dp_mesh.get_group())
            counts[step, name] = tokens_per_expert.tolist()
            router.update_bias(tokens_per_expert)
        norm = packed[-1].sqrt().item()
        clip_and_step(optimizer, pipeline.shards, norm=norm, optim=config.optim,
                      lr=learning_rate(step + 1, config.optim, 100))
        pipeline.zero_grad()
        losses.append(packed[:-1].tolist())
        norms.append(norm)
    held_out = pipeline.validate(batch[mesh.coordinate.dp * share :][:share]).double()
    if mesh.world is not None:
        dist.all_reduce(held_out)
    return {
        "losses": losses, "norms": norms, "counts": counts, "held_out": held_out.tolist(),
        "weights": [(s.name, s.start, s.row, s.value.detach().clone().cpu().numpy(), s.is_copy)
                    for s in pipeline.shards],
        "biases": {n: r.expert_bias.tolist() for stage in pipeline.stages for n, r in routers(stage)},
    }


@pytest.fixture(scope="module")
def reference():
    """The one-process run of each model: (MTP depths, tied embeddings); and of six experts."""
    found = {(depths, tied): train(RankInfo(), make_config(1, 1, 1, "1f1b", depths=depths, tied=tied))
             for depths, tied in [(1, False), (2, False), (0, True), (1, True)]}
    return found | {"six experts": train(RankInfo(), make_config(1, 1, 1, "1f1b", experts=6))}


def assert_equal_to_one_process(results: list[dict], reference: dict) -> None:
    whole = {name: torch.from_numpy(value) for name, _, _, value, _ in reference["weights"]}
    seen = dict.fromkeys(whole, 0)
    biases = {}
    for result in results:
        for ours, theirs in [*zip(result["losses"], reference["losses"], strict=True)]:
            assert ours == pytest.approx(theirs, rel=TOLERANCE)
        assert result["held_out"] == pytest.approx(reference["held_out"], rel=TOLERANCE)
        assert result["norms"] == pytest.approx(reference["norms"], rel=TOLERANCE)
        assert all(reference["counts"][key] == value for key, value in result["counts"].items())
        for name, start, row, rows, is_copy in result["weights"]:
            expected = whole[name][start : start + len(rows)]
            expected = expected[:, row : row + rows.shape[1]] if rows.ndim == 3 else expected
            difference = (torch.from_numpy(rows) - expected).norm()
            assert difference <= TOLERANCE * expected.norm(), (name, (difference / expected.norm()).item())
            seen[name] += 0 if is_copy else rows.size
        biases |= result["biases"]
    assert biases == reference["biases"]
    assert set(reference["counts"]) == {key for result in results for key in result["counts"]}
    assert all(count % whole[name].numel() == 0 and count > 0 for name, count in seen.items())


@pytest.mark.parametrize("pp, dp, ep, schedule", PIPELINES + GRIDS)
def test_five_steps_equal_the_one_process_run(ranks, reference, pp, dp, ep, schedule):
    results = ranks.run(train, make_config(pp, dp, ep, schedule), world=pp * dp)
    assert_equal_to_one_process(results, reference[1, False])


@pytest.mark.parametrize("dp, ep", [(4, 2), (4, 1)])
def test_replicas_share_out_rows_where_experts_do_not_divide(ranks, reference, dp, ep):
    """Three experts over two replicas, six over four: nothing is padded, every rank owns an equal part."""
    results = ranks.run(train, make_config(1, dp, ep, "1f1b", experts=6), world=dp)
    assert_equal_to_one_process(results, reference["six experts"])
    owned = [[rows.size for name, _, _, rows, _ in result["weights"] if ".experts." in name] for result in results]
    assert all(sizes == owned[0] for sizes in owned)


@pytest.mark.parametrize("experts", [range(6, 8), range(8, 8)])
def test_a_replica_draws_its_own_experts_and_none_if_it_owns_none(monkeypatch, experts):
    """Four experts over three replicas whose rows do not divide either: the last one has padding alone."""
    drawn, config = [], make_config(1, 1, 1, "1f1b").model
    monkeypatch.setattr(init, "initial_rows", lambda name, shape, *_, **__: drawn.append(name) or torch.ones(shape))
    own = torch.nn.Parameter(torch.zeros(len(experts), 64, 48))
    shard._draw(shard.Shard("layers.1.moe.experts.w13", own, own, (8, 64, 48), experts.start, True, False), config,
                seed=0)
    assert drawn == [f"layers.1.moe.experts.{expert}.w13" for expert in experts] and own.eq(1).all()


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"])
def test_two_mtp_depths_equal_the_one_process_run(ranks, reference, schedule):
    results = ranks.run(train, make_config(2, 1, 1, schedule, depths=2), world=2)
    assert_equal_to_one_process(results, reference[2, False])


@pytest.mark.parametrize("pp, dp, ep, schedule, depths",
                         [(2, 2, 2, "1f1b", 1), (2, 1, 1, "zbv", 0), (1, 2, 1, "1f1b", 1)])
def test_tied_embeddings_equal_the_one_process_run(ranks, reference, pp, dp, ep, schedule, depths):
    results = ranks.run(train, make_config(pp, dp, ep, schedule, depths=depths, tied=True), world=pp * dp)
    assert_equal_to_one_process(results, reference[depths, True])


@pytest.mark.parametrize("pp, dp, ep, schedule, per_node", [
    (1, 4, 4, "1f1b", 2), (2, 2, 2, "dualpipev", 1)])
def test_tokens_that_go_by_node_equal_the_one_process_run(ranks, reference, pp, dp, ep, schedule, per_node):
    config = make_config(pp, dp, ep, schedule)
    config.layout.ep_per_node = per_node
    check_run(config)
    assert_equal_to_one_process(ranks.run(train, config, world=4), reference[1, False])


@pytest.mark.parametrize("recompute, schedule, per_node", [
    ("full", "1f1b", 0), ("full", "1f1b", 1), ("selective", "1f1b", 1), ("selective", "interleaved_zero_bubble", 0),
    ("selective", "zbv", 0), ("selective", "dualpipev", 0)])
def test_recompute_equals_keeping_activations(ranks, reference, recompute, schedule, per_node):
    config = make_config(2, 2, 2, schedule)
    config.layout.recompute, config.layout.ep_per_node = Recompute[recompute], per_node
    assert_equal_to_one_process(ranks.run(train, config, world=4), reference[1, False])


def order_of_messages(info: RankInfo, config: Config) -> list[tuple[int, int]]:
    """Sender and receiver of what this rank sends and asks for in a validation, in order."""
    mesh, asked = connect(layout_of(config), info, torch.device("cpu"), timeout_s=60), []
    pipeline = build_pipeline(config, mesh, torch.float32)

    def noting(call, peer: str):
        def noted(tensor, **where):
            asked.append((info.rank, where[peer]) if peer == "group_dst" else (where[peer], info.rank))
            return call(tensor, **where)
        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("isend", "send", "irecv", "recv"):
            patch.setattr(dist, name, noting(getattr(dist, name), "group_dst" if "send" in name else "group_src"))
        pipeline.validate(torch.zeros(SEQUENCES, SEQ_LEN + 2, dtype=torch.int64))
    mesh.close()
    return asked


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_both_ends_ask_for_what_passes_in_a_validation_in_one_order(ranks, schedule):
    """Else NCCL, which takes the messages of two ranks in the order in which each asks, waits for ever."""
    ends = ranks.run(order_of_messages, make_config(2, 1, 1, schedule), world=2)
    assert ends[0] == ends[1] and len(ends[0]) >= 8


def train_in_bf16(info: RankInfo, config: Config) -> tuple:
    """Losses of two steps in bf16, and the dtypes that master weights and gradients have."""
    mesh = connect(layout_of(config), info, torch.device("cpu"), timeout_s=60)
    pipeline = build_pipeline(config, mesh, torch.bfloat16)
    optimizer = build_optimizer(pipeline.shards, config.optim)
    losses, share = [], SEQUENCES // mesh.layout.dp
    for step in range(2):
        batch = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN + 2), generator=torch.Generator().manual_seed(step))
        mine = batch[mesh.coordinate.dp * share :][:share]
        sums = pipeline.train_step(mine, step_sequences=SEQUENCES).double()
        pipeline.finish_grads()
        if mesh.world is not None:
            dist.all_reduce(sums)
        dtypes = {str(s.value.dtype) for s in pipeline.shards} | {str(s.grad().dtype) for s in pipeline.shards}
        clip_and_step(optimizer, pipeline.shards, norm=1.0, optim=config.optim, lr=1e-3)
        pipeline.zero_grad()
        losses.append(sums.tolist())
    mesh.close()
    return losses, dtypes


@pytest.mark.parametrize("pp, dp, ep", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_bf16_computes_over_fp32_masters_and_gradients(ranks, reference, pp, dp, ep):
    results = ranks.run(train_in_bf16, make_config(pp, dp, ep, "1f1b"), world=pp * dp)
    for losses, dtypes in results:
        assert dtypes == {"torch.float32"}
        for ours, exact in zip(losses, reference[1, False]["losses"], strict=False):
            assert ours[0] == pytest.approx(exact[0], rel=2e-2) and ours[0] != exact[0]


def leave_or_wait(info: RankInfo) -> str:
    """Rank 1 leaves the group after a sharded operation, its process lives on; what rank 0 hears while it waits."""
    mesh = connect(layout_of(make_config(1, 2, 2, "1f1b")), info, torch.device("cpu"), timeout_s=30)
    distribute_tensor(torch.ones(4), mesh.dp_mesh, [Shard(0)]).add(1)
    group = mesh.ep
    if info.rank == 1:
        mesh.close()
        del mesh, group
        gc.collect()
        return ""
    try:
        dist.recv(torch.empty(1), 1, group=group)
    except RuntimeError as error:
        return str(error)
    finally:
        mesh.close()


def test_who_waits_for_a_rank_that_has_left_hears_of_it(ranks):
    assert "closed by peer" in ranks.run(leave_or_wait, world=2)[0]
