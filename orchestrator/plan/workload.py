"""What is to be predicted: a model, its layout, a device, and the shares of its data sheet that kernels reach."""

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from model import count
from model.config import ModelConfig
from orchestrator.config import HardwareConfig, Recompute, Schedule
from orchestrator.plan.keeping import PLANNED, Keeping
from orchestrator.plan.layout import LOOPED_SCHEDULES, SPLIT_BACKWARD, V_SCHEDULES, split_stages, stages_per_rank
from orchestrator.plan.schedule import Action, actions, dualpipe
from orchestrator.plan.stack import Stack

SPLIT = [schedule.name for schedule in SPLIT_BACKWARD]
UNSCHEDULED = Schedule["1f1b"].name
"""What a pipeline of one rank goes by."""
PROFILE = "DeepSeek's profile-data trace of V3 training (H800, EP64)"


@dataclass(frozen=True)
class Assumptions:
    """Shares of a data-sheet figure that real kernels reach."""

    gemm: float = 0.85
    """Of the best product measured on the device: large products of a model. Fitted where published runs allow it."""
    best_bf16: float = 0.80
    """Best product against the bf16 peak where nobody measured it: as on H100 (stas00/ml-engineering)."""
    best_fp8: float = 0.71
    """Likewise, of the FP8 peak, or of twice a bf16 peak that the best bf16 product would be `best_bf16` of, if that is
    less: 0 to 11% below what was measured on six devices."""
    fp4_gain: float = 1.7
    """FP4 products against FP8 ones, on devices whose peak doubles."""
    attention_forward: float = 0.65
    """Of the bf16 peak: FlashAttention forward of PROFILE, 1.24 ms a layer on 112 of 132 multiprocessors."""
    attention_backward: float = 0.84
    """Of the forward's share: 3.7 ms a layer for 2.5 times the FLOPs."""
    memory: float = 0.80
    """Of memory bandwidth."""
    inner: float = 256.0
    """Inner size of a bf16 product at which half of the rate is lost; twice that at twice the rate."""
    core_ramp: float = 512.0
    """Sequence length at which half of the attention core's rate is lost."""
    flash2: float = 0.5
    """FlashAttention-2 against what Hopper and later devices reach with asynchronous products (its authors: 0.35 of
    the peak against 0.75)."""
    triton: float = 0.35
    """FlashAttention's first version in Triton, likewise. Of rows with set=fit, as there is no other figure."""
    operators: float = 25.0
    """Launches of one block's forward; backward has twice as many."""
    operators_moe: float = 60.0
    """Those that routing, permutation and dispatch add."""
    moe_light: float = 2.0
    """Bytes that permutation and expert activations move against the least possible: padding, indices, weights."""
    gap_s: float = 1.5e-6
    """Device idle between two operators."""
    host_s: float = 15e-6
    """Host time of one operator's launch, its Python included; the device waits where its operators are shorter. Of
    rows with set=fit: of 5, 10, 12, 15 and 20, the one whose left-out models are met best."""
    communication_sms: float = 20.0
    """Multiprocessors that an overlapped all-to-all takes from computation (V3 report, section 3.2.2)."""
    network: float = 0.80
    """Of link bandwidth, alone: 160 of 200 and 40 of 50 GB/s (V3 report, section 3.2)."""
    few_ranks: float = 1.06
    """What so many ranks lose of a scale-up link, over their number squared: 0.73 of eight ranks' rate with two, 0.93
    with four, on A100, H100 and B200 alike (aiconfigurator's NCCL tables, all-gather of 128 and 256 MiB)."""
    network_overlapped: float = 0.45
    """Of link bandwidth while computing on the same device (dispatch and combine of PROFILE)."""
    overlap_cost: float = 1.09
    """An overlapped pair against the longer of its computation and its communication: 32.25 of 29.5 ms in PROFILE."""
    behind: float = 0.9
    """Share of weight gathering (ZeRO 3) that costs nothing while there is computation to hide it behind."""
    latency_s: float = 10e-6
    """Of one collective between devices, as aiconfigurator's tables have for a send."""
    hop_s: float = 3e-6
    """Of each further device of a ring (NVLink 3.3 us, InfiniBand 2.8 to 3.7: ISCA paper, table 5)."""
    exchange_s: float = 10e-6
    """Of one all-to-all beyond its bytes: a send's latency, as in aiconfigurator's tables."""
    bucket_s: float = 0.0
    """Of gathering or reducing one block's parameters over replicas beyond its bytes."""
    crowded: float = 1.0
    """Speed of ranks that share a core against those that have it in turn."""
    usable_memory: float = 0.96
    """Of a device's memory; the rest is fragmentation of the allocator. An assumption."""


@dataclass(frozen=True)
class Calibration:
    """What one run measured over what was predicted of it (`forecast.calibrate`); all 1 is the formula as it stands."""

    forward_backward: float = 1.0
    optimizer: float = 1.0
    peak_flops_per_s: float | None = None
    """That run's measured GEMM, of a rank with a core of its own; only a CPU's counts."""
    cores: int = 0
    """Of that run's machine, which its ranks share; 0 on GPUs."""
    operator_s: float | None = None
    """That machine's, as `forecast.Machine` has them."""
    barrier_s: float | None = None
    counts: tuple[tuple[float, ...], ...] = ()
    """That run's tokens per expert, of each layer and step that was counted."""
    run: str = ""
    model: str = ""
    hardware: str = ""
    stack: Stack | None = None
    """What that run was predicted with before, which its figures are over."""


@dataclass(frozen=True)
class Workload:
    """What is trained, how it is laid out, and on what."""

    model: ModelConfig
    hardware: HardwareConfig
    seq_len: int
    batch_size: int
    """Sequences per step."""
    pp: int
    dp: int
    ep: int
    schedule: str
    """Name of a `Schedule`, or `dualpipe`."""
    microbatches: int
    stages_per_rank: int = 2
    recompute: Recompute = Recompute.none
    tp: int = 1
    """Tensor parallelism, with sequence parallelism; its ranks share a microbatch's tokens."""
    cp: int = 1
    """Context parallelism: ranks that share a sequence."""
    zero: int = 1
    """ZeRO stage: 1 shards optimizer state over the data-parallel ranks, 2 gradients too, 3 weights too."""
    dtype: str = "bf16"
    """`bf16`, `fp8` or `fp4`: of the layers' products; attention core, head and router are bf16 always."""
    etp: int = 1
    """Tensor parallelism inside an expert."""
    even_stages: bool = False
    """Stages have equally many layers where these go into them, as others' runs do, rather than balanced costs."""
    imbalance: float = 1.0
    """Load of the fullest expert-parallel rank over the mean (`exchange.imbalance_of`); 1 is forced balance."""
    attended: float = 1.0
    """Of a causal attention's work: sliding windows in some layers leave less."""
    stack: Stack = Stack()
    """The software that trains."""
    keeping: Keeping = PLANNED
    """What the training program keeps in memory."""
    assumptions: Assumptions = field(default_factory=Assumptions)
    calibration: Calibration = Calibration()

    @property
    def devices(self) -> int:
        return self.pp * self.dp * self.tp * self.cp

    @property
    def cores(self) -> int:
        """That all ranks share (a CPU's); 0 where each has a device of its own."""
        return self.calibration.cores

    @property
    def crowding(self) -> float:
        """Ranks to a core where they are more than there are, else 1."""
        return max(1.0, self.devices / self.cores) if self.cores else 1.0

    @property
    def felt_imbalance(self) -> float:
        """How much longer experts take: of ranks that share cores, one that waits for the fullest leaves its core to
        others."""
        return max(1.0, self.imbalance / self.crowding)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense parameters and reduce their gradients together."""
        return self.dp * self.cp * self.copies

    @property
    def copies(self) -> int:
        """Of each stage in one pipeline: DualPipe runs it from both ends."""
        return 2 if self.schedule == "dualpipe" and self.pp > 1 else 1

    @property
    def expert_replicas(self) -> int:
        """The same for a routed expert's; expert parallelism spans data, context and tensor ranks."""
        return max(1, self.dp * self.cp * self.tp // (self.ep * self.etp)) * self.copies

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one microbatch on one tensor-parallel group."""
        return self.batch_size * self.seq_len // (self.dp * self.cp * self.microbatches)


MOST_MICROBATCHES = 4096
"""Of a step: no published run has a third of it, and each costs the clock time and memory."""


def illegal(work: Workload) -> str | None:
    """Why the schedule cannot run this, or nobody would; None if it can."""
    pp, micro = work.pp, work.microbatches
    if micro > MOST_MICROBATCHES:
        return f"{micro:,} microbatches a step, more than the {MOST_MICROBATCHES:,} that are planned for"
    if pp == 1:
        return None
    if work.schedule == "dualpipe":
        stages = pp
        if pp % 2 or micro % 2 or micro < 2 * pp:
            return f"dualpipe wants even ranks and an even number of at least {2 * pp} microbatches, not {micro}"
    else:
        schedule = Schedule[work.schedule]
        stages = pp * stages_per_rank(schedule, work.stages_per_rank)
        least = stages if schedule is Schedule["1f1b"] or schedule in V_SCHEDULES else pp
        if micro < least:
            return f"{work.schedule} wants at least {least} microbatches, not {micro}"
        if schedule in LOOPED_SCHEDULES and micro % max(1, micro // pp):
            return f"{work.schedule} wants microbatches in equal rounds of {pp} ranks, not {micro}"
    if work.schedule in (*SPLIT, "dualpipe") and work.recompute is Recompute.full:
        return f"{work.schedule} wants no recompute: its split backward cannot go with it"
    if stages > work.model.n_layers:
        return f"{stages} stages for {work.model.n_layers} layers"
    return None


def pipeline_of(work: Workload) -> tuple[list[range], list, int]:
    """Layers of every stage, the table, and how many copies of the pipeline it holds."""
    ranges = stage_layers(work)
    if work.pp == 1:
        return ranges, [[(Action(kind, 0, micro),) for micro in range(work.microbatches) for kind in "FB"]], 1
    if work.schedule == "dualpipe":
        return ranges, dualpipe(work.pp, work.microbatches), 2
    table = actions(Schedule[work.schedule], work.pp, work.microbatches, requested_stages=work.stages_per_rank)
    return ranges, table, 1


def stage_layers(work: Workload) -> list[range]:
    """Layers of every stage; DualPipe has every stage twice."""
    stages = work.pp
    if work.pp > 1 and work.copies == 1:
        stages *= stages_per_rank(Schedule[work.schedule], work.stages_per_rank)
    return (work.even_stages and _even(work.model.n_layers, stages)
            or split_stages(work.model, stages, work.seq_len)) * work.copies


def _even(layers: int, stages: int) -> list[range]:
    """As many layers on every stage, or where they do not go into the stages, with embedding and head counted as one
    each (Megatron's account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split); else none."""
    for extra in (0, 2):
        each, rest = divmod(layers + extra, stages)
        if not rest and each >= max(1, extra // 2):
            bounds = [max(0, min(layers, each * stage - extra // 2)) for stage in range(stages + 1)]
            return [range(*pair) for pair in pairwise(bounds)]
    return []


def is_last(work: Workload, stage: int, stages: int) -> bool:
    return stage == stages - 1 or (work.schedule == "dualpipe" and stage == work.pp - 1)


def is_first(work: Workload, stage: int) -> bool:
    return stage == 0 or (work.schedule == "dualpipe" and stage == work.pp)


def _ends_meet(work: Workload) -> bool:
    """Whether the last stage's rank has the first, whose embedding MTP modules use (V3 report, section 3.2.3)."""
    folded = work.schedule == "dualpipe" or Schedule[work.schedule] in V_SCHEDULES
    return work.pp > 1 and folded and not work.keeping.eager


def rank_parameters(work: Workload, ranges: list[range], row: list) -> tuple[float, float]:
    """Parameters on one rank: its share of those outside the routed experts, and of the experts."""
    stages = {action.stage for slot in row for action in slot}
    sizes = [stage_parameters(work, stage, ranges) for stage in stages]
    return sum(dense for dense, _ in sizes), sum(experts for _, experts in sizes)


def stage_parameters(work: Workload, stage: int, ranges: list[range]) -> tuple[float, float]:
    """The same of one stage."""
    return shares(work, *whole_parameters(work, stage, ranges))


def shares(work: Workload, split: float, same: float, routed: float) -> tuple[float, float]:
    """A rank's of parameters that tensor-parallel ranks share, that each of them has, and of the routed experts."""
    return split / work.tp + same, routed / (work.ep * work.etp)


def whole_parameters(work: Workload, stage: int, ranges: list[range]) -> tuple[float, float, float]:
    """Of one stage before they are shared, as `shares` takes them. Its last one has the head and the MTP modules, and
    copies of the embedding for these where the first stage is on another rank, or the program copies it all the same.
    """
    model, first, last = work.model, is_first(work, stage), is_last(work, stage, len(ranges))
    sizes, table = _sizes(model), (model.vocab_size * model.dim, 0, 0)
    moe = sum(model.is_moe(layer) for layer in ranges[stage])
    found = [(moe, sizes.moe), (len(ranges[stage]) - moe, sizes.dense)]
    if first:
        found.append((1, table))
    if last:
        own = not (first and model.tie_embeddings)
        copied = 0 if first or _ends_meet(work) else model.n_mtp_layers
        found += [(own + copied, table), (1, (0, model.dim, 0)), (1, sizes.mtp)]
    split = same = routed = 0
    for number, (cut, kept, experts) in found:
        split, same, routed = split + number * cut, same + number * kept, routed + number * experts
    return split, same, routed


def tables(work: Workload, stage: int, ranges: list[range]) -> tuple[float, float]:
    """Of a stage's parameters outside the routed experts those that are looked up, not multiplied by; and those of its
    heads and MTP projections."""
    model, first, last = work.model, is_first(work, stage), is_last(work, stage, len(ranges))
    table = model.vocab_size * model.dim
    looked_up = 0 if first and last and model.tie_embeddings else table * first
    looked_up += 0 if first or _ends_meet(work) or not last else model.n_mtp_layers * table
    heads = table + model.n_mtp_layers * 2 * model.dim**2 if last else 0
    return looked_up / work.tp, heads / work.tp


def largest_block(work: Workload) -> float:
    """Parameters of the largest block on one rank, without those that no other rank has."""
    sizes = _sizes(work.model)
    found = [shares(work, *size) for size in (sizes.moe, sizes.dense)]
    return max(dense * (work.replicas > 1) + routed * (work.expert_replicas > 1) for dense, routed in found)


@dataclass(frozen=True)
class _Sizes:
    """Parameters of a dense block, of an MoE block and of all MTP modules, as `shares` takes them."""

    dense: tuple[int, int, int]
    moe: tuple[int, int, int]
    mtp: tuple[int, int, int]


@lru_cache(maxsize=64)
def _sizes(model: ModelConfig) -> _Sizes:
    """Norms, routers and MLA's way down to its latents are the same on all tensor-parallel ranks (Megatron-Core)."""
    def sizes(parts: count.Parameters, num_blocks: int) -> tuple[int, int, int]:
        same = parts.norms + parts.router + num_blocks * count.latent_parameters(model)
        return parts.total - same - parts.routed_experts, same, parts.routed_experts

    found = {model.is_moe(layer): sizes(count.layer_parameters(model, layer), 1) for layer in range(model.n_layers)}
    none = 0, 0, 0
    return _Sizes(found.get(False, none), found.get(True, none), sizes(count.mtp_parameters(model), model.n_mtp_layers))
