"""The planner's efficiency parameters from published runs with set=fit: two shares per GPU type, one scalar per stack.

    python benchmarks/fit_planner.py      # prints what to write into conf/hardware/*.yaml and conf/stacks.yaml

Coordinate descent on the mean absolute log error. Rows with set=check take no part. A pipeline's idle share hardly
depends on the shares, so the clock runs once per row and sweep.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace

import published

from orchestrator.plan.estimate import busiest_s, step_parts
from orchestrator.plan.workload import Workload

GEMM = [0.5 + 0.025 * i for i in range(25)]
ATTENTION = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8]
OVERHEAD = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 6, 7, 8]


@dataclass
class Run:
    row: dict
    work: Workload
    published_s: float
    stretch: float = 1.0
    """Whole step over its busiest rank."""

    def error(self, gpu: dict, stack: dict) -> float:
        return abs(self.signed(gpu, stack))

    def signed(self, gpu: dict, stack: dict) -> float:
        """log(predicted / published)."""
        work = with_parameters(self.work, gpu, stack)
        return math.log(busiest_s(work) * self.stretch / self.published_s)


def with_parameters(work: Workload, gpu: dict, stack: dict) -> Workload:
    shares = gpu.get(work.hardware.name)
    if shares:
        work = replace(work, hardware=replace(work.hardware, gemm_share=shares[0], attention_share=shares[1]))
    if work.stack.name in stack:
        work = replace(work, stack=replace(work.stack, overhead=stack[work.stack.name]))
    return work


def fit_runs() -> list[Run]:
    found = []
    for row in published.read():
        if row["set"] != "fit":
            continue
        try:
            work = published.workload(row)
            found.append(Run(row, work, published.published_s(row, work)))
        except (published.CannotPredict, ValueError):
            continue
    return found


def fit(runs: list[Run], sweeps: int = 3) -> tuple[dict, dict]:
    """GPU type -> (gemm_share, attention_share), stack -> overhead."""
    gpu = {run.work.hardware.name: (run.work.hardware.gemm_share or 0.85, run.work.hardware.attention_share or 0.5)
           for run in runs}
    stack = {run.work.stack.name: run.work.stack.overhead for run in runs}
    by_gpu, by_stack = defaultdict(list), defaultdict(list)
    for run in runs:
        by_gpu[run.work.hardware.name].append(run)
        by_stack[run.work.stack.name].append(run)
    for sweep in range(sweeps):
        for run in runs if sweep < 2 else ():
            work = with_parameters(run.work, gpu, stack)
            parts, _ = step_parts(work)
            run.stretch = sum(parts.values()) / busiest_s(work)
        for name, known in by_stack.items():
            stack[name] = min(OVERHEAD, key=lambda x: _mean(known, gpu, stack | {name: x}))
        for name, known in by_gpu.items():
            for _ in range(2):
                gemm, attention = gpu[name]
                gemm = min(GEMM, key=lambda x: _mean(known, gpu | {name: (x, attention)}, stack))
                attention = min(ATTENTION, key=lambda x: _mean(known, gpu | {name: (gemm, x)}, stack))
                gpu[name] = gemm, attention
        print(f"mean absolute log error {_mean(runs, gpu, stack):.2%}", flush=True)
    return gpu, stack


def _mean(runs: list[Run], gpu: dict, stack: dict) -> float:
    return statistics.mean(run.error(gpu, stack) for run in runs)


def _residuals(runs: list[Run], gpu: dict, stack: dict) -> dict[str, list[float]]:
    """Sorted log(predicted / published) by how a prediction is made: with the stack's own scalar, with that of each
    other stack in turn, and so without the device's own shares too."""
    found = defaultdict(list)
    for run in runs:
        moe = "moe" if run.work.model.n_routed_experts else "dense"
        found[f"calibrated_{moe}"].append(run.signed(gpu, stack))
        for other in sorted(set(stack) - {run.work.stack.name}):
            strange = {run.work.stack.name: stack[other]}
            found[f"formula_{moe}"].append(run.signed(gpu, strange))
            found[f"extrapolated_{moe}"].append(run.signed({run.work.hardware.name: (0.85, 0.65)}, strange))
    return {kind: sorted(errors) for kind, errors in found.items()}


def main() -> None:
    runs = fit_runs()
    gpu, stack = fit(runs)
    for name, (gemm, attention) in sorted(gpu.items()):
        print(f"conf/hardware/{name}.yaml: gemm_share: {gemm:.3g}, attention_share: {attention:.3g}")
    for name, overhead in sorted(stack.items()):
        rows = sum(run.work.stack.name == name for run in runs)
        print(f"conf/stacks.yaml: {name}: overhead: {overhead:.3g}, rows: {rows}")
    residuals = _residuals(runs, gpu, stack)
    for moe in ("dense", "moe"):
        low, high = math.inf, 0.0
        for kind in ("calibrated", "formula", "extrapolated"):
            errors = residuals[f"{kind}_{moe}"]
            low = min(low, math.exp(-errors[-1 - len(errors) // 10]))
            high = max(high, math.exp(-errors[len(errors) // 10]))
            print(f"conf/bands.yaml: {kind}_{moe}: [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
