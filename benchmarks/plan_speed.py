"""How quick the planner is, on one core: CPU seconds of this process, so that other load does not count.

    python benchmarks/plan_speed.py
"""

import time

from orchestrator.compose import compose_config
from orchestrator.config import Schedule
from orchestrator.plan.estimate import estimate
from orchestrator.plan.hardware import catalogue
from orchestrator.plan.request import Request
from orchestrator.plan.schedule import actions
from orchestrator.plan.search import search
from orchestrator.plan.workload import Workload


def seconds(function, *args) -> tuple[float, object]:
    began = time.process_time()
    result = function(*args)
    return time.process_time() - began, result


def main() -> None:
    actions(Schedule["1f1b"], 2, 4)  # imports torch
    model, h800 = compose_config(["model=deepseek_v3"]).model, catalogue()["h800"]
    for schedule in ("1f1b", "zbv", "dualpipev", "dualpipe"):
        work = Workload(model, h800, 4096, 15360, 16, 128, 64, schedule, 120, dtype="fp8")
        table, _ = seconds(estimate, work)
        step = min(seconds(estimate, work)[0] for _ in range(5))
        print(f"one step of pp=16 with 120 microbatches, {schedule:10s} {step * 1e3:6.1f} ms, with its table the first "
              f"time {table * 1e3:6.0f} ms")
    took, plan = seconds(search, Request(model, h800, 2048, 14.8e12, 4096, 15360, "fp8"))
    rate = plan.considered / took
    print(f"DeepSeek-V3 on 2,048 H800: {plan.considered:,} layouts in {took:.1f} s, {rate:,.0f} a second")


if __name__ == "__main__":
    main()
