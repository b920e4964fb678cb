"""What the parts around the model cost, as ratios of step times within one invocation.

    python benchmarks/parallel_overhead.py ray          Ray-launched against torchrun-launched, same layout
    python benchmarks/parallel_overhead.py ranks        two ranks of one thread against one process of two threads
    python benchmarks/parallel_overhead.py checkpoint   steps while a checkpoint is written against steps without

Runs take turns; a run's step time is the median of time/step_s over its steps, the first five left out. Synthetic
tokens, so that nothing but the step is timed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

COMMON = ["data=random", "tracker=off", "checkpoint.every=0", "train.validate_every=0", "train.validate_sequences=16",
          "optim.warmup_steps=1"]


def run(overrides: list[str], *, torchrun: int = 0,
        program: Sequence[str] = ("-m", "orchestrator")) -> tuple[list[dict], dict]:
    """Train in a directory of its own; rows of metrics.jsonl, and events."""
    with tempfile.TemporaryDirectory(prefix="sparing-bench-") as folder:
        run_dir = f"{folder}/run"
        launcher = [sys.executable]
        if torchrun:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
        command = [*launcher, *program, "train", *COMMON, *overrides, f"run.dir={run_dir}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parent.parent)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
        events = [json.loads(line) for line in Path(run_dir, "events.jsonl").read_text().splitlines()]
        return rows, {"events": events}


def step_s(rows: list[dict]) -> float:
    return statistics.median(row["time/step_s"] for row in rows[5:])


def ratio(name: str, pairs: list[tuple[float, float]]) -> None:
    ratios = [a / b for a, b in pairs]
    first, second = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{name}: {statistics.median(ratios):.3f} (turns {min(ratios):.3f} to {max(ratios):.3f}); "
          f"medians {first:.4f} s and {second:.4f} s", flush=True)


def compare_ray(args: argparse.Namespace) -> None:
    layout = [f"model={args.model}", "layout.pp=2", "layout.dp=1", "layout.microbatches=4", "train.batch_size=16",
              "cluster.threads_per_rank=1", f"train.steps={args.steps}", f"train.seq_len={args.seq_len}"]
    pairs = []
    for _ in range(args.turns):
        by_ray, _ = run(layout)
        by_torchrun, _ = run(layout, torchrun=2)
        assert [row["train/loss"] for row in by_ray] == [row["train/loss"] for row in by_torchrun], "losses differ"
        pairs.append((step_s(by_ray), step_s(by_torchrun)))
    ratio("step time, Ray over torchrun (pp=2; aim at most 1.02)", pairs)


def compare_ranks(args: argparse.Namespace) -> None:
    common = [f"model={args.model}", f"train.batch_size={args.sequences}", f"train.steps={args.steps}",
              f"train.seq_len={args.seq_len}", f"train.validate_sequences={args.sequences}"]
    layouts = {
        "ep2": ["layout.dp=2", "layout.ep=2", "cluster.threads_per_rank=1"],
        "pp2": ["layout.pp=2", f"layout.microbatches={args.sequences // 2}", "cluster.threads_per_rank=1"],
    }
    found: dict[str, list] = {name: [] for name in layouts}
    for _ in range(args.turns):
        alone = step_s(run([*common, "cluster.threads_per_rank=2"])[0])
        for name, layout in layouts.items():
            found[name].append((alone, step_s(run([*common, *layout])[0])))
    for name, pairs in found.items():
        ratio(f"tokens/s, {name} of one thread each over one process of two (aim at least 0.85)", pairs)


def compare_checkpoint(args: argparse.Namespace) -> None:
    common = [f"model={args.model}", f"train.batch_size={args.sequences}", f"train.steps={args.steps}",
              f"train.seq_len={args.seq_len}", f"train.validate_sequences={args.sequences}",
              "cluster.threads_per_rank=1"]
    rows, extra = run([*common, "checkpoint.every=8", "checkpoint.keep=1"])
    saved = [event for event in extra["events"] if event["kind"] == "checkpoint_saved"]
    seconds, size = saved[0]["seconds"], saved[0]["bytes"]
    quiet, busy = [], []
    for row in rows[5:]:
        since = row["step"] % 8
        elapsed = sum(r["time/step_s"] for r in rows if row["step"] - since < r["step"] <= row["step"])
        writing = 0 < since and elapsed - row["time/step_s"] < seconds and row["step"] > 8
        (busy if writing else quiet).append(row["time/step_s"] + (row.get("time/checkpoint_s") or 0.0))
    print(f"step time while a checkpoint is written over without (aim at most 1.10): "
          f"{statistics.median(busy) / statistics.median(quiet):.3f} ({len(busy)} and {len(quiet)} steps);  stall "
          f"for the copy {statistics.median(r['time/checkpoint_s'] for r in rows if 'time/checkpoint_s' in r):.3f} s")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a"), Path(folder, "b")
        source.write_bytes(os.urandom(1 << 20) * (size >> 20))
        began = time.perf_counter()
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())
        copied = time.perf_counter() - began
    print(f"{size / 1e6:.0f} MB written, hashed and read back in {seconds:.2f} s while training: "
          f"{size / seconds / 1e6:.0f} MB/s against {size / copied / 1e6:.0f} MB/s of a plain copy with fsync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ray", "ranks", "checkpoint"])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()
    {"ray": compare_ray, "ranks": compare_ranks, "checkpoint": compare_checkpoint}[args.what](args)


if __name__ == "__main__":
    main()
