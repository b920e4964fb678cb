"""What recompute costs and saves: step time, and bytes kept from forward to backward, against keeping everything.

    PYTHONPATH=. python benchmarks/recompute.py --model mini --sequences 4 --seq-len 512

One process, fp32, the three in turns; the ratio of step times is the median over turns. Beside what is kept stands what
the planner counts, embedding's and rotary tables' few bytes aside.
"""

import argparse
import statistics

import torch
from model_throughput import load_config, make_step, ours

from orchestrator.choices import Recompute
from orchestrator.config import HardwareConfig
from orchestrator.plan.activations import block_bytes, head_bytes
from orchestrator.plan.keeping import own
from orchestrator.plan.workload import Workload
from orchestrator.train.memory import keep_freed_memory
from tests.torch_memory import left_behind


def counted_bytes(work: Workload) -> float:
    model = work.model
    return head_bytes(work) + sum(block_bytes(work, model.is_moe(layer)) for layer in range(model.n_layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    keep_freed_memory()
    config = load_config(args.model)
    tokens = torch.randint(0, config.vocab_size, (args.sequences, args.seq_len + 1))
    steps, kept, counted = {}, {}, {}
    for how in Recompute:
        model, loss_of = ours(config)
        model.train().recompute = how is Recompute.full
        if how is Recompute.selective:
            model.keep_less()
        _, kept[how] = left_behind(lambda model=model: model(tokens, tokens))
        counted[how] = counted_bytes(Workload(config, HardwareConfig(), args.seq_len, args.sequences, 1, 1, 1, "1f1b",
                                              1, recompute=how, keeping=own("fp32", cpu=True)))
        steps[how] = make_step(model, loss_of, config.vocab_size, args.sequences, args.seq_len)
    turns = [{how: min(step() for _ in range(2)) for how, step in steps.items()} for _ in range(args.turns + 1)][1:]
    print(f"{args.model}, {args.sequences} x {args.seq_len} tokens, {torch.get_num_threads()} threads")
    for how in Recompute:
        ratios = [turn[how] / turn[Recompute.none] for turn in turns]
        print(f"{how.name:10}step {statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f})   kept "
              f"{kept[how] / 2**20:7.1f} MiB, {kept[how] / kept[Recompute.none]:.2f}x, counted "
              f"{counted[how] / 2**20:7.1f}")


if __name__ == "__main__":
    main()
