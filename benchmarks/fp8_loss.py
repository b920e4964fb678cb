"""What FP8 training does to the loss: the same data and seeds in fp32 and in emulated FP8, held-out loss at the end.

    python benchmarks/fp8_loss.py --seeds 6 --steps 100 --sequences 4 --processes 2
    python benchmarks/fp8_loss.py --seeds 6 --beside bf16 --processes 2

With bf16 beside it, all that is not in FP8 is in bf16, as on a GPU, and bf16 alone is held against fp32, too (some CPUs
take hundreds of times as long for it).

Two trainings part ways by chance as soon as one sum is rounded differently. A second fp32 run of each seed, with the
batch cut into microbatches, shows by how much: a difference that is not larger says nothing against FP8, nor for it.
FP8 is held against the mean of the two, and the means over the seeds are given with their standard error.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from orchestrator.compose import compose_config
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.train.control import Control
from orchestrator.train.loop import run_rank

COMMON = ["model=tiny", "model.n_mtp_layers=0", "tracker=off", "checkpoint.every=0", "train.validate_every=0",
          "train.validate_sequences=128"]
ARMS = {"fp32": ["precision=fp32"], "fp32, summed otherwise": ["precision=fp32", "layout.microbatches=2"]}


def held_out_loss(overrides: list[str]) -> tuple[float, float]:
    """Of one training, and the seconds that it took."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder:
        config = compose_config([*COMMON, *overrides, f"run.dir={folder}", f"checkpoint.dir={folder}/checkpoints"])
        run_rank(config, RankInfo(), control=Control(), placed_at=time.time())
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        return rows[-1]["validation/loss"], time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=8, help="per step, of 256 tokens")
    parser.add_argument("--beside", choices=("fp32", "bf16"), default="fp32", help="what is not in FP8 is in this")
    parser.add_argument("--processes", type=int, default=1, help="trainings at once, of one thread each")
    parser.add_argument("overrides", nargs="*", help="further keys of `sparing train`, for all runs")
    args = parser.parse_args()
    shared = [f"train.steps={args.steps}", f"train.batch_size={args.sequences}", "train.seq_len=256",
              "cluster.threads_per_rank=1", *args.overrides]
    print(f"{args.steps * args.sequences * 256:,} tokens a run; held-out loss in nats per token", flush=True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    arms = ARMS | ({"bf16": ["precision=bf16"]} if args.beside == "bf16" else {})
    arms |= {"fp8": ["precision=fp8", f"precision.compute_dtype={args.beside}"]}
    asked = [[*shared, *arm, f"seed={seed}"] for seed in seeds for arm in arms.values()]
    rows = []
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(held_out_loss, asked)
        for seed in seeds:
            row = {}
            for name in arms:
                row[name], seconds = next(found)
                print(f"seed {seed}  {name:24s} {row[name]:.4f}  ({seconds:.0f} s)", flush=True)
            rows.append(row)
    tell("fp32, summed otherwise, against fp32", [row["fp32, summed otherwise"] / row["fp32"] - 1 for row in rows])
    for name in list(arms)[len(ARMS):]:
        tell(f"{name} against the mean of the two",
             [row[name] / statistics.mean(row[plain] for plain in ARMS) - 1 for row in rows])
    if "bf16" in arms:
        tell("fp8 against bf16", [row["fp8"] / row["bf16"] - 1 for row in rows])


def tell(name: str, found: list[float]) -> None:
    spread = statistics.stdev(found) if len(found) > 1 else float("nan")
    print(f"{name}: {statistics.mean(found):+.3%} mean of {len(found)} seeds, standard error "
          f"{spread / len(found) ** 0.5:.3%}, standard deviation {spread:.3%}, from {min(found):+.3%} to "
          f"{max(found):+.3%}")


if __name__ == "__main__":
    main()
