"""One rank under torchrun (or alone): the same rank program as a Ray worker's, the same losses.

`torchrun --nproc-per-node 4 -m orchestrator train experiment=tiny` comes here from the driver;
`torchrun --nproc-per-node 4 -m orchestrator.train.rank CONFIG.yaml` needs neither Hydra nor Ray.
"""

import contextlib
import json
import signal
import sys
import threading
from dataclasses import replace
from functools import partial

import torch

from orchestrator.config import Config, from_dict, to_dict
from orchestrator.errors import BadRequest, SparingError, require, words
from orchestrator.parallel.mesh import open_store
from orchestrator.parallel.rank_info import RankInfo, rank_from_env
from orchestrator.plan.hardware import resolve_hardware
from orchestrator.plan.layout import check_run
from orchestrator.train.control import Control, steady
from orchestrator.train.finish import finish_run
from orchestrator.train.lineage import look_back
from orchestrator.train.memory import check_state
from orchestrator.train.processes import stop_signals
from orchestrator.train.progress import Progress
from orchestrator.train.run_dir import Claim, claim_run_dir, read_config


def train_as_rank(config: Config) -> dict | None:
    """Train as the rank that the environment names; rank 0 claims the run directory and returns the summary.

    The other ranks take the config from rank 0, so that a default run directory is one directory.
    """
    placed_at = steady()
    info = rank_from_env()
    world = config.layout.world_size
    require(info.world_size == world, "layout.dp", config.layout.dp,
            f"times layout.pp={config.layout.pp} must equal the {info.world_size} processes that torchrun started",
            f"start {world} processes, or use layout.dp={max(1, info.world_size // config.layout.pp)}")
    require(not config.cluster.spares, "cluster.spares", config.cluster.spares,
            "is for runs on Ray: torchrun keeps no warm rank", "leave it at 0, or start the run by `sparing train`")
    store = open_store(info, timeout_s=config.cluster.start_timeout_s)
    control = Control()
    for number in stop_signals():
        signal.signal(number, lambda caught, frame: control.request_stop(signal.Signals(caught).name))
    with contextlib.ExitStack() as stack:
        if info.rank == 0:
            progress, ended = stack.enter_context(Progress()), threading.Event()
            claim = _claimed(config, info, store, stack, progress)
            stack.callback(ended.set)
            threading.Thread(target=progress.follow, args=(control.status, ended), daemon=True).start()
        else:
            message = json.loads(store.get("config"))
            if "error" in message:
                return None
            claim = Claim(from_dict(Config, message["config"]), message["attempt"])
        from orchestrator.train.loop import run_rank

        sum_up = partial(finish_run, claim.config, placed_at=placed_at, devices=world, attempts=claim.attempt)
        try:
            result = run_rank(claim.config, info, control=control, placed_at=placed_at, attempt=claim.attempt,
                              store=store)
        except Exception as error:  # a mistake of ours too: what was held is charged all the same
            if info.rank == 0:
                with contextlib.suppress(SparingError):  # what ended the run is the news
                    sum_up({"status": "failed"}, released_at=steady(), refused=isinstance(error, BadRequest),
                           failure={"cause": words(error), "rank": info.rank, "node": info.node_rank})
            raise
        return sum_up(result, released_at=steady()) if info.rank == 0 else None


def _claimed(config: Config, info: RankInfo, store, stack: contextlib.ExitStack, progress: Progress) -> Claim:
    """Rank 0's side: look back, name the hardware, claim the run directory; tell the others, also when that fails."""
    try:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        config = replace(config, hardware=resolve_hardware(config.hardware, name))
        check_run(config)
        check_state(config, on_gpus=name is not None, here=info.local_world_size == info.world_size)
        look_back(config, progress, here=True)
        claim = stack.enter_context(claim_run_dir(config))
    except SparingError as error:
        if store is not None:
            store.set("config", json.dumps({"error": str(error)}))
        raise
    if store is not None:
        store.set("config", json.dumps({"config": to_dict(claim.config), "attempt": claim.attempt}))
    return claim


def main(argv: list[str]) -> int:
    """CONFIG.yaml: a run's `config.yaml`, or any file with the same keys."""
    if len(argv) != 1:
        print("usage: torchrun ... -m orchestrator.train.rank CONFIG.yaml", file=sys.stderr)
        return 2
    try:
        config = read_config(argv[0])
        check_run(config)
        summary = train_as_rank(config)
    except SparingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with contextlib.suppress(KeyError, TypeError):
        print(f"{summary['status']}: {summary['steps']} steps in {summary['run_dir']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
