"""What FP8 training does to the loss: the same data and seeds in fp32 and in emulated FP8, held-out loss at the end.

    python benchmarks/fp8_loss.py --seeds 2 --steps 100 --sequences 4

Two trainings part ways by chance as soon as one sum is rounded differently. A third run of each seed, fp32 with the
batch cut into microbatches, shows by how much: a difference that is not larger says nothing against FP8, nor for it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from orchestrator.compose import compose_config
from orchestrator.parallel.mesh import RankInfo
from orchestrator.train.control import Control
from orchestrator.train.loop import run_rank

COMMON = ["model=tiny", "model.n_mtp_layers=0", "tracker=off", "checkpoint.every=0", "train.validate_every=0",
          "train.validate_sequences=128"]
ARMS = {"fp32": ["precision=fp32"], "fp32, summed otherwise": ["precision=fp32", "layout.microbatches=2"],
        "fp8": ["precision=fp8", "precision.compute_dtype=fp32"]}


def held_out_loss(overrides: list[str]) -> float:
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder:
        config = compose_config([*COMMON, *overrides, f"run.dir={folder}", f"checkpoint.dir={folder}/checkpoints"])
        run_rank(config, RankInfo(), control=Control(), placed_at=time.time())
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        return rows[-1]["validation/loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=8, help="per step, of 256 tokens")
    parser.add_argument("overrides", nargs="*", help="further keys of `sparing train`, for all runs")
    args = parser.parse_args()
    shared = [f"train.steps={args.steps}", f"train.batch_size={args.sequences}", "train.seq_len=256", *args.overrides]
    print(f"{args.steps * args.sequences * 256:,} tokens a run; held-out loss in nats per token", flush=True)
    differences: dict[str, list[float]] = {name: [] for name in ARMS if name != "fp32"}
    for seed in range(args.seeds):
        losses = {}
        for name, arm in ARMS.items():
            began = time.perf_counter()
            losses[name] = held_out_loss([*shared, *arm, f"seed={seed}", "cluster.threads_per_rank=1"])
            print(f"seed {seed}  {name:24s} {losses[name]:.4f}  ({time.perf_counter() - began:.0f} s)", flush=True)
        for name, found in differences.items():
            found.append(losses[name] / losses["fp32"] - 1)
    for name, found in differences.items():
        spread = statistics.stdev(found) if len(found) > 1 else float("nan")
        print(f"{name} against fp32: {statistics.mean(found):+.3%} mean of {len(found)} seeds, standard deviation "
              f"{spread:.3%}, from {min(found):+.3%} to {max(found):+.3%}")


if __name__ == "__main__":
    main()
