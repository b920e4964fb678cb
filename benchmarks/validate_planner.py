"""The planner held against published training runs: predicted step time, published one, and the error, by group.

    python benchmarks/validate_planner.py throughput.csv [--rows] [--fit]

The table has one run a row (columns: set, id, model, layers, hidden, ffn, heads, kv_heads, vocab, seq_len, experts,
topk, gpu, num_gpus, tp, pp, vpp, ep, cp, dp, micro_batch, global_batch, precision, recompute, metric, value). Empty is
unknown. One scalar per GPU type and software stack (the prefix of id) is taken from rows with set=fit, their median
published over predicted; rows with set=check are only reported. A row the planner cannot express is listed with why.
"""

import argparse
import contextlib
import csv
import itertools
import statistics
from collections import Counter, defaultdict
from dataclasses import replace

from model import count
from model.config import Attention, ModelConfig
from orchestrator.compose import compose_config
from orchestrator.config import Recompute
from orchestrator.plan.cost import model_flops
from orchestrator.plan.estimate import estimate
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.workload import Workload

HARDWARE = {"H100-SXM": "h100", "A100-SXM": "a100", "A100-80GB-SXM": "a100", "A100-40GB-SXM": "a100",
            "B200-SXM": "b200", "B200": "b200", "H800-SXM": "h800", "H200": "h200"}
SHIPPED = {"DeepSeekV3": "deepseek_v3", "DeepSeek-V3": "deepseek_v3", "Qwen3_30B_a3B": "qwen3_30b_a3b",
           "Qwen3_235B_a22B": "qwen3_235b_a22b", "Kimi_K2": "kimi_k2"}


class CannotPredict(Exception):
    pass


def number(row: dict, key: str, default: int | None = None) -> int:
    if row[key] == "":
        if default is None:
            raise CannotPredict(f"{key} is unknown")
        return default
    return int(float(row[key]))


def shape(row: dict) -> ModelConfig:
    name = SHIPPED.get(row["model"].split(" (")[0])
    if name:
        return compose_config([f"model={name}"]).model
    if row["experts"]:
        raise CannotPredict("a mixture of experts of unknown shape")
    dim, heads, ffn = number(row, "hidden"), number(row, "heads"), number(row, "ffn")
    layers = number(row, "layers")
    gated = ffn != 4 * dim
    return ModelConfig(
        vocab_size=number(row, "vocab"), dim=dim, n_layers=layers, n_dense_layers=layers, n_heads=heads,
        inter_dim=ffn if gated else ffn * 2 // 3, attention=Attention.gqa, n_kv_heads=number(row, "kv_heads", heads),
        head_dim=dim // heads, n_routed_experts=0, n_shared_experts=0, n_activated_experts=0, moe_inter_dim=0)


def workload(row: dict) -> Workload:
    if row["gpu"] not in HARDWARE:
        raise CannotPredict(f"no data sheet for {row['gpu']}")
    tp, cp = number(row, "tp", 1), number(row, "cp", 1)
    precision = row["precision"]
    dtype = "fp8" if "fp8" in precision else "bf16"
    if "nvfp4" in precision or not precision:
        raise CannotPredict(f"precision {precision or 'is unknown'}")
    pp, vpp, dp = number(row, "pp", 1), number(row, "vpp", 1), number(row, "dp")
    microbatches = number(row, "global_batch") // (dp * number(row, "micro_batch"))
    if microbatches < 1:
        raise CannotPredict("batch is smaller than dp x microbatch")
    schedule = "1f1b"
    if vpp > 1 and pp > 1:
        schedule = "interleaved_1f1b"
        if microbatches < pp or microbatches % max(1, microbatches // pp):
            raise CannotPredict("microbatches do not go in equal rounds")
    model = shape(row)
    if pp * vpp > model.n_layers or (pp > 1 and vpp == 1 and microbatches < pp):
        raise CannotPredict("schedule that torch does not offer")
    recompute = next((r for r in Recompute if row["recompute"].startswith(r.name)), Recompute.none)
    return Workload(model, catalogue()[HARDWARE[row["gpu"]]], number(row, "seq_len"), number(row, "global_batch"), pp,
                    dp, number(row, "ep", 1), schedule, microbatches, stages_per_rank=vpp, recompute=recompute,
                    tp=tp, cp=cp,
                    dtype=dtype)


def published_s(row: dict, work: Workload) -> float:
    """The row's figure as seconds a step."""
    value, tokens = float(row["value"]), work.batch_size * work.seq_len
    metric = row["metric"]
    if metric == "iter_time_s":
        return value
    if metric == "tokens_per_s_per_gpu":
        return tokens / (value * work.devices)
    if metric == "model_tflops_per_gpu":
        return model_flops(work.model, tokens, work.seq_len) / (value * 1e12 * work.devices)
    if metric == "hw_tflops_per_gpu":
        again = 4 / 3 if work.recompute is Recompute.full else 1
        flops = tokens * count.training_flops(work.model, work.seq_len, causal=False) * again
        return flops / (value * 1e12 * work.devices)
    raise CannotPredict(f"metric {metric}")


def fit(rows: list[dict]) -> None:
    """The shares of each GPU type that meet its fit rows best, on a grid; the check rows take no part."""
    known = defaultdict(list)
    for row in rows:
        with contextlib.suppress(CannotPredict, ValueError):
            if row["set"] == "fit":
                work = workload(row)
                known[work.hardware.name].append((work, published_s(row, work)))
    for name, runs in known.items():
        found = []
        shares = itertools.product((0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8), (0.2, 0.25, 0.3, 0.35, 0.4, 0.5))
        for gemm, attention in shares:
            hardware = replace(runs[0][0].hardware, gemm_share=gemm, attention_share=attention)
            errors = [abs(estimate(replace(work, hardware=hardware)).step_time_s / theirs - 1) for work, theirs in runs]
            found.append((statistics.mean(errors), gemm, attention))
        error, gemm, attention = min(found)
        print(f"{name}: gemm_share {gemm}, attention_share {attention}: {error:.1%} on {len(runs)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--fit", action="store_true", help="search gemm_share and attention_share on rows with set=fit")
    args = parser.parse_args()
    with open(args.table) as file:
        rows = list(csv.DictReader(file))
    if args.fit:
        return fit(rows)
    predicted, reasons = [], Counter()
    for row in rows:
        try:
            work = workload(row)
            predicted.append((row, work, estimate(work).step_time_s, published_s(row, work)))
        except (CannotPredict, ValueError) as error:
            reasons[str(error)] += 1
    ratios = defaultdict(list)
    for row, _, ours, theirs in predicted:
        if row["set"] == "fit":
            ratios[row["gpu"], row["id"].rsplit("-", 1)[0]].append(theirs / ours)
    scalars = {key: statistics.median(values) for key, values in ratios.items()}
    everywhere = statistics.median(value for values in ratios.values() for value in values)
    groups = defaultdict(list)
    for row, _, ours, theirs in predicted:
        key = row["gpu"], row["id"].rsplit("-", 1)[0]
        fitted = ours * scalars.get(key, everywhere)
        raw_error, error = ours / theirs - 1, fitted / theirs - 1
        kind = "MoE" if row["experts"] else "dense"
        for group in ("all", kind, row["gpu"], f"stack {key[1]}", f"pp {'> 1' if row['pp'] not in ('', '1') else '1'}"):
            groups[row["set"], group].append((abs(raw_error), abs(error)))
        if args.rows:
            print(f"{row['set']:5s} {row['id']:16s} {row['model'][:24]:24s} predicted {ours:9.3f} s  with scalar "
                  f"{fitted:9.3f} s  published {theirs:9.3f} s  error {error:+7.1%}")
    print(f"{len(predicted)} of {len(rows)} rows predicted; mean absolute error of step time, as it comes and with one "
          "scalar per GPU type and stack")
    for (which, group), errors in sorted(groups.items()):
        raw, fitted = (statistics.mean(side) for side in zip(*errors, strict=True))
        print(f"{which:5s} {group:18s} {len(errors):4d} rows  {raw:6.1%}  {fitted:6.1%}")
    print("not predicted:")
    for reason, times in reasons.most_common():
        print(f"{times:5d} rows: {reason}")


if __name__ == "__main__":
    main()
