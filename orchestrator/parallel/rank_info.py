"""Which process this is among all. The only reader of RANK and its kin; without torch, which a driver does not need."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class RankInfo:
    """One process among all; torchrun's meanings."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    has_gpu: bool = False
    """Ray gave it a GPU, whatever torch sees of it."""
    listen_fd: int = -1
    """Rank 0's socket that listens at the master port already, so that nobody else can have taken it; -1 is none."""


def rank_from_env() -> RankInfo:
    """What torchrun, Slurm's srun with torchrun's names, or a Ray worker put into the environment."""
    env = os.environ
    rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    return RankInfo(rank, world_size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world_size)),
                    int(env.get("GROUP_RANK", 0)), env.get("MASTER_ADDR", "127.0.0.1"),
                    int(env.get("MASTER_PORT", 29500)))


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts() -> int:
    """How often torchrun has started these ranks anew (`--max-restarts`): its store outlives them."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
