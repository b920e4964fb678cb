"""`tiny` under random faults for a given time, then the proof that none of them left a trace.

    python benchmarks/soak.py --minutes 30 --seed 0

Runs take turns on one configuration; the first one is left in peace and is what the others are held against. A fault
comes some seconds after the one before has been survived, that is, after two steps that had not been reached before it
(or the run's end). After each run: every step once, losses bit-equal to the undisturbed run's, and no process, port,
file or shared memory left. All happens in Linux namespaces of its own (root, unshare), so that what is left is ours.
"""

import argparse
import contextlib
import getpass
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.train.processes import lives

ROOT = Path(__file__).resolve().parent.parent
PLACE, DISK = Path("/tmp/soak"), Path("/tmp/soak-disk")
DISK_MIB = 256
STEP_TIMEOUT_S = 20
SURVIVE_S = 420
"""Longest time a fault may take to be survived."""
LIBRARIES = ("ray", f"torchinductor_{getpass.getuser()}")
"""What Ray keeps of its logs, and the empty folder of torch's compiler."""
LAST_STEPS = 6
"""No fault comes so near to the end that its survival could not be seen."""


@dataclass
class Run:
    """One run directory through all of its attempts."""

    directory: Path
    steps: int
    overrides: list[str]
    process: subprocess.Popen | None = None
    starts: int = 0
    exits: list[int] = field(default_factory=list)
    log_from: int = 0
    ray_stopped: int = 0
    """Times that somebody else on this machine stopped our Ray (`ray stop` ends every Ray there is)."""

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-m", "orchestrator", "train", "experiment=tiny", "tracker=off",
                   f"train.steps={self.steps}", "train.batch_size=8", "train.seq_len=128", "train.validate_every=50",
                   "train.validate_sequences=16", "checkpoint.every=10",
                   "checkpoint.memory_every=5", f"checkpoint.dir={DISK}/{self.directory.name}",
                   f"cluster.step_timeout_s={STEP_TIMEOUT_S}", "cluster.start_timeout_s=300",
                   "cluster.replace_timeout_s=120", f"run.dir={self.directory}", "resume=auto", *self.overrides]
        log = open(f"{self.directory}.log", "ab")
        self.log_from = log.tell()
        # Ray puts its workers 15 below their driver, where a busy machine starves them into timeouts
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log,
                                        env=os.environ | {"RAY_worker_niceness": "0"})
        log.close()

    def go_on(self) -> bool:
        """Start it again if it has ended without being done; False when it is done."""
        code = self.process.poll()
        if code is None:
            return True
        self.exits.append(code)
        if code == 0:
            return False
        stopped = code == 1 and "Raylet is terminated" in self.log()
        self.ray_stopped += stopped
        unsaved = code == 3 and "NOT SAVED" in self.log()  # the disk was full at the last step
        refused = code == 3 and "attempt-" in self.log() and "no space left" in self.log()  # or before the first
        self.starts -= refused
        if code not in (-signal.SIGKILL, 33, 34) and not (stopped or unsaved or refused):
            raise SystemExit(f"exit code {code}:\n{self.log()[-3000:]}")
        self.start()
        return True

    def log(self) -> str:
        """What the newest attempt said."""
        return Path(f"{self.directory}.log").read_bytes()[self.log_from :].decode()

    def rows(self, name: str = "metrics.jsonl") -> list[dict]:
        path, found = self.directory / name, []
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    found.append(json.loads(line))
        return found

    def step(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)

    def events(self, kind: str) -> list[dict]:
        return [row for row in self.rows("events.jsonl") if row.get("kind") == kind]

    def ranks(self) -> list[int]:
        """Process ids by rank; empty while some of them are not what status.json says."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            pids = [rank["pid"] for rank in json.loads((self.directory / "status.json").read_text())["ranks"]]
            if all(b"Worker" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
                return pids
        return []

    def checkpoints(self) -> list[Path]:
        return sorted(path.parent for path in (DISK / self.directory.name).glob("step-*/manifest.json"))


def kill_rank(run: Run, chance: random.Random) -> None:
    os.kill(chance.choice(run.ranks()), signal.SIGKILL)


def kill_rank_0(run: Run, chance: random.Random) -> None:
    os.kill(run.ranks()[0], signal.SIGKILL)


def kill_two_ranks(run: Run, chance: random.Random) -> None:
    for pid in chance.sample(run.ranks(), 2):
        os.kill(pid, signal.SIGKILL)


def kill_rank_in_a_save(run: Run, chance: random.Random) -> None:
    """Once files of a checkpoint are there and its manifest is not."""
    pids = run.ranks()
    wait_for(lambda: any(not (path / "manifest.json").exists()
                         for path in (DISK / run.directory.name).glob("step-*")), 30, poll_s=0.002)
    os.kill(chance.choice(pids), signal.SIGKILL)


def freeze_rank(run: Run, chance: random.Random) -> None:
    os.kill(chance.choice(run.ranks()), signal.SIGSTOP)


def pause_rank(run: Run, chance: random.Random) -> None:
    pid = chance.choice(run.ranks())
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)


def kill_controller(run: Run, chance: random.Random) -> None:
    """And wait for the ranks, which must not outlive it for long."""
    pids = run.ranks()
    run.process.kill()
    run.process.wait()
    if not wait_for(lambda: not any(lives(pid) for pid in pids), 90):
        raise SystemExit("ranks outlive their controller")


def preempt(run: Run, chance: random.Random) -> None:
    run.process.send_signal(signal.SIGTERM)


def damage_newest_checkpoint(run: Run, chance: random.Random) -> None:
    """With the controller killed, flip a bit in a shard, which the next start will meet."""
    kill_controller(run, chance)
    if saved := run.checkpoints():
        shard = chance.choice(sorted(saved[-1].glob("*.safetensors")))
        with open(shard, "r+b") as file:
            file.seek(chance.randrange(shard.stat().st_size))
            byte = file.read(1)[0] ^ 1 << chance.randrange(8)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte]))


def fill_disk(run: Run, chance: random.Random) -> Callable[[], bool]:
    """No room for a checkpoint until a save has failed; survived when a later one is committed."""
    before, filler = len(run.events("checkpoint_failed")), DISK / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    try:
        wait_for(lambda: len(run.events("checkpoint_failed")) > before or run.process.poll() is not None, 60)
    finally:
        filler.unlink()
    saved = len(run.events("checkpoint_saved"))
    return lambda: len(run.events("checkpoint_saved")) > saved


OFTEN = (kill_rank, kill_rank_0, kill_two_ranks, kill_rank_in_a_save, pause_rank, fill_disk)
SELDOM = (freeze_rank, kill_controller, preempt, damage_newest_checkpoint)
"""Half as often as the others: each takes a timeout or a whole start."""


def wait_for(condition, timeout_s: float, poll_s: float = 0.1) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(poll_s)
    return bool(found)


def disturb(run: Run, chance: random.Random, gap_s: float, deadline: float) -> list[dict]:
    """Take the run to its end, with faults until the deadline (time.monotonic()); what they were and took."""
    faults, deck = [], []
    run.start()
    while run.go_on():
        gap_ends = time.monotonic() + 2 + chance.expovariate(1 / gap_s)
        wait_for(lambda ends=gap_ends: time.monotonic() > ends or run.process.poll() is not None, 600)
        high = run.step()
        if time.monotonic() > deadline or run.process.poll() is not None or high > run.steps - LAST_STEPS \
                or high < 2 or len(run.ranks()) < 4:
            time.sleep(0.2)
            continue
        deck = deck or chance.sample([*OFTEN, *OFTEN, *SELDOM], 2 * len(OFTEN) + len(SELDOM))
        fault, at = deck.pop(), time.monotonic()
        is_over = fault(run, chance)
        high = max(high, run.step())
        is_over = is_over or (lambda high=high: run.step() >= high + 2)
        survived = wait_for(lambda is_over=is_over: not run.go_on() or is_over(), SURVIVE_S)
        seconds = time.monotonic() - at
        faults.append({"run": run.directory.name, "fault": fault.__name__, "step": high, "seconds": round(seconds, 2)})
        print(json.dumps(faults[-1]), flush=True)
        if not survived:
            raise SystemExit(f"not survived:\n{run.log()[-3000:]}")
        if run.exits and run.exits[-1] == 0:
            break
    return faults


def losses(run: Run) -> list[tuple]:
    keys = ("step", "train/loss", "train/mtp_loss_1", "train/balance_loss", "train/grad_norm", "validation/loss")
    return [tuple(row.get(key) for key in keys) for row in run.rows()]


def leftovers() -> list[str]:
    """Processes but this one, listening ports, shared memory, and files in /tmp beside the runs'."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    found = [f"process {pid}: {Path(f'/proc/{pid}/cmdline').read_bytes()[:80]}" for pid in os.listdir("/proc")
             if pid.isdigit() and int(pid) != os.getpid()]
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        found += [f"port {int(line.split()[1].rsplit(':', 1)[1], 16)}"
                  for line in Path(table).read_text().splitlines()[1:] if line.split()[3] == "0A"]
    found += [f"shared memory {path}" for path in Path("/dev/shm").iterdir()]
    known = (PLACE.name, DISK.name, *LIBRARIES)
    return found + [f"file {path}" for path in Path("/tmp").iterdir() if path.name not in known]


def check(run: Run, clean: list[tuple]) -> None:
    """Nothing lost, nothing doubled, nothing changed, nothing left."""
    ours, summary = losses(run), json.loads((run.directory / "summary.json").read_text())
    assert [row[0] for row in ours] == list(range(1, run.steps + 1)), "a step was lost or doubled"
    differing = [row[0] for row, expected in zip(ours, clean, strict=True)
                 if row[:-1] != expected[:-1] or expected[-1] not in (None, row[-1])]  # a run that is stopped validates
    assert not differing, f"losses differ from the undisturbed run's at steps {differing[:10]}"
    assert summary["status"] == "completed" and summary["attempts"] == run.starts, summary["status"]
    total, charged = sum(summary["buckets_s"].values()), summary["measured"]["charged_s"]
    assert abs(total - charged) < 1e-6 * charged, f"buckets sum to {total}, charged are {charged}"
    wait_for(lambda: not _quietly(leftovers), 90, poll_s=0.5)
    assert not leftovers(), f"left behind: {leftovers()}"


def _quietly(call) -> list[str]:
    """A process that ends while it is looked at is looked at again."""
    try:
        return call()
    except (FileNotFoundError, ProcessLookupError):
        return ["process"]


def soak(args: argparse.Namespace) -> None:
    began, chance = time.monotonic(), random.Random(args.seed)
    for attempt in range(1, 4):
        calm = Run(PLACE / f"undisturbed-{attempt}", args.steps, [])
        calm.start()
        if calm.process.wait(1800) == 0:
            break
        print(calm.log()[-2000:], flush=True)
    clean = losses(calm)
    check(calm, clean)
    calm_s = time.monotonic() - began
    print(json.dumps({"run": "undisturbed", "steps": args.steps, "wall_s": round(calm_s, 1)}), flush=True)
    deadline, faults, summaries = time.monotonic() + 60 * args.minutes, [], []
    while time.monotonic() < deadline:
        shutil.rmtree(DISK / calm.directory.name, ignore_errors=True)
        calm = Run(PLACE / f"run-{len(summaries) + 1}", args.steps, [f"cluster.spares={len(summaries) % 2}"])
        faults += disturb(calm, chance, args.gap, deadline)
        check(calm, clean)
        summary = json.loads((calm.directory / "summary.json").read_text())
        summaries.append(summary | {"resumed_past_damage": sum(bool(row["skipped"]) for row in calm.events("resumed")),
                                    "ray_stopped": calm.ray_stopped})
        print(json.dumps({"run": calm.directory.name, "attempts": calm.starts, "ray_stopped": calm.ray_stopped,
                          "goodput": summary["goodput"], "usd": summary["usd_total"], "checked": True}), flush=True)
    tell(faults, summaries, calm_s, time.monotonic() - began)


def tell(faults: list[dict], summaries: list[dict], calm_s: float, wall_s: float) -> None:
    kinds, seconds = Counter(fault["fault"] for fault in faults), [fault["seconds"] for fault in faults]
    print(f"\n{len(faults)} faults in {len(summaries)} runs over {(wall_s - calm_s) / 60:.1f} minutes; all survived, "
          f"all losses bit-equal, nothing left\nmean time to recovery {statistics.fmean(seconds):.1f} s, "
          f"median {statistics.median(seconds):.1f} s")
    buckets: Counter = Counter()
    for summary in summaries:
        buckets.update(summary["buckets_s"])
    shares = ", ".join(f"{name} {value / buckets.total():.1%}" for name, value in buckets.most_common() if value)
    past = sum(summary["resumed_past_damage"] for summary in summaries)
    print(f"{sum(summary['ray_stopped'] for summary in summaries)} times Ray was stopped from outside beside that")
    print(f"{past} starts went past a damaged checkpoint, named in their `resumed` event")
    print(f"of {buckets.total() / 3600:.2f} device-hours: {shares}\n")
    print(f"{'fault':26}{'times':>6}{'median s':>10}{'max s':>8}")
    for kind, times in kinds.most_common():
        took = [fault["seconds"] for fault in faults if fault["fault"] == kind]
        print(f"{kind:26}{times:6}{statistics.median(took):10.1f}{max(took):8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="of faults; the undisturbed run comes before")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--gap", type=float, default=6, help="mean seconds from a fault survived to the next, less 2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.getpid() != 1:
        command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--net", "--kill-child", sys.executable,
                   *sys.argv]
        raise SystemExit(subprocess.run(command).returncode)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for place in ("/dev/shm", "/tmp"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    for place in (PLACE, DISK):
        place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", DISK], check=True)
    soak(args)


if __name__ == "__main__":
    main()
