"""What DualPipeV's pairs gain where exchanges between experts take time: step times in turn over at once.

    python benchmarks/overlap.py                   four ranks on this machine, pp=2, ep=2
    python benchmarks/overlap.py --delay-ms 0 40   each exchange made to take at least so long

Ranks of one machine exchange over the loopback, which is quick and costs the cores that compute. So this holds every
exchange back until so many milliseconds after its start, as a link would, the cores free meanwhile. Runs take turns;
losses must be the same.
"""

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for ranks, which torchrun starts

DELAY = "SPARING_BENCHMARK_DELAY_MS"


def one_rank() -> None:
    """`sparing train` with exchanges held back."""
    from orchestrator.__main__ import main as sparing
    from orchestrator.parallel.exchange import Crossing

    begin, wait = Crossing.__init__, Crossing.wait

    def begin_and_note(crossing, *args):
        begin(crossing, *args)
        crossing.due = time.perf_counter() + float(os.environ[DELAY]) / 1e3

    def wait_until_due(crossing):
        time.sleep(max(0.0, crossing.due - time.perf_counter()))
        return wait(crossing)

    Crossing.__init__, Crossing.wait = begin_and_note, wait_until_due
    sys.exit(sparing())


def main() -> None:
    from parallel_overhead import ratio, run, step_s

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0, 10, 20, 40])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    sequences = 2 * args.microbatches
    layout = [f"model={args.model}", "layout.pp=2", "layout.dp=2", "layout.ep=2", "layout.schedule=dualpipev",
              f"layout.microbatches={args.microbatches}", f"train.batch_size={sequences}",
              f"train.validate_sequences={sequences}", f"train.seq_len={args.seq_len}", f"train.steps={args.steps}",
              "cluster.threads_per_rank=1"]
    for delay in args.delay_ms:
        os.environ[DELAY] = str(delay)
        pairs = []
        for _ in range(args.turns):
            in_turn, _ = run([*layout, "layout.overlap=false"], torchrun=4, program=[__file__])
            at_once, _ = run(layout, torchrun=4, program=[__file__])
            assert [row["train/loss"] for row in in_turn] == [row["train/loss"] for row in at_once], "losses differ"
            pairs.append((step_s(in_turn), step_s(at_once)))
        ratio(f"step time, pairs in turn over at once, exchanges of at least {delay:g} ms", pairs)


if __name__ == "__main__":
    one_rank() if "RANK" in os.environ else main()
