"""What a run should take, said before its first step; and what a finished run teaches the next forecast.

The same arithmetic as a plan, for the one layout that a config names. A GPU's figures come from conf/hardware. A CPU
has no data sheet worth the name: its products run at the rate of the GEMM measured at the start, every operator costs
its dispatch, measured too, and ranks share the machine's cores: those at work progress alike, and one that waits leaves
its share to the others (`simulate`). `calibrate` then scales the parts to what one run measured, and takes its routing.
"""

import math
from dataclasses import dataclass, replace

from model.config import ModelConfig
from orchestrator.config import ComputeDtype, Config, HardwareConfig
from orchestrator.plan.estimate import step_parts
from orchestrator.plan.exchange import Routing
from orchestrator.plan.hardware import in_machines
from orchestrator.plan.keeping import own
from orchestrator.plan.memory import memory_gib
from orchestrator.plan.stack import stack_named
from orchestrator.plan.workload import Assumptions, Calibration, Workload

CPU = Assumptions(gemm=1.0, best_bf16=1.0, attention_forward=1.0, attention_backward=1.0, memory=1.0, inner=16.0,
                  core_ramp=0.0, operators=100.0, gap_s=10e-6, host_s=0.0, network=1.0, latency_s=2e-4, exchange_s=3e-4,
                  bucket_s=3e-3, crowded=0.9)
"""A CPU under eager torch, read off profiles of `tiny` on one core and off its CPU seconds under two to four ranks. The
device is its own host, so dispatch is a gap between operators: a block has about 100 of them in forward, 60 more with
experts. gloo over loopback: each exchange and each of FSDP2's blocks costs more than its bytes, however tokens go."""
OWN = stack_named("sparing")
"""This program."""
CPU_GB_PER_S, LOOPBACK_GB_PER_S = 3.5, 0.4
"""Of one core's operators that are bound by memory, which bytes of fused bf16 kernels count; of one rank's exchange."""
BARRIER_S = 18e-6
"""What an operator costs beyond its dispatch where a rank has several threads, if nobody measured it."""


@dataclass(frozen=True)
class Machine:
    """Where the ranks run. cores: of one node; only a CPU's matter."""

    device: str
    peak_flops_per_s: float
    """Of one rank while all ranks of its node compute."""
    ranks_per_node: int = 1
    cores: int = 1
    operator_s: float | None = None
    """What an operator takes on a CPU whatever it computes."""
    barrier_s: float | None = None
    """What it takes longer where threads share it."""
    emulates_fp8: bool = False
    """A GPU that multiplies FP8 operands in another dtype: it has no tensor cores for them, or refused the kernels."""

    @property
    def core_flops_per_s(self) -> float:
        """Of one core, which some ranks share or of which one rank has some."""
        return self.peak_flops_per_s * max(1.0, self.ranks_per_node / self.cores) / _threads(self.cores,
                                                                                            self.ranks_per_node)


def forecast(config: Config, machine: Machine, calibration: Calibration = Calibration()) -> dict:
    """Seconds of a step and its parts, GiB of the fullest rank, dollars of all steps; predicted.

    Keys are those of `measured` in summary.json. `how` says where the figures come from. ValueError if the hardware
    entry lacks a figure.
    """
    work = workload_of(config, machine, calibration)
    parts, timeline = step_parts(work)
    working, updating = timeline.step_time + parts["reduce"], parts["optimizer"]
    step_s, price = working + updating, config.hardware.usd_per_h
    found = {"how": f"calibrated on {calibration.run}" if calibration.run else "formula",
             "step_time_s": step_s, "forward_backward_s": working, "optimizer_s": updating,
             "bubble": 1 - max(timeline.busy) / timeline.step_time,
             "tokens_per_s": config.train.batch_size * config.train.seq_len / step_s,
             "steps_usd": None if price is None else step_s * config.train.steps * work.devices / 3600 * price}
    if machine.device == "cpu":
        return found
    return found | {"memory_peak_gib": memory_of(config, machine, work)["total"]}


def memory_of(config: Config, machine: Machine, work: Workload) -> dict[str, float]:
    """GiB of the run's fullest rank, by component; on a CPU of its tensors alone, without the process around them."""
    cpu, dtype = machine.device == "cpu", config.precision.compute_dtype.name
    dtype = "fp8" if config.precision.fp8 else dtype.replace("auto", "fp32" if cpu else "bf16")
    return memory_gib(replace(work, dtype=dtype, keeping=own(dtype, cpu=cpu)))


def calibrate(config: Config, machine: Machine, measured: dict, run: str,
              counts: tuple[tuple[float, ...], ...] = ()) -> Calibration:
    """What a finished run measured over what was to be expected of it. `measured` is its summary's, `counts` its tokens
    per expert; KeyError if the run kept no parts."""
    base = replace(_uncalibrated(machine), counts=counts)
    expected = forecast(config, machine, base)
    return replace(base, forward_backward=measured["forward_backward_s"] / expected["forward_backward_s"],
                   optimizer=measured["optimizer_s"] / expected["optimizer_s"] if expected["optimizer_s"] else 1.0,
                   run=run, model=config.model.name, hardware=config.hardware.name,
                   stack=workload_of(config, machine, base).stack)


def workload_of(config: Config, machine: Machine, calibration: Calibration = Calibration()) -> Workload:
    """The config's own run as the planner sees it."""
    layout, train, hardware, ranks = config.layout, config.train, config.hardware, config.layout.world_size
    assumptions = Assumptions()
    if machine.device == "cpu":
        calibration = calibration if calibration.cores else _uncalibrated(machine)
        hardware, assumptions, calibration = Cpus(hardware, calibration, machine.ranks_per_node).shared_by(ranks)
    else:
        hardware = in_machines(hardware, config.cluster.ranks_per_node)
        if config.precision.compute_dtype is ComputeDtype.fp32:
            hardware = replace(hardware, bf16_tflops=machine.peak_flops_per_s / 1e12)
    on_tensor_cores = (config.precision.fp8 and machine.device != "cpu" and hardware.fp8_tflops
                       and not machine.emulates_fp8)
    if not layout.overlap:
        assumptions = replace(assumptions, overlap_cost=math.inf)
    stack = replace(OWN, copies=machine.device != "cpu" and not layout.ep_per_node)
    return Workload(config.model, hardware, train.seq_len, train.batch_size, layout.pp, layout.dp, layout.ep,
                    layout.schedule.name, layout.microbatches, stages_per_rank=layout.stages_per_rank,
                    recompute=layout.recompute, zero=1, dtype="fp8" if on_tensor_cores else "bf16",
                    imbalance=routing_of(calibration, config.model).imbalance(layout.ep), stack=stack,
                    assumptions=assumptions, calibration=calibration)


@dataclass(frozen=True)
class Cpus:
    """Machines whose ranks share cores and memory, so that a rank's figures follow from how many there are."""

    hardware: HardwareConfig
    """As it was given; figures that nobody gave are rough, and calibration makes up for them."""
    calibration: Calibration
    """Its cores are those of one machine."""
    ranks_per_machine: int = 0
    """0: as many as there are, on one machine."""
    machine_gib: float = math.inf

    def shared_by(self, ranks: int) -> tuple[HardwareConfig, Assumptions, Calibration]:
        """One of `ranks` as a device with a data sheet: all of a core, or some of them; and all cores together."""
        hardware, machines = self.hardware, math.ceil(ranks / (self.ranks_per_machine or ranks))
        calibration = replace(self.calibration, cores=self.calibration.cores * machines)
        threads = _threads(calibration.cores, ranks)
        device = replace(hardware, bf16_tflops=calibration.peak_flops_per_s * threads / 1e12,
                         memory_gib=hardware.memory_gib or self.machine_gib * machines / ranks,
                         memory_gb_per_s=(hardware.memory_gb_per_s or CPU_GB_PER_S) * threads,
                         scale_up_gb_per_s=hardware.scale_up_gb_per_s or LOOPBACK_GB_PER_S,
                         scale_out_gb_per_s=hardware.scale_out_gb_per_s or LOOPBACK_GB_PER_S)
        operator_s = CPU.gap_s if calibration.operator_s is None else calibration.operator_s
        barrier_s = BARRIER_S if calibration.barrier_s is None else calibration.barrier_s
        return device, replace(CPU, gap_s=operator_s + (barrier_s if threads > 1 else 0.0)), calibration


def _uncalibrated(machine: Machine) -> Calibration:
    if machine.device != "cpu":
        return Calibration()
    return Calibration(peak_flops_per_s=machine.core_flops_per_s, cores=machine.cores, operator_s=machine.operator_s,
                       barrier_s=machine.barrier_s)


def routing_of(calibration: Calibration, model: ModelConfig) -> Routing:
    """That run's, where its experts are as many; else balanced."""
    same = calibration.counts and len(calibration.counts[0]) == model.n_routed_experts
    return Routing(calibration.run, calibration.counts) if same else Routing()


def _threads(cores: int, ranks: int) -> int:
    return max(1, cores // ranks)
