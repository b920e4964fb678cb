"""How long a run stands still after one of its ranks is killed: with a warm spare, without, and by a full restart.

    python benchmarks/recovery.py [kills=10] [restarts=3] [Hydra overrides]

Each line is a run of `experiment=tiny` in which random ranks are killed (SIGKILL) one after the other, every time when
the state of some steps has been copied to memory; then the same run killed as a whole and started again with
resume=auto. Seconds are medians with the largest in brackets, from the kill to the end of the next new step, without
the steps that are computed again, which are their own column. Not a soak: benchmarks/soak.py has other faults.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LONG = ["experiment=tiny", "train.steps=100000", "train.validate_every=0", "checkpoint.every=20",
        "checkpoint.memory_every=5", "checkpoint.keep=2", "cluster.step_timeout_s=60", "optim.decay_fraction=0",
        "tracker=off", "cluster=local"]
DEADLINE_S = 300.0


def main(arguments: list[str]) -> None:
    named = {key: int(value) for key, value in (word.split("=", 1) for word in arguments)
             if key in ("kills", "restarts")}
    overrides = [word for word in arguments if word.split("=", 1)[0] not in ("kills", "restarts")]
    kills, restarts = named.get("kills", 10), named.get("restarts", 3)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; seconds, median [largest]")
    print(f"{'':24}{'kills':>6}{'found':>14}{'replaced':>14}{'next step':>14}{'in all':>14}{'again':>14}")
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        for name, more in (("a warm spare", ["cluster.spares=1"]), ("a new actor", [])):
            row(name, killed_ranks(Path(folder) / name.replace(" ", "-"), [*overrides, *more], kills))
        row("a full restart", restarted(Path(folder) / "restart", overrides, restarts))


def killed_ranks(folder: Path, overrides: list[str], kills: int) -> list[dict]:
    process, dice = start(folder, overrides), random.Random(0)
    try:
        return [kill_one(folder, process, dice, number) for number in range(kills)]
    finally:
        end(process)


def kill_one(folder: Path, process: subprocess.Popen, dice: random.Random, before: int) -> dict:
    """Seconds until the fault was found, until another rank was in the place, until a new step was finished."""
    reached = last_step(folder)
    until(lambda: last_step(folder) >= reached + 12, process)
    ranks = status(folder)["ranks"]
    victim, killed_at = dice.choice(ranks)["pid"], time.time()
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(events(folder, "recovered")) > before, process)
    decision, recovered = events(folder, "decision")[-1], events(folder, "recovered")[-1]
    until(lambda: victim not in [rank["pid"] for rank in status(folder)["ranks"]], process)
    return {"found": decision["found_at"] - killed_at, "replaced": decision["time"] - decision["found_at"],
            "next step": recovered["time"] - decision["time"], "in all": recovered["time"] - killed_at,
            "again": recovered["lost_s"]}


def restarted(folder: Path, overrides: list[str], times: int) -> list[dict]:
    """The same without replacement: the run and all its ranks are killed, the command is given again."""
    process, found = start(folder, overrides), []
    try:
        for _ in range(times):
            saved = len(events(folder, "checkpoint_saved"))
            until(lambda saved=saved: len(events(folder, "checkpoint_saved")) > saved, process)
            reached = last_step(folder)
            until(lambda reached=reached: last_step(folder) >= reached + 12, process)
            rows, resumed = metrics(folder), len(events(folder, "resumed"))
            killed_at = time.time()
            for rank in status(folder)["ranks"]:
                os.kill(rank["pid"], signal.SIGKILL)
            end(process)
            process = start(folder, [*overrides, "resume=auto"])
            until(lambda resumed=resumed: len(events(folder, "resumed")) > resumed, process)
            step = events(folder, "resumed")[-1]["step"]
            until(lambda step=step: last_step(folder) > step, process)
            lost = sum(row["time/step_s"] for row in rows if row["step"] > step)
            found.append({"in all": time.time() - killed_at, "again": lost})
    finally:
        end(process)
    return found


def row(name: str, found: list[dict]) -> None:
    cells = []
    for key in ("found", "replaced", "next step", "in all", "again"):
        values = [each[key] for each in found if key in each]
        cells.append(f"{statistics.median(values):.2f} [{max(values):.1f}]" if values else "-")
    print(f"{name:24}{len(found):>6}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def start(folder: Path, overrides: list[str]) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    with (folder / "out.txt").open("a") as out:
        process = subprocess.Popen([sys.executable, "-m", "orchestrator", "train", *LONG, f"run.dir={folder}",
                                    *overrides], stdout=out, stderr=out)
    until(lambda: last_step(folder) > 0, process)
    return process


def end(process: subprocess.Popen) -> None:
    """Ray's processes go with the one that started them."""
    process.kill()
    process.wait()


def until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            folder = next(word for word in process.args if word.startswith("run.dir=")).removeprefix("run.dir=")
            raise SystemExit(f"the run ended or made no progress for {DEADLINE_S:g} s:\n"
                             f"{Path(folder, 'out.txt').read_text()[-2000:]}")
        time.sleep(0.02)


def metrics(folder: Path) -> list[dict]:
    return lines(folder / "metrics.jsonl")


def last_step(folder: Path) -> int:
    rows = metrics(folder)
    return rows[-1]["step"] if rows else 0


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in lines(folder / "events.jsonl") if event["kind"] == kind]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def lines(path: Path) -> list[dict]:
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


if __name__ == "__main__":
    main(sys.argv[1:])
