"""Training tokens/s of one process: this model against transformers' DeepseekV3ForCausalLM of the same shape.

Same threads, batch, optimizer (fused AdamW), fp32, random weights and tokens; transformers runs each of its experts
implementations. Each side is a process of its own, as its users start it; they take turns, so that a drifting
machine slows all, and a turn is the faster of two steps; the ratio is the median over turns. Also the share of the
machine's fp32 GEMM peak, measured between the turns.

    python benchmarks/model_throughput.py --model mini --sequences 8 --seq-len 512 --turns 5
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from model.config import ModelConfig
from model.count import training_flops
from model.init import initial_experts, initial_rows
from model.transformer import Transformer
from orchestrator.config import from_dict
from orchestrator.train.memory import keep_freed_memory


def load_config(name: str) -> ModelConfig:
    values = yaml.safe_load((Path(__file__).parent.parent / "conf" / "model" / f"{name}.yaml").read_text())
    values.pop("defaults")
    values["n_mtp_layers"] = 0
    values["balance_loss_weight"] = 0.0
    return from_dict(ModelConfig, values)


def ours(config: ModelConfig):
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        rows = parameter.shape[0]
        value = (initial_experts(name, tuple(parameter.shape), range(rows), config, seed=0)
                 if ".moe.experts." in name else initial_rows(name, tuple(parameter.shape), config, seed=0))
        parameter.data.copy_(value)
    return model, lambda tokens: model(tokens, tokens)[0, 0] / tokens[:, 1:].numel()


def theirs(config: ModelConfig, implementation: str):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from model.hf import config_to_hf

    hf_config = DeepseekV3Config(**config_to_hf(config))
    hf_config._experts_implementation = implementation
    hf_config.use_cache = False
    model = DeepseekV3ForCausalLM(hf_config)
    return model, lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, 1:],
                                       shift_labels=tokens[:, 1:].contiguous()).loss


def make_step(model: torch.nn.Module, loss_of, vocab_size: int, sequences: int, seq_len: int):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, vocab_size, (sequences, seq_len + 1), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        began = time.perf_counter()
        loss_of(tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return step


def gemm_flops_per_s(size: int = 2048) -> float:
    a, b = torch.randn(2, size, size)
    best = min(_timed(lambda: a @ b) for _ in range(5))
    return 2 * size**3 / best


def _timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def serve(args: argparse.Namespace) -> None:
    """One side in a process of its own: a step for every line on stdin, its seconds on stdout."""
    torch.set_num_threads(args.threads)
    if args.side == "sparing" or args.same_malloc:
        keep_freed_memory()
    config = load_config(args.model)
    torch.manual_seed(0)
    sides = ours(config) if args.side == "sparing" else theirs(config, args.side)
    step = make_step(*sides, config.vocab_size, args.sequences, args.seq_len)
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))] + [gemm_flops_per_s()]), flush=True)


def profile(args: argparse.Namespace) -> None:
    """Where one step of ours spends its time, by operator."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = load_config(args.model)
    step = make_step(*ours(config), config.vocab_size, args.sequences, args.seq_len)
    step()
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step()
    averages = sorted(recorded.key_averages(), key=lambda item: -item.self_cpu_time_total)
    total = sum(item.self_cpu_time_total for item in averages)
    for item in averages[:12]:
        print(f"{item.self_cpu_time_total / total:6.1%}  {item.self_cpu_time_total / 1e3:8.1f} ms  {item.key}")


def ask(process: subprocess.Popen, steps: int) -> list[float]:
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--implementations", default="eager,grouped_mm")
    parser.add_argument("--same-malloc", action="store_true",
                        help="give transformers this project's malloc setting, too")
    parser.add_argument("--profile", action="store_true", help="where one step spends its time, by operator")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args)
    if args.profile:
        return profile(args)
    names = ["sparing", *filter(None, args.implementations.split(","))]
    sides = {name: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--side", name], text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
             for name in names}
    for process in sides.values():
        ask(process, 2)
    seconds, peaks = {name: [] for name in names}, []
    for _ in range(args.turns):
        for name, process in sides.items():
            *times, peak = ask(process, 2)
            seconds[name].append(min(times))
            peaks.append(peak)
    for process in sides.values():
        process.kill()
    config, tokens = load_config(args.model), args.sequences * args.seq_len
    flops, peak = training_flops(config, args.seq_len) * tokens, statistics.median(peaks)
    print(f"{args.model}, {args.sequences} x {args.seq_len} tokens, {args.threads} threads, torch {torch.__version__}, "
          f"fp32 GEMM {peak / 1e9:.0f} GFLOP/s{', same malloc setting for all' * args.same_malloc}")
    for name, times in seconds.items():
        ratios = [t / s for t, s in zip(times, seconds["sparing"], strict=True)]
        median = statistics.median(times)
        label = name if name == "sparing" else f"transformers {name}"
        print(f"{label:28s} {tokens / median:8.0f} tokens/s  {flops / median / peak:5.1%} of the GEMM peak  "
              f"sparing is {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
