"""Forecast against measured step time on this machine: one layout calibrates, the others are foretold.

    python benchmarks/local_forecast.py                     # tiny and mini, fourteen layouts each
    python benchmarks/local_forecast.py --models tiny --steps 12 --runs runs/forecast

Every row is a `sparing train` of its own (by torchrun), its forecast made from the first row's run, as `run.calibrate`
does before a first step. Run it on a machine that does nothing else. `--runs` keeps the runs; one that is there already
is not run again, only foretold anew. The first row once more at the end tells how far the machine itself has moved.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from orchestrator.config import Config, from_dict
from orchestrator.plan.forecast import Machine, forecast
from orchestrator.train.expected import read_calibration

ROOT = Path(__file__).parents[1]
CALIBRATION = "pp=2 dp=2 ep=2 schedule=1f1b microbatches=4"
LAYOUTS = ["pp=1 dp=1 ep=1 microbatches=1", "pp=1 dp=1 ep=1 microbatches=4", "pp=1 dp=2 ep=1 microbatches=1",
           "pp=1 dp=2 ep=2 microbatches=2", "pp=1 dp=4 ep=4 microbatches=1", "pp=1 dp=4 ep=2 microbatches=1",
           "pp=2 dp=1 ep=1 schedule=gpipe microbatches=4", "pp=2 dp=1 ep=1 schedule=1f1b microbatches=4",
           "pp=2 dp=1 ep=1 schedule=interleaved_1f1b microbatches=4", "pp=2 dp=1 ep=1 schedule=zbv microbatches=4",
           "pp=2 dp=1 ep=1 schedule=dualpipev microbatches=4",
           "pp=2 dp=1 ep=1 schedule=interleaved_zero_bubble microbatches=4",
           "pp=2 dp=2 ep=2 schedule=dualpipev microbatches=4", "pp=4 dp=1 ep=1 schedule=1f1b microbatches=4"]
SIZES = {"tiny": ["train.batch_size=16", "train.seq_len=256"], "mini": ["train.batch_size=8", "train.seq_len=256"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="tiny,mini")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", help="a folder to keep the runs in")
    arguments = parser.parse_args()
    with contextlib.nullcontext(arguments.runs) if arguments.runs else tempfile.TemporaryDirectory() as folder:
        for model in arguments.models.split(","):
            errors = []
            print(f"{model:66}{'predicted':>10}{'measured':>10}{'error':>8}", flush=True)
            for number, layout in enumerate([CALIBRATION, *LAYOUTS, CALIBRATION]):
                run = Path(folder) / f"{model}-{number}"
                role = {0: "fit", len(LAYOUTS) + 1: "again"}.get(number, "")
                if not (run / "summary.json").exists():
                    train(model, layout, run, arguments.steps)
                predicted, measured = foretold(run, f"{folder}/{model}-0" if number else None), median_step(run)
                error = predicted / measured - 1
                if not role:
                    errors.append(abs(error))
                print(f"{layout:62}{role:5}{predicted:>8.3f}s{measured:>9.3f}s{error:>+8.0%}", flush=True)
            print(f"{model}: mean absolute error {statistics.mean(errors):.1%} of {len(errors)} layouts, "
                  f"{sum(error <= 0.15 for error in errors)} within 15%, worst {max(errors):.0%}\n", flush=True)


def foretold(run: Path, learnt: str | None) -> float:
    """Seconds of a step."""
    config = from_dict(Config, yaml.safe_load((run / "config.yaml").read_text()))
    machine = Machine(**json.loads((run / "summary.json").read_text())["measured"]["machine"])
    return forecast(config, machine, read_calibration(learnt))["step_time_s"]


def median_step(run: Path) -> float:
    """Seconds, the first steps left out: they warm up."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["time/step_s"] for row in rows][2:])


def train(model: str, layout: str, run: Path, steps: int) -> None:
    keys = dict(word.split("=") for word in layout.split())
    words = [f"model={model}", *SIZES[model], *(f"layout.{key}={value}" for key, value in keys.items()),
             f"train.steps={steps}", "train.validate_every=0", "train.validate_sequences=16", "checkpoint.every=0",
             "checkpoint.memory_every=0", "tracker=off", f"run.dir={run}"]
    ranks = int(keys["pp"]) * int(keys["dp"])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
                           "--standalone", "-m", "orchestrator", "train", *words], cwd=ROOT, text=True,
                          capture_output=True)
    if done.returncode:
        sys.exit(f"{layout}: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
