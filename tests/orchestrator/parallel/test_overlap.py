"""DualPipeV's pairs at once: bit for bit what they give in turn, with every exchange beside work of the other half."""

from functools import partial

import pytest
import torch

from model.config import ModelConfig
from model.moe import FeedForward
from orchestrator.config import Config, Schedule
from orchestrator.parallel import exchange, overlap
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.overlap import hand_over, take_turns
from orchestrator.parallel.pipeline import build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import check_run, layout_of

CPU = torch.device("cpu")
SEQUENCES, SEQ_LEN, VOCAB = 16, 16, 96


@pytest.mark.parametrize("first, second, expected", [
    (1, 3, ["a0", "b0", "a ends", "b1", "b2", "b ends"]),
    (3, 1, ["a0", "b0", "a1", "b ends", "a2", "a ends"]),
    (2, 2, ["a0", "b0", "a1", "b1", "a ends", "b ends"]),
    (0, 0, ["a ends", "b ends"])])
def test_halves_change_at_each_hand_over_and_the_longer_goes_on_alone(first, second, expected):
    said = []

    def half(name: str, times: int) -> None:
        for i in range(times):
            said.append(f"{name}{i}")
            hand_over()
        said.append(f"{name} ends")

    take_turns(partial(half, "a", first), partial(half, "b", second), CPU)
    assert said == expected


@pytest.mark.parametrize("failing", ["a", "b"])
def test_where_a_half_fails_the_other_ends_at_its_next_turn(failing):
    went_on = []

    def half(name: str) -> None:
        hand_over()
        if name == failing:
            raise ConnectionError(f"{name} lost its peer")
        hand_over()
        went_on.append(name)

    with pytest.raises(ConnectionError, match=f"{failing} lost its peer"):
        take_turns(partial(half, "a"), partial(half, "b"), CPU)
    assert not went_on
    take_turns(lambda: went_on.append("a"), lambda: went_on.append("b"), CPU)
    assert went_on == ["a", "b"]


def test_a_pair_within_a_pair_is_refused():
    with pytest.raises(RuntimeError, match="under way"):
        take_turns(lambda: take_turns(int, int, CPU), int, CPU)


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_of_one_half_ends_the_other_whoever_has_its_turn(late):
    """Ctrl-C reaches the thread of the first half even while the second half works."""
    went_on = []

    def first() -> None:
        if not late:
            raise KeyboardInterrupt
        hand_over()

    def second() -> None:
        if late:
            overlap._turns.failure = KeyboardInterrupt()
        hand_over()
        went_on.append("second")

    with pytest.raises(KeyboardInterrupt):
        take_turns(first, second, CPU)
    assert not went_on


def make_config(pp: int, *, at_once: bool, fp8: bool = False, per_node: int = 0) -> Config:
    config = Config()
    config.model = ModelConfig(
        vocab_size=VOCAB, dim=48, n_layers=8 if pp > 1 else 2, n_dense_layers=1, inter_dim=96, n_heads=4,
        q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8,
        n_activated_experts=2, moe_inter_dim=32, n_mtp_layers=1 if pp > 1 else 0, balance_loss_weight=1e-2,
        init_std=0.05)
    config.layout.pp, config.layout.dp, config.layout.ep = pp, 2, 2
    config.layout.schedule = Schedule["dualpipev" if pp > 1 else "1f1b"]
    config.layout.microbatches, config.layout.overlap = 8 if pp > 1 else 1, at_once
    config.precision.fp8, config.layout.ep_per_node = fp8, per_node
    config.train.batch_size, config.train.seq_len, config.train.validate_sequences = SEQUENCES, SEQ_LEN, SEQUENCES
    check_run(config)
    return config


def step(info: RankInfo, config: Config, dtype: torch.dtype = torch.float32) -> tuple[list, list, list[tuple]]:
    """Losses and gradients of one step, and who did what: the half of a pair (None outside), the event."""
    happened = []

    def note(event: str) -> None:
        happened.append((overlap._turns.running if overlap._turns else None, event))

    forward, start, awaited = FeedForward.forward, exchange.Crossing.__init__, exchange.Journey.awaited

    def noted_start(self, rows, *args):
        start(self, rows, *args)
        if rows.shape[-1] > 1:  # weights travel beside the rows
            note("starts")

    def noted_wait(self):
        if not self.small:
            note("is awaited")
        return awaited(self)

    def noted_forward(self, x):
        note("shared experts")
        out = forward(self, x)
        if out.requires_grad:
            out.register_hook(lambda grad: note("their backward"))
        return out

    mesh = connect(layout_of(config), info, CPU, timeout_s=60)
    pipeline = build_pipeline(config, mesh, dtype)
    batch = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN + 1 + config.model.n_mtp_layers),
                          generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.Crossing, "__init__", noted_start)
        patch.setattr(exchange.Journey, "awaited", noted_wait)
        for layer in pipeline.stages[0].layers.values() if mesh.pp is None else ():
            if hasattr(layer, "moe"):
                patch.setattr(layer.moe.shared_experts, "forward", partial(noted_forward, layer.moe.shared_experts))
        losses = pipeline.train_step(batch[mesh.coordinate.dp :: 2], step_sequences=SEQUENCES)
    return losses.tolist(), [(s.name, s.start, s.grad().clone().numpy()) for s in pipeline.shards], happened


@pytest.mark.parametrize("fp8, per_node, dtype", [
    (False, 0, torch.float32), (True, 0, torch.float32), (False, 1, torch.bfloat16)])
def test_at_once_equals_in_turn_and_each_exchange_runs_beside_the_other_half(ranks, fp8, per_node, dtype):
    at_once, in_turn = (ranks.run(step, make_config(2, at_once=at_once, fp8=fp8, per_node=per_node), dtype, world=4)
                        for at_once in (True, False))
    for (losses, grads, happened), (same_losses, same_grads, before) in zip(at_once, in_turn, strict=True):
        assert losses == same_losses
        for (name, start, grad), (same_name, same_start, same) in zip(grads, same_grads, strict=True):
            assert (name, start) == (same_name, same_start) and (grad == same).all(), name
        assert {half for half, _ in before} == {None}
        assert sorted(event for _, event in happened) == sorted(event for _, event in before)
        beside = alone = 0
        for (half, event), (next_half, _) in zip(happened, happened[1:], strict=False):
            if half is not None and event == "is awaited":
                beside, alone = beside + (next_half == 1 - half), alone + (next_half != 1 - half)
        assert beside > 3 * alone > 0, (beside, alone)
    for (*_, ours), (*_, theirs) in zip(at_once[::2], at_once[1::2], strict=True):
        assert ours == theirs, "ranks of an expert group exchange in the same order"


def fail_in_a_pair(info: RankInfo, config: Config, half: int) -> tuple[str, list]:
    """What a step ends with where an exchange fails in that half of a pair, and what the thread does afterwards."""
    wait = exchange.Crossing.wait

    def failing(self):
        if overlap._turns and overlap._turns.running == half:
            raise ConnectionError("the peer is gone")
        return wait(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.Crossing, "wait", failing)
        try:
            step(info, config)
            told = "nothing"
        except Exception as failure:
            told = repr(failure.__cause__ or failure)
    went_on = []
    take_turns(partial(went_on.append, 1), partial(went_on.append, 2), CPU)
    return told, went_on


@pytest.mark.parametrize("half", [0, 1])
def test_an_exchange_that_fails_in_a_pair_fails_the_step_with_its_own_error(ranks, half):
    for told, went_on in ranks.run(fail_in_a_pair, make_config(2, at_once=True), half, world=4):
        assert "the peer is gone" in told and went_on == [1, 2]


def test_shared_experts_run_beside_the_way_to_the_experts_and_its_gradient(ranks):
    for _, _, happened in ranks.run(step, make_config(1, at_once=True), world=2):
        assert [event for _, event in happened] == [
            "starts", "shared experts", "is awaited", "starts", "is awaited",
            "starts", "is awaited", "starts", "their backward", "is awaited"]
