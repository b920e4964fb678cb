"""Predicted memory against what a GPU's allocator hands out; skips itself without one."""

from dataclasses import replace

import pytest
import torch

from orchestrator.compose import compose_config
from orchestrator.parallel.mesh import connect
from orchestrator.parallel.pipeline import build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.keeping import own
from orchestrator.plan.layout import layout_of
from orchestrator.plan.memory import GIB, memory_gib
from orchestrator.plan.workload import Workload
from orchestrator.train.optim import build_optimizer, clip_and_step


def take_steps(overrides: list[str], device: torch.device):
    """Yields after each step of a run of one rank."""
    config = compose_config(["model=tiny", *overrides])
    mesh = connect(layout_of(config), RankInfo(), device, timeout_s=60)
    pipeline = build_pipeline(config, mesh, torch.bfloat16)
    moments = torch.bfloat16 if config.precision.fp8 else torch.float32
    optimizer = build_optimizer(pipeline.shards, config.optim, moments_dtype=moments)
    tokens = torch.randint(0, config.model.vocab_size, (32, 513 + config.model.n_mtp_layers), device=device)
    while True:
        pipeline.train_step(tokens, step_sequences=32)
        pipeline.finish_grads()
        clip_and_step(optimizer, pipeline.shards, norm=1.0, optim=config.optim, lr=1e-3)
        pipeline.zero_grad()
        yield config


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_gpus_measured_peak_is_met_within_five_percent(precision):
    device = torch.device("cuda", 0)
    square = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    for _ in range(2):
        square = square @ square
    del square
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()  # cuBLAS's workspace stays, and is no part of the prediction
    steps = take_steps([f"precision={precision}"], device)
    next(steps)
    torch.cuda.reset_peak_memory_stats()
    config = next(steps)
    measured = torch.cuda.max_memory_allocated() - before
    work = Workload(config.model, catalogue()["h100"], 512, 32, 1, 1, 1, "1f1b", config.layout.microbatches,
                    dtype=precision, keeping=replace(own(precision), framework_gib=0.0))
    predicted = memory_gib(work)["total"] * GIB
    print(f"{precision}: predicted over measured {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=0.05)
