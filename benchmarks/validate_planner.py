"""The planner held against published training runs, against null models, and against what its peers reach.

    python benchmarks/validate_planner.py [--rows] [--file ROWS.csv]

Prints, from benchmarks/data/throughput.csv (`published` says how its rows are read): coverage, and the reason for every
row that is not predicted; error and bias of step time by group, set=fit apart from set=check; null models on the same
rows; regret where the order of several layouts was published; the share of rows inside the band that each prediction
carries; DeepSeek-V3's step and phases; each peer's own rows. Parameters are fitted by `fit_planner`, on set=fit alone.
"""

import argparse
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import published

from model import count
from model.config import ModelConfig
from orchestrator.plan.confidence import band, made
from orchestrator.plan.estimate import phases_s, step_parts
from orchestrator.plan.workload import Workload

PEERS = [("vTrain, 109 multi-node rows", "vtrainm", 0.1473), ("SimuMax, 43 B200 rows", "simumax", 0.0562),
         ("Calculon, 8 rows of Korthikanti et al.", "korth22", 0.0365), ("Primus, 4 rows", "primus", 0.074)]
"""Their own error on these rows, as they publish it (SimuMax and Primus after calibration on the very machine)."""
SIMUMAX_GEMM_TFLOPS = 1090.0
"""Of a bf16 product on the machine of SimuMax's rows: the median of the 364 products above 0.3 TFLOP among the 514 that
it timed there (configs/system/b200_bf16_ceperm.json: 0.4845 of 2,250)."""
V3_PHASES = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}
"""Seconds of the 19.926 s step (ISCA paper, table 4)."""


@dataclass
class Held:
    """A row beside its prediction."""

    row: dict
    work: Workload
    published_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.published_s - 1

    @property
    def moe(self) -> str:
        return "MoE" if self.work.model.n_routed_experts else "dense"

    @property
    def precision(self) -> str:
        return self.work.dtype

    @cached_property
    def mfu(self) -> float:
        """Published: 6 N active + 6 L h s FLOPs a token, over the bf16 peak (the null models' convention)."""
        model, work = self.work.model, self.work
        flops = 6 * active(model) + 6 * model.n_layers * model.dim * work.seq_len
        peak = work.hardware.bf16_tflops * 1e12 * work.devices
        return flops * work.batch_size * work.seq_len / self.published_s / peak


def active(model: ModelConfig) -> float:
    return count.active_parameters(model).including_both


def hold(rows: list[dict]) -> tuple[list[Held], list[tuple[dict, str]]]:
    found, missing = [], []
    for row in rows:
        try:
            work = published.workload(row)
            parts, _ = step_parts(work)
            found.append(Held(row, work, published.published_s(row, work), sum(parts.values())))
        except (published.CannotPredict, ValueError) as error:
            missing.append((row, str(error)))
    return found, missing


def layout_class(work: Workload) -> str:
    used = [name for name in ("tp", "pp", "cp", "ep") if getattr(work, name) > 1]
    return "+".join(used) or ("zero 3" if work.zero == 3 else "dp")


def by_group(held: list[Held]) -> dict[tuple[str, str], list[float]]:
    groups = defaultdict(list)
    for item in held:
        for group in ("all", item.moe, item.row["gpu"], f"stack {item.work.stack.name}",
                      f"layout {layout_class(item.work)}"):
            groups[group, item.row["set"]].append(item.error)
    return groups


def null_errors(held: list[Held], key, *, leave_out: bool) -> list[tuple[float, float]]:
    """Of every row that has peers: the null model's absolute error, and the planner's on the same row. The null model
    is the median MFU of rows with the same `key`, those of its own source left out or not."""
    peers = defaultdict(list)
    for item in held:
        peers[key(item)].append(item)
    found = []
    for item in held:
        source = published.prefix(item.row)
        known = [other.mfu for other in peers[key(item)] if not leave_out or published.prefix(other.row) != source]
        if known:
            found.append((abs(item.mfu / statistics.median(known) - 1), abs(item.error)))
    return found


def experiments(held: list[Held]) -> list[list[Held]]:
    """Runs that differ in layout alone: same model, device and number of them, precision, tokens a step and stack."""
    groups = defaultdict(list)
    for item in held:
        row = item.row
        groups[row["model"], row["gpu"], row["num_gpus"], row["precision"], row["seq_len"], row["global_batch"],
               published.prefix(row), item.work.stack.name].append(item)
    return [group for group in groups.values() if len({_layout(item) for item in group}) > 1]


def _layout(item: Held) -> tuple:
    work = item.work
    return work.tp, work.pp, work.stages_per_rank, work.cp, work.ep, work.microbatches, work.recompute, work.zero


def regret(group: list[Held]) -> float:
    """What the layout that is predicted fastest costs more than the one that was."""
    chosen = min(group, key=lambda item: item.predicted_s)
    return chosen.published_s / min(item.published_s for item in group) - 1


def inside(item: Held) -> bool:
    low, high = band(item.work)
    return low <= item.published_s / item.predicted_s <= high


def mean(values) -> float:
    return statistics.mean(values)


def report(held: list[Held], missing: list[tuple[dict, str]], rows: list[dict]) -> None:
    whole = [row for row in rows if published.full_layout(row)]
    reached = sum(published.full_layout(item.row) for item in held)
    print(f"{len(rows)} rows; {len(whole)} give a full layout, of which {reached} predicted "
          f"({reached / len(whole):.1%}). Not predicted:")
    for reason, times in Counter(reason for _, reason in missing).most_common():
        print(f"{times:5d}  {reason}")
    print("\nstep time: rows, mean absolute error, signed bias\n"
          f"{'':36s}{'fit':>24s}{'check':>24s}")
    groups = by_group(held)
    for group in sorted({group for group, _ in groups}, key=lambda name: (name.split()[0], name)):
        cells = [groups.get((group, which), []) for which in ("fit", "check")]
        line = "".join(f"{len(c):7d}{mean(map(abs, c)):8.1%}{mean(c):+8.1%} " if c else " " * 24 for c in cells)
        over = any(len(c) >= 10 and mean(map(abs, c)) > 0.2 for c in cells)
        print(f"{group:36s}{line}{'  above 20%' if over else ''}")
    print("\nnull models on the same rows: theirs, ours")
    def kind(item: Held) -> tuple:
        return item.row["gpu"], item.moe, item.precision

    for name, key, out in (("median MFU per device, source left out", lambda item: item.row["gpu"], True),
                           ("per device, MoE or dense, precision, source left out", kind, True),
                           ("per device, MoE or dense, precision, in sample", kind, False)):
        pairs = null_errors(held, key, leave_out=out)
        print(f"{name:56s}{len(pairs):5d} rows {mean(a for a, _ in pairs):7.1%}{mean(b for _, b in pairs):7.1%}")
    print("\nMFU of mixtures of experts against dense models, published and predicted")
    for gpu in sorted({item.row["gpu"] for item in held if item.moe == "MoE"}):
        ours = {moe: [i for i in held if i.row["gpu"] == gpu and i.moe == moe and i.precision != "bf16"]
                for moe in ("dense", "MoE")}
        if all(ours.values()):
            theirs = [statistics.median(i.mfu for i in ours[moe]) for moe in ("MoE", "dense")]
            mine = [statistics.median(i.mfu / (1 + i.error) for i in ours[moe]) for moe in ("MoE", "dense")]
            print(f"{gpu:20s}{theirs[0] / theirs[1]:6.2f}{mine[0] / mine[1]:6.2f}")
    groups = experiments(held)
    print(f"\n{len(groups)} natural experiments (layouts of one model on the same devices): mean regret "
          f"{mean(map(regret, groups)):.1%}, worst {max(map(regret, groups)):.1%}")
    for which in ("fit", "check"):
        known = [item for item in held if item.row["set"] == which]
        kinds = Counter(made(item.work) for item in known)
        print(f"inside the P10-P90 band, {which}: {mean(map(inside, known)):.1%} ({dict(kinds)})")
    print("\npeers on their own rows: theirs, ours, ours on the other rows after scaling to one (median over which)")
    for name, which, theirs in PEERS:
        ours = [item.error for item in held if published.prefix(item.row) == which]
        print(f"{name:44s}{theirs:8.2%}{mean(map(abs, ours)):8.2%}{scaled_to_one(ours):8.2%}  bias {mean(ours):+.1%}, "
              f"{len(ours)} rows")
    told = [with_gemm_rate(item, SIMUMAX_GEMM_TFLOPS) for item in held if published.prefix(item.row) == "simumax"]
    print(f"{'SimuMax, given the product rate of its machine':52s}{mean(map(abs, told)):8.2%}{'':8s}  bias "
          f"{mean(told):+.1%}")


def scaled_to_one(errors: list[float]) -> float:
    """Mean absolute error of the other rows when every prediction is divided by one row's, as `plan calibrate=` does
    with one run; the median over which row that is."""
    return statistics.median(mean(abs((1 + other) / (1 + one) - 1) for j, other in enumerate(errors) if j != i)
                             for i, one in enumerate(errors))


def with_gemm_rate(item: Held, tflops: float) -> float:
    """The row's error where a large bf16 product on its machine is known to run at `tflops`."""
    hardware = item.work.hardware
    work = replace(item.work, hardware=replace(hardware, gemm_share=tflops / hardware.bf16_best_tflops))
    return sum(step_parts(work)[0].values()) / item.published_s - 1


def deepseek(held: list[Held]) -> None:
    item = next(item for item in held if item.row["id"] == "dsv3-001")
    parts, timeline = step_parts(item.work)
    hours = item.predicted_s * item.work.devices / 3600 / (item.work.batch_size * item.work.seq_len) * 1e12
    print(f"\nDeepSeek-V3, nothing fitted to it but kernel times: step {item.predicted_s:.2f} s of 19.926 "
          f"({item.error:+.1%}), {hours / 1e3:.1f} K GPU-hours per trillion tokens of 180")
    ours = phases_s(timeline, 0) | {"optimizer": parts["reduce"] + parts["optimizer"]}
    for name, theirs in V3_PHASES.items():
        print(f"{name:12s}{ours[name]:8.2f}{theirs:8.2f}{ours[name] / theirs - 1:+8.1%}")


def print_rows(held: list[Held], missing: list[tuple[dict, str]]) -> None:
    for item in held:
        low, high = (share * item.predicted_s for share in band(item.work))
        print(f"{item.row['set']:6s}{item.row['id']:14s}{item.row['model'][:24]:26s}{item.row['gpu']:22s}"
              f"published {item.published_s:9.3f} s  predicted {item.predicted_s:9.3f} s [{low:.3f}, {high:.3f}] "
              f"{item.error:+7.1%}  {made(item.work)}, stack {item.work.stack.name}")
    for row, reason in missing:
        print(f"{row['set']:6s}{row['id']:14s}{row['model'][:24]:26s}not predicted: {reason}")
    if held:
        print(f"{len(held)} rows: mean absolute error {mean(abs(item.error) for item in held):.1%}, bias "
              f"{mean(item.error for item in held):+.1%}, inside their band {mean(map(inside, held)):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--file", type=Path, help="other rows, in the same columns: each beside its prediction, and "
                        "their error")
    args = parser.parse_args()
    if args.file:
        return print_rows(*hold(published.read(args.file.absolute())))
    rows = published.read()
    held, missing = hold(rows)
    if args.rows:
        print_rows(held, missing)
    report(held, missing, rows)
    deepseek(held)


if __name__ == "__main__":
    main()
