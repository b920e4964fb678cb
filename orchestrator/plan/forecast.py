"""What a run should take, said before its first step; and what a finished run teaches the next forecast.

The same arithmetic as a plan, for the one layout that a config names. A GPU's figures come from conf/hardware. A CPU
has no data sheet worth the name: its products run at the rate of the GEMM measured at the start, every operator costs
its dispatch, and ranks share the machine's cores. `calibrate` then scales the parts to what one run measured.
"""

from dataclasses import dataclass, replace

from orchestrator.config import ComputeDtype, Config, HardwareConfig
from orchestrator.plan.estimate import step_parts
from orchestrator.plan.keeping import SPARING
from orchestrator.plan.memory import memory_gib
from orchestrator.plan.workload import Assumptions, Calibration, Workload

CPU = Assumptions(gemm=1.0, best_bf16=1.0, attention_forward=1.0, attention_backward=1.0, memory=1.0, inner=16.0,
                  gap_s=8e-6, host_s=0.0, network=1.0, latency_s=2e-4)
"""A CPU under eager torch: the device is its own host, so dispatch is a gap between operators; gloo over loopback."""
CPU_GB_PER_S, LOOPBACK_GB_PER_S = 10.0, 1.0


@dataclass(frozen=True)
class Machine:
    """Where the ranks run. cores: of one node; only a CPU's matter."""

    device: str
    peak_flops_per_s: float
    """Of one rank while all ranks of its node compute."""
    ranks_per_node: int = 1
    cores: int = 1

    @property
    def crowding(self) -> float:
        """Ranks to a core, at least 1."""
        return max(1.0, self.ranks_per_node / self.cores) if self.device == "cpu" else 1.0


def forecast(config: Config, machine: Machine, calibration: Calibration = Calibration()) -> dict:
    """Seconds of a step and its parts, GiB of the fullest rank, dollars of all steps; predicted.

    Keys are those of `measured` in summary.json. `how` says where the figures come from. ValueError if the hardware
    entry lacks a figure.
    """
    work = workload_of(config, machine, calibration)
    parts, timeline = step_parts(work)
    pipeline = timeline.step_time
    if machine.device == "cpu":  # busy ranks share the cores; those that wait leave theirs to the others
        pipeline = max(pipeline, sum(timeline.busy) * machine.crowding / len(timeline.busy))
    working, updating = pipeline + parts["reduce"], parts["optimizer"] * machine.crowding
    step_s, price = working + updating, config.hardware.usd_per_h
    found = {"how": f"calibrated on {calibration.run}" if calibration.run else "formula",
             "step_time_s": step_s, "forward_backward_s": working, "optimizer_s": updating,
             "bubble": 1 - max(timeline.busy) / timeline.step_time,
             "tokens_per_s": config.train.batch_size * config.train.seq_len / step_s,
             "steps_usd": None if price is None else step_s * config.train.steps * work.devices / 3600 * price}
    if machine.device == "cpu":
        return found
    return found | {"memory_peak_gib": memory_gib(replace(work, zero=1, keeping=SPARING))["total"]}


def calibrate(config: Config, machine: Machine, measured: dict, run: str) -> Calibration:
    """What a finished run measured over what was to be expected of it. `measured` is its summary's; KeyError if the
    run kept no parts."""
    on_cpu = machine.device == "cpu"
    base = Calibration(peak_flops_per_s=machine.peak_flops_per_s * machine.crowding if on_cpu else None,
                       cores=machine.cores if on_cpu else 0)
    expected = forecast(config, machine, base)
    return replace(base, forward_backward=measured["forward_backward_s"] / expected["forward_backward_s"],
                   optimizer=measured["optimizer_s"] / expected["optimizer_s"] if expected["optimizer_s"] else 1.0,
                   run=run)


def workload_of(config: Config, machine: Machine, calibration: Calibration = Calibration()) -> Workload:
    """The config's own run as the planner sees it."""
    layout, train, hardware, assumptions = config.layout, config.train, config.hardware, Assumptions()
    if machine.device == "cpu":
        hardware = cpu(hardware, calibration.peak_flops_per_s or machine.peak_flops_per_s * machine.crowding)
        assumptions = CPU
    elif config.precision.compute_dtype is ComputeDtype.fp32:
        hardware = replace(hardware, bf16_tflops=machine.peak_flops_per_s / 1e12)
    return Workload(config.model, hardware, train.seq_len, train.batch_size, layout.pp, layout.dp, layout.ep,
                    layout.schedule.name, layout.microbatches, stages_per_rank=layout.stages_per_rank,
                    recompute=layout.recompute, zero=3, assumptions=assumptions, calibration=calibration)


def shared_cores(hardware: HardwareConfig, ranks: int, calibration: Calibration) -> tuple[HardwareConfig, Assumptions]:
    """`ranks` on the cores of the run that calibrated, each at its share of them: an upper bound where some wait."""
    crowding = max(1.0, ranks / calibration.cores)
    slow = replace(CPU, gap_s=CPU.gap_s * crowding, latency_s=CPU.latency_s * crowding)
    found = cpu(hardware, calibration.peak_flops_per_s / crowding)
    return replace(found, memory_gb_per_s=found.memory_gb_per_s / crowding), slow


def cpu(hardware: HardwareConfig, peak: float) -> HardwareConfig:
    """A core as a device with a data sheet; figures that nobody gave are rough, and calibration makes up for them."""
    return replace(hardware, bf16_tflops=peak / 1e12, memory_gib=hardware.memory_gib or 1e6,
                   memory_gb_per_s=hardware.memory_gb_per_s or CPU_GB_PER_S,
                   scale_up_gb_per_s=hardware.scale_up_gb_per_s or LOOPBACK_GB_PER_S,
                   scale_out_gb_per_s=hardware.scale_out_gb_per_s or LOOPBACK_GB_PER_S)
