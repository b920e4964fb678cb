"""The planner's efficiency parameters from published runs with set=fit: a share or two per GPU type, one scalar per
stack.

    python benchmarks/fit_planner.py      # prints what to write into conf/hardware/*.yaml and conf/stacks.yaml

Coordinate descent on the mean absolute log error. Rows with set=check take no part. A pipeline's idle share hardly
depends on the shares, so the clock runs once per row and sweep.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field, replace

import published

from orchestrator.plan.bound import busy_s
from orchestrator.plan.estimate import step_parts
from orchestrator.plan.workload import Workload

GEMM = [0.5 + 0.025 * i for i in range(25)]
ATTENTION = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8]
MEASURED = ("h100", "b200", "b300", "gb200", "gb300")
"""Devices whose attention core was measured alone (conf/hardware): its share is not fitted."""
STUDENT = [3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372, 1.363, 1.356, 1.350, 1.345, 1.341]
"""Student's t at 90% by degrees of freedom, from 1 on."""
OVERHEAD = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 6, 7, 8]


@dataclass
class Run:
    row: dict
    work: Workload
    published_s: float
    stretch: float = 1.0
    """Whole step over its busiest rank."""
    known: dict = field(default_factory=dict)
    """Busiest rank's seconds by the parameters that they depend on."""

    @property
    def device(self) -> str:
        return self.work.hardware.name

    @property
    def stack(self) -> str:
        return self.work.stack.name

    def error(self, gpu: dict, stack: dict) -> float:
        return abs(self.signed(gpu, stack))

    def signed(self, gpu: dict, stack: dict) -> float:
        """log(predicted / published)."""
        key = gpu.get(self.device), stack.get(self.stack)
        if key not in self.known:
            self.known[key] = busiest_s(with_parameters(self.work, gpu, stack))
        return math.log(self.known[key] * self.stretch / self.published_s)


def busiest_s(work: Workload) -> float:
    """Seconds at work of the busiest rank, without a clock."""
    return max(busy_s(work)) * work.microbatches


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
    gpu = {run.device: (run.work.hardware.gemm_share or 0.85, run.work.hardware.attention_share or 0.5)
           for run in runs}
    stack = {run.stack: run.work.stack.overhead for run in runs}
    by_gpu, by_stack = defaultdict(list), defaultdict(list)
    for run in runs:
        by_gpu[run.device].append(run)
        by_stack[run.stack].append(run)
    for sweep in range(sweeps):
        for run in runs if sweep < 2 else ():
            work = with_parameters(run.work, gpu, stack)
            parts, _ = step_parts(work)
            run.stretch = sum(parts.values()) / busiest_s(work)
        for name, known in by_stack.items():
            stack[name] = _overhead(known, gpu, stack)
        for name, known in by_gpu.items():
            gpu[name] = _shares(known, gpu, stack)
        print(f"mean absolute log error {_mean(runs, gpu, stack):.2%}", flush=True)
    return gpu, stack


def _overhead(runs: list[Run], gpu: dict, stack: dict) -> float:
    """The best scalar of the one stack that these runs used."""
    return min(OVERHEAD, key=lambda x: _mean(runs, gpu, stack | {runs[0].stack: x}))


def _shares(runs: list[Run], gpu: dict, stack: dict) -> tuple[float, float]:
    """The best shares of the one device that these runs used."""
    name = runs[0].device
    gemm, attention = gpu[name]
    for _ in range(2):
        gemm = min(GEMM, key=lambda x: _mean(runs, gpu | {name: (x, attention)}, stack))
        if name not in MEASURED:
            attention = min(ATTENTION, key=lambda x: _mean(runs, gpu | {name: (gemm, x)}, stack))
    return gemm, attention


def _mean(runs: list[Run], gpu: dict, stack: dict) -> float:
    return statistics.mean(run.error(gpu, stack) for run in runs)


def _residuals(runs: list[Run], gpu: dict, stack: dict) -> dict[str, list[tuple[float, float, str]]]:
    """log(published / predicted), its weight and what was left out, of runs that took no part in their prediction, by
    how it is made.

    calibrated: the stack's scalar without this model's runs. formula: the device's shares without this stack's runs,
    and every other stack's scalar in turn. extrapolated: those, and no shares of the device. The runs of one stack
    are near copies of each other, so every stack weighs the same.
    """
    found = defaultdict(list)
    groups = defaultdict(list)
    for run in runs:
        groups[run.stack].append(run)
    for name, own in groups.items():
        moved = {}
        for device in {run.device for run in own}:
            rest = [run for run in runs if run.device == device and run.stack != name]
            if rest:
                moved[device] = _shares(rest, gpu, stack)
        for run in own:
            moe = "moe" if run.work.model.n_routed_experts else "dense"
            others = [each for each in own if each.row["model"] != run.row["model"]]
            if others:
                scalar = _overhead(others, gpu, stack)
                error = run.signed(gpu, stack | {name: scalar})
                found[f"calibrated_{moe}"].append((-error, 1 / len(own), run.row["model"]))
            for other in sorted(set(stack) - {name}):
                strange, weight = {name: stack[other]}, 1 / len(own) / len(stack)
                if run.device in moved:
                    found[f"formula_{moe}"].append((-run.signed(moved, strange), weight, name))
                assumed = {run.device: (0.85, 0.65)}
                found[f"extrapolated_{moe}"].append((-run.signed(assumed, strange), weight, name))
    return found


def _band(residuals: list[tuple[float, float, str]]) -> tuple[float, float]:
    """P10 and P90 of the next residual: quantiles of those seen, or where it is wider Student's prediction interval
    with as many draws as things were left out, since a few seldom show how far the next one is off."""
    total, draws = sum(weight for _, weight, _ in residuals), len({out for _, _, out in residuals})
    mean = sum(value * weight for value, weight, _ in residuals) / total
    spread = math.sqrt(sum(weight * (value - mean) ** 2 for value, weight, _ in residuals) / total
                       * (draws + 1) / (draws - 1))
    reach = STUDENT[min(draws - 1, len(STUDENT)) - 1] * spread
    return min(_quantile(residuals, 0.1), mean - reach), max(_quantile(residuals, 0.9), mean + reach)


def _quantile(residuals: list[tuple[float, float, str]], share: float) -> float:
    """The value below which so much of the weight lies."""
    left = share * sum(weight for _, weight, _ in residuals)
    for value, weight, _ in sorted(residuals):
        left -= weight
        if left <= 0:
            return value
    return max(value for value, _, _ in residuals)


def main() -> None:
    runs = fit_runs()
    gpu, stack = fit(runs)
    for name, (gemm, attention) in sorted(gpu.items()):
        print(f"conf/hardware/{name}.yaml: gemm_share: {gemm:.3g}, attention_share: {attention:.3g}")
    for name, overhead in sorted(stack.items()):
        devices = ", ".join(sorted({run.device for run in runs if run.stack == name}))
        print(f"conf/stacks.yaml: {name}: overhead: {overhead:.3g}, fitted_on: [{devices}]")
    residuals = _residuals(runs, gpu, stack)
    for moe in ("dense", "moe"):
        low, high = math.inf, 0.0
        for kind in ("calibrated", "formula", "extrapolated"):
            found = _band(residuals[f"{kind}_{moe}"])
            low, high = min(low, math.exp(found[0])), max(high, math.exp(found[1]))
            print(f"conf/bands.yaml: {kind}_{moe}: [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
