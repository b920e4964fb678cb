"""Runs of a tiny model on a few files of text, and what they leave: for tests of the rank program."""

import dataclasses
import json
import time
from pathlib import Path

from model.config import ModelConfig
from orchestrator.config import Config, WandbMode
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train.control import Control
from orchestrator.train.loop import run_rank

LAYOUTS = {"one": (1, 1, 1, 4), "pp2_ep2": (2, 2, 2, 4), "dp4_ep2": (1, 4, 2, 2), "pp4": (4, 1, 1, 4)}


def make_config(text: Path, run_dir: Path, layout: str = "one", **changes) -> Config:
    config = Config()
    config.model = ModelConfig(vocab_size=264, dim=48, inter_dim=96, moe_inter_dim=32, n_routed_experts=6,
                               n_mtp_layers=1, init_std=0.05, balance_loss_weight=1e-3, bias_update_speed=1e-2)
    config.layout.pp, config.layout.dp, config.layout.ep, config.layout.microbatches = LAYOUTS[layout]
    config.train = dataclasses.replace(config.train, steps=6, batch_size=16, seq_len=32, validate_every=3,
                                       validate_sequences=16)
    config.data.path, config.data.cache_dir = f"{text}/*.txt", str(text / "cache")
    config.data.validation_fraction = 0.2
    config.optim.warmup_steps = 2
    config.checkpoint.every, config.checkpoint.keep = 2, 0
    config.tracker.wandb = WandbMode.off
    config.run.dir, config.checkpoint.dir = str(run_dir), str(run_dir / "checkpoints")
    config.hardware.name, config.hardware.usd_per_h = "cpu", 3.6
    config.hardware.fp32_tflops = 0.1  # measuring it would take a good part of so short a run
    config.cluster.step_timeout_s = 120
    for key, value in changes.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value) if name else setattr(config, section, value)
    run_dir.mkdir(parents=True, exist_ok=True)
    return config


def train(info: RankInfo, config: Config, control: Control | None = None) -> dict:
    return run_rank(config, info, control=control or Control(), placed_at=time.time())


def run(ranks, function, config: Config, *args) -> list[dict]:
    return ranks.run(function, config, *args, world=config.layout.world_size)


def rows(run_dir: Path) -> dict[int, dict]:
    return {row["step"]: row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())}


def events(run_dir: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines()) if e["kind"] == kind]


def losses(run_dir: Path) -> dict[int, tuple]:
    keys = ("train/loss", "train/mtp_loss_1", "train/balance_loss", "train/grad_norm", "validation/loss",
            "validation/mtp_loss_1", "validation/mtp_acceptance_1")
    return {step: tuple(row.get(key) for key in keys) for step, row in rows(run_dir).items()}


def checkpoint_of(run_dir: Path, step: int) -> str:
    return str(next((run_dir / "checkpoints").glob(f"step-{step:08d}*")))
