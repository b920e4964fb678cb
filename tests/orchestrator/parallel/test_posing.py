"""What a GPU asks of this program beyond values, shown without one: every tensor on the device where it is wanted."""

import shutil

import pytest
import torch

from orchestrator.config import Recompute
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.pipeline import Pipeline, build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import check_run, layout_of
from tests.harness import Ranks
from tests.model.test_recompute import Counted
from tests.orchestrator.parallel.test_grid import (
    SEQ_LEN,
    SEQUENCES,
    VOCAB,
    assert_equal_to_one_process,
    make_config,
    train,
)
from tests.posing import build

pytestmark = [pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
              pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nobody need pose as one")]
TOKENS = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN + 2), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def posing(tmp_path_factory):
    pool = Ranks(build(tmp_path_factory.mktemp("posing")))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def reference():
    return train(RankInfo(), make_config(1, 1, 1, "1f1b"), steps=1)


def test_ranks_that_pose_as_gpus_equal_the_one_process_run(posing, reference):
    """Stages, replicas, experts that overlap with another microbatch, tokens that go by node."""
    config = make_config(2, 2, 2, "dualpipev")
    config.layout.ep_per_node = 1
    check_run(config)
    assert_equal_to_one_process(posing.run(train, config, "cuda:0", 1, world=4, timeout_s=400), reference)


def built(info: RankInfo, dtype: torch.dtype, fp8: bool, recompute: str, device: str = "cuda:0") -> Pipeline:
    config = make_config(1, 1, 1, "1f1b")
    config.layout.recompute, config.layout.microbatches = Recompute[recompute], 2
    config.precision.fp8 = fp8
    return build_pipeline(config, connect(layout_of(config), info, torch.device(device), timeout_s=60), dtype)


def trained(info: RankInfo, *how) -> list[float]:
    """Losses of one step."""
    pipeline = built(info, *how)
    device = pipeline.mesh.device
    losses = pipeline.train_step(TOKENS.to(device), step_sequences=SEQUENCES)
    assert all(shard.grad().isfinite().all() and shard.grad().device == device for shard in pipeline.shards)
    return losses.tolist()


@pytest.mark.parametrize("fp8, recompute", [(False, "full"), (True, "selective")])
def test_low_precision_and_recompute_train(posing, fp8, recompute):
    (found,) = posing.run(trained, torch.bfloat16, fp8, recompute, world=1)
    assert found == pytest.approx(trained(RankInfo(), torch.bfloat16, fp8, "none", "cpu"), rel=2e-3)


def casts(info: RankInfo) -> list[int]:
    """Casts of each of three forwards, whose backward recomputes in autograd's own thread for the device."""
    (stage,), made = built(info, torch.bfloat16, False, "selective").stages, []
    with torch.autocast("cuda", enabled=False):
        for _ in range(3):
            tokens = TOKENS[:2].to("cuda:0")
            with Counted() as counted:
                loss = stage(tokens, tokens).sum()
            made.append(counted.calls["_to_copy"])
            loss.backward()
    return made


def test_recompute_in_autograds_thread_leaves_the_casts_of_weights(posing):
    ((first, second, third),) = posing.run(casts, world=1)
    assert first > second == third


def test_operators_between_devices_fail(posing):
    with pytest.raises(AssertionError, match="some tensors are on cuda:0, some on the CPU"):
        posing.run(between_devices, world=1)


def between_devices(info: RankInfo) -> None:
    torch.ones(2, device="cuda:0") + torch.ones(2)
