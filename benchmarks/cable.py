"""How soon a run goes on after the cable of a rank's machine is cut, with a warm spare on another one.

    PYTHONPATH=. python benchmarks/cable.py        # root, Linux

Four nodes in network namespaces of their own, with Ray's own settings: the head, two that hold a rank each, one that
holds the spare. The bridge's end of one rank's cable is taken off, so that its packets are lost without a word. Seconds
are from the cut until the controller gave the rank up, and until the next new step is done. Losses are held against
those of the same run without a fault.
"""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from tests.cluster_harness import ROOT, hosts, why_no_hosts
from tests.harness import write_corpus
from tests.orchestrator.cluster.runs import FOUR, TWO, events, start_here, trained, wait_for_step
from tests.orchestrator.cluster.test_hosts import decided, launched

STEPS, CUT_AFTER = 120, 12


def main() -> None:
    if reason := why_no_hosts():
        raise SystemExit(f"cable.py {reason}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory(prefix="cable-") as folder:
        place = Path(folder)
        write_corpus(place, 20)
        run = [*FOUR, TWO, f"data.path={place}/*.txt", f"data.cache_dir={place}/cache", f"train.steps={STEPS}",
               "train.validate_every=0", "checkpoint.every=0", "checkpoint.memory_every=4", "optim.decay_fraction=0"]
        with start_here(2, run, place / "clean") as clean:
            out, _ = clean.communicate(timeout=400)
        assert clean.returncode == 0, out
        with hosts(4, cpus=[0, 1, 1, 1], hidden=[ROOT / name for name in ("model", "orchestrator", "conf")]) as cluster:
            found, recovered = cut_one(cluster, place, [*run, "cluster.spares=1"])
        same = trained(place / "hosts") == trained(place / "clean")
    print(f"found {found:.2f} s after the cut, next new step {recovered:.2f} s after it; losses "
          f"{'bit-equal' if same else 'DIFFER'}")


def cut_one(cluster, place: Path, run: list[str]) -> tuple[float, float]:
    with subprocess.Popen(**launched(cluster, place, run), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        try:
            wait_for_step(place / "hosts", CUT_AFTER, job)
            ranks = json.loads((place / "hosts" / "status.json").read_text())["ranks"]
            node, struck = cluster.named(ranks[1]["host"]), time.time()
            node.cut()
            decision, recovered = (decided(place, kind, job) for kind in ("decision", "recovered"))
            out, _ = job.communicate(timeout=240)
            assert job.returncode == 0 and len(events(place / "hosts", "decision")) == 1, out
        finally:
            job.kill()
    return decision["found_at"] - struck, recovered["time"] - struck


if __name__ == "__main__":
    main()
