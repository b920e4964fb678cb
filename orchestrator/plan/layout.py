"""Which rank holds what: degrees, coordinates, stages and experts, as arithmetic. No processes, no torch.

Ranks are ordered pipeline-major, then data-parallel; inside a data-parallel group the expert-parallel ranks are
consecutive, so that an expert group stays inside a node where one can hold it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from model.config import ModelConfig, divisors
from orchestrator.config import Config, Schedule, TrainConfig
from orchestrator.errors import BadRequest, require
from orchestrator.plan.hardware import check_hardware

V_SCHEDULES = (Schedule.zbv, Schedule.dualpipev)
LOOPED_SCHEDULES = (Schedule.interleaved_1f1b, Schedule.interleaved_zero_bubble)
SPLIT_BACKWARD = (Schedule.interleaved_zero_bubble, Schedule.zbv, Schedule.dualpipev)


@dataclass(frozen=True)
class Coordinate:
    """Where a rank stands on each axis; `edp` counts the replicas of an expert shard."""

    pp: int
    dp: int
    edp: int
    ep: int


@dataclass(frozen=True)
class Layout:
    """Degrees of the rank grid: pp x dp ranks, ep dividing dp in the expert layers (MoE parallel folding)."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    ep_per_node: int = 0
    """Consecutive ranks of an expert group that make a node; 0: nodes do not matter."""

    @property
    def world_size(self) -> int:
        return self.pp * self.dp

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp // self.ep

    def coordinate(self, rank: int) -> Coordinate:
        pp, dp = divmod(rank, self.dp)
        edp, ep = divmod(dp, self.ep)
        return Coordinate(pp, dp, edp, ep)

    def rank(self, pp: int, dp: int) -> int:
        return pp * self.dp + dp

    def experts_of(self, rank: int, n_routed_experts: int) -> range:
        """Global indices of the routed experts that `rank` holds in each of its MoE layers."""
        share = n_routed_experts // self.ep
        first = self.coordinate(rank).ep * share
        return range(first, first + share)


def layout_of(config: Config) -> Layout:
    return Layout(config.layout.pp, config.layout.dp, config.layout.ep, config.layout.ep_per_node)


def stages_per_rank(schedule: Schedule, requested: int) -> int:
    """Virtual stages of a rank: V schedules have two, looped ones what is asked for, the others one."""
    if schedule in V_SCHEDULES:
        return 2
    return requested if schedule in LOOPED_SCHEDULES else 1


def stages_of(pp_rank: int, pp: int, schedule: Schedule, requested: int = 2) -> list[int]:
    """Stages that a pipeline rank runs. A V schedule folds the pipeline, so that rank 0 has the first and the last."""
    if schedule in V_SCHEDULES:
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return [pp_rank + pp * i for i in range(stages_per_rank(schedule, requested))]


def num_stages(config: Config) -> int:
    if config.layout.pp == 1:
        return 1
    return config.layout.pp * stages_per_rank(config.layout.schedule, config.layout.stages_per_rank)


@lru_cache
def _costs(model: ModelConfig, seq_len: int) -> tuple[float, ...]:
    from model.count import head_flops, layer_flops, mtp_flops

    costs = [float(layer_flops(model, layer, seq_len)) for layer in range(model.n_layers)]
    costs[-1] += head_flops(model) + mtp_flops(model, seq_len)
    return tuple(costs)


def split_stages(model: ModelConfig, stages: int, seq_len: int) -> list[range]:
    """Contiguous layers per stage, the largest stage as cheap as can be (then the earlier stages as full as can be).

    Costs are forward FLOPs per token: final head and MTP count on the last layer.
    Every stage holds at least one layer.
    """
    return list(_split(model, seq_len, stages))


@lru_cache(maxsize=256)
def _split(model: ModelConfig, seq_len: int, stages: int) -> tuple[range, ...]:
    costs = _costs(model, seq_len)
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    total = len(costs)
    best = {(0, 0): (0.0, 0)}
    for stage in range(1, stages + 1):
        for end in range(stage, total - (stages - stage) + 1):
            best[stage, end] = min((max(best[stage - 1, start][0], prefix[end] - prefix[start]), start)
                                   for start in range(stage - 1, end) if (stage - 1, start) in best)
    ranges, end = [], total
    for stage in range(stages, 0, -1):
        start = best[stage, end][1]
        ranges.append(range(start, end))
        end = start
    return tuple(ranges[::-1])


def check_run(config: Config) -> None:
    """Every rule that joins several keys of a train request; `BadRequest` names key, value, rule and remedy."""
    try:
        config.model.check()
    except ValueError as error:
        raise BadRequest(str(error)) from None
    _check_numbers(config)
    _check_degrees(config)
    _check_schedule(config)
    _check_batch(config)


MOST = 2**31 - 1
"""Of any whole number: more is a slip of the keyboard, and would be counted to."""
MOST_RANKS = 2**20


def check_least(config: Config) -> None:
    """Of numbers that a plan reads, too: none is too small to mean anything, or too large to be meant."""
    train, cluster = config.train, config.cluster
    _least([
        ("train.batch_size", train.batch_size, 1), ("train.seq_len", train.seq_len, 1),
        ("train.batch_start", train.batch_start, 0), ("train.batch_ramp_steps", train.batch_ramp_steps, 0),
        ("train.validate_every", train.validate_every, 0), ("train.validate_sequences", train.validate_sequences, 1),
        ("cluster.nodes", cluster.nodes, 0), ("cluster.ranks_per_node", cluster.ranks_per_node, 0),
    ])


def _least(numbers: Iterable[tuple[str, float, float]]) -> None:
    for key, value, low in numbers:
        require(value >= low, key, value, f"must be at least {low}", f"use {low} or more")
        require(value <= MOST, key, value, f"must be at most {MOST:,}", "give a smaller number")


def _check_numbers(config: Config) -> None:
    train, optim = config.train, config.optim
    check_least(config)
    _least([
        ("seed", config.seed, 0), ("train.steps", train.steps, 1), ("train.max_bad_steps", train.max_bad_steps, 1),
        ("train.spike_sigmas", train.spike_sigmas, 0), ("train.spike_window", train.spike_window, 3),
        ("layout.pp", config.layout.pp, 1), ("layout.dp", config.layout.dp, 1), ("layout.ep", config.layout.ep, 1),
        ("layout.ep_per_node", config.layout.ep_per_node, 0),
        ("layout.microbatches", config.layout.microbatches, 1),
        ("layout.stages_per_rank", config.layout.stages_per_rank, 1),
        ("checkpoint.keep", config.checkpoint.keep, 0), ("checkpoint.max_failures", config.checkpoint.max_failures, 0),
        ("optim.warmup_steps", optim.warmup_steps, 0), ("optim.weight_decay", optim.weight_decay, 0),
        ("optim.clip_norm", optim.clip_norm, 0),
        ("cluster.threads_per_rank", config.cluster.threads_per_rank, 0),
        ("cluster.spares", config.cluster.spares, 0), ("cluster.min_ranks", config.cluster.min_ranks, 0),
        ("cluster.join_timeout_s", config.cluster.join_timeout_s, 0),
        *((f"cluster.resources.{name}", number, 0) for name, number in config.cluster.resources.items()),
        ("checkpoint.memory_every", config.checkpoint.memory_every, 0),
    ])
    ranks = config.layout.world_size
    require(ranks <= MOST_RANKS, "layout.dp", config.layout.dp, f"makes {ranks:,} ranks with layout.pp="
            f"{config.layout.pp}, and there may be {MOST_RANKS:,}", "use fewer")
    every = config.checkpoint.every
    require(every == "auto" or isinstance(every, int) and every >= 0, "checkpoint.every", every,
            "must be auto or a number of steps, at least 0", "use auto, or 0 for only at the end")
    for key, value in [("optim.lr", optim.lr), ("optim.eps", optim.eps),
                       ("cluster.mtbf_hours_per_device", config.cluster.mtbf_hours_per_device),
                       ("cluster.start_timeout_s", config.cluster.start_timeout_s),
                       ("cluster.step_timeout_s", config.cluster.step_timeout_s),
                       ("cluster.save_timeout_s", config.cluster.save_timeout_s),
                       ("cluster.replace_timeout_s", config.cluster.replace_timeout_s)]:
        require(0 < value < math.inf, key, value, "must be positive and finite", "give a positive number")
    for key, value in [("optim.min_lr_ratio", optim.min_lr_ratio), ("optim.decay_fraction", optim.decay_fraction)]:
        require(0 <= value <= 1, key, value, "must lie between 0 and 1", "give a fraction")
    for key, value in [("optim.beta1", optim.beta1), ("optim.beta2", optim.beta2),
                       ("data.validation_fraction", config.data.validation_fraction)]:
        require(0 <= value < 1, key, value, "must lie between 0 and 1, 1 excluded", "give a fraction")
    require(train.seq_len <= config.model.max_seq_len, "train.seq_len", train.seq_len,
            f"must not exceed model.max_seq_len={config.model.max_seq_len}", "shorten it or raise model.max_seq_len")
    require(config.data.kind.name != "text" or config.data.path.strip() != "", "data.path", "''",
            "must name text for data.kind=text", "use data.path='/corpus/*.txt', or data=stdlib")
    parts, weights = len(config.data.parts), config.data.weights
    require(not weights or len(weights) == parts and all(0 < each < math.inf for each in weights), "data.weights",
            weights, f"must be a positive number for each of the {parts} parts of data.path={config.data.path}",
            f"use data.weights=[{','.join(['1'] * parts)}], or leave it out")
    budget = config.budget.max_usd
    require(budget is None or 0 < budget < math.inf, "budget.max_usd", budget, "must be positive and finite",
            "give dollars, or leave it out")
    check_hardware(config.hardware)
    price = config.hardware.usd_per_h
    require(budget is None or price is not None or config.hardware.name == "auto", "budget.max_usd", budget,
            f"needs a price, and hardware {config.hardware.name} has none", "set hardware.usd_per_h")


def _check_degrees(config: Config) -> None:
    layout, model = config.layout, config.model
    require(layout.dp % layout.ep == 0, "layout.ep", layout.ep, f"must divide layout.dp={layout.dp}",
            f"use one of {divisors(layout.dp)}, or raise layout.dp")
    if layout.ep > 1:
        require(model.n_routed_experts > 0, "layout.ep", layout.ep, "needs experts, and the model is dense", "use 1")
        require(model.n_routed_experts % layout.ep == 0, "layout.ep", layout.ep,
                f"must divide model.n_routed_experts={model.n_routed_experts}",
                f"use one of {divisors(model.n_routed_experts)}")
    require(layout.ep % (layout.ep_per_node or 1) == 0, "layout.ep_per_node", layout.ep_per_node,
            f"must divide layout.ep={layout.ep}", f"use one of {divisors(layout.ep)}, or 0")
    nodes, per_node = config.cluster.nodes, config.cluster.ranks_per_node
    part = layout.ep_per_node
    require(not part or suits_machines(part, per_node), "layout.ep_per_node", part,
            f"must divide cluster.ranks_per_node={per_node}, or be so many whole machines of one NVLink domain",
            f"use {math.gcd(per_node, layout.ep)}, or 0")
    ranks = layout.world_size
    require(config.cluster.min_ranks <= ranks, "cluster.min_ranks", config.cluster.min_ranks,
            f"must not exceed the {ranks} ranks of the layout", f"use at most {ranks}, or 0")
    if nodes and per_node:
        require(nodes * per_node == ranks, "cluster.nodes", nodes,
                f"times cluster.ranks_per_node={per_node} must equal the {ranks} ranks of layout.pp={layout.pp} x "
                f"layout.dp={layout.dp}", f"use layout.dp={max(1, nodes * per_node // layout.pp)} or other nodes")
    elif nodes or per_node:
        key, value = ("cluster.nodes", nodes) if nodes else ("cluster.ranks_per_node", per_node)
        require(ranks % value == 0, key, value, f"must divide the {ranks} ranks of the layout",
                f"use one of {divisors(ranks)}")


def suits_machines(part: int, per_machine: int) -> bool:
    """Whether so many ranks of an expert group divide a machine's, or are whole machines. 0 of a machine: unknown."""
    return not per_machine or math.gcd(part, per_machine) in (part, per_machine)


def _check_schedule(config: Config) -> None:
    layout = config.layout
    stages, layers, micro, pp = num_stages(config), config.model.n_layers, layout.microbatches, layout.pp
    name = layout.schedule.name
    check_stages_per_rank(layout.schedule, layout.stages_per_rank)
    require(stages <= layers, "layout.pp", pp,
            f"makes {stages} stages with layout.schedule={name}, more than model.n_layers={layers}",
            "lower layout.pp or layout.stages_per_rank, or use more layers")
    if pp == 1:
        return
    if layout.schedule in (Schedule["1f1b"], Schedule.zbv, Schedule.dualpipev):
        require(micro >= stages, "layout.microbatches", micro,
                f"must be at least the {stages} stages of layout.schedule={name}", f"use {stages} or more")
    if layout.schedule in LOOPED_SCHEDULES:
        rounds = max(1, micro // pp)
        require(micro % rounds == 0 and micro >= pp, "layout.microbatches", micro,
                f"must be a multiple of layout.pp={pp} with layout.schedule={name}", f"use {max(1, rounds) * pp}")
    if config.layout.recompute.name == "full":
        require(layout.schedule not in SPLIT_BACKWARD, "layout.recompute", "full",
                f"does not go with the split backward of layout.schedule={name}",
                "use recompute=none, or gpipe, 1f1b or interleaved_1f1b")


def check_stages_per_rank(schedule: Schedule, stages: int) -> None:
    """`BadRequest` where a looped schedule has nothing to loop over."""
    require(schedule not in LOOPED_SCHEDULES or stages >= 2, "layout.stages_per_rank", stages,
            f"must be at least 2 with layout.schedule={schedule.name}", "use 2, or schedule 1f1b")


def _check_batch(config: Config) -> None:
    train, layout = config.train, config.layout
    quantum = layout.dp * layout.microbatches
    product = f"layout.dp x layout.microbatches = {layout.dp} x {layout.microbatches}"
    require(train.batch_size % quantum == 0, "train.batch_size", train.batch_size, f"must be a multiple of {product}",
            f"use {_multiples(train.batch_size, quantum)}")
    check_ramp(train)
    wrong = ramp_fault(train.batch_start, train.batch_size, quantum, product)
    require(wrong is None, "train.batch_start", train.batch_start, *(wrong or ("", "")))
    require(train.validate_sequences % quantum == 0, "train.validate_sequences", train.validate_sequences,
            f"must be a multiple of layout.dp x layout.microbatches = {quantum}",
            f"use {(train.validate_sequences // quantum + 1) * quantum}")


def check_ramp(train: TrainConfig) -> None:
    """One of its two keys alone would be passed over."""
    for key, value, other, given in [
        ("train.batch_start", train.batch_start, "train.batch_ramp_steps", train.batch_ramp_steps),
        ("train.batch_ramp_steps", train.batch_ramp_steps, "train.batch_start", train.batch_start),
    ]:
        require(not value or given > 0, key, value, f"makes a ramp only with {other}", "give both, or neither")


def ramp_fault(start: int, batch_size: int, quantum: int, product: str) -> tuple[str, str] | None:
    """The rule that a ramp from `start` sequences a step breaks, and a remedy; None if it breaks none, or is none.

    quantum: what a step's sequences are cut into, by `product`. `train` has all its microbatches from the first step
    on; a plan also prices a ramp over which a replica has fewer of them.
    """
    if start > batch_size:
        return f"must not exceed train.batch_size={batch_size}", "start smaller"
    if start % quantum:
        return f"must be a multiple of {product}", f"use {_multiples(start, quantum)}"
    return None


def _multiples(value: int, quantum: int) -> str:
    """The nearest ones."""
    below = value // quantum * quantum
    return f"{below} or {below + quantum}" if below else f"{quantum}"


def batch_size_at(step: int, train: TrainConfig) -> int:
    """Sequences of step `step` (from 0). A ramp grows linearly in multiples of `batch_start`, whatever the layout."""
    if not train.batch_start or step >= train.batch_ramp_steps:
        return train.batch_size
    grown = train.batch_start + (train.batch_size - train.batch_start) * step // train.batch_ramp_steps
    return grown // train.batch_start * train.batch_start


def ramp_parts(train: TrainConfig) -> Iterator[tuple[int, int]]:
    """Steps, and sequences of each, while `batch_size_at` stays the same, in order up to the ramp's end."""
    step, end = 0, train.batch_ramp_steps if train.batch_start else 0
    while step < end:
        sequences, growth = batch_size_at(step, train), train.batch_size - train.batch_start
        until = min(end, -(-sequences * end // growth)) if growth > 0 else end
        yield until - step, sequences
        step = until
