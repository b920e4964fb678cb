"""Every key a run understands, typed, with units; no torch, no OmegaConf outside `register`.

Hydra composes `conf/` into these dataclasses in `__main__`; everywhere else a `Config` is plain data.
`from_dict` rebuilds one from a run directory's `config.yaml` where Hydra is not installed.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from model.config import ModelConfig
from orchestrator.choices import (
    ComputeDtype,
    DataKind,
    LRSchedule,
    OnSpike,
    Recompute,
    Schedule,
    WandbMode,
)
from orchestrator.config_cluster import ClusterConfig, LaunchConfig


@dataclass
class RunConfig:
    name: str = "run"
    """Letters, digits, dot, dash, underscore."""
    dir: str | None = None
    """Run directory, any fsspec URL; default `runs/<name>-<time>`."""
    calibrate: str | None = None
    """A finished run whose measured parts and routing this one's forecast starts from; none is the formula alone."""


@dataclass
class TrainConfig:
    steps: int = 100
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Sequences per step, over all data-parallel ranks."""
    batch_start: int = 0
    """Sequences per step at the start of a ramp; 0 is no ramp (V3 report, section 4.2)."""
    batch_ramp_steps: int = 0
    """Steps over which the batch grows from `batch_start` to `batch_size`."""
    seq_len: int = 256
    """Tokens per sequence."""
    validate_every: int = 50
    """Steps between validations; 0 is only at the end."""
    validate_sequences: int = 64
    """Sequences per validation."""
    max_bad_steps: int = 10
    """Consecutive steps skipped by all ranks (non-finite, or a loss spike) after which the run stops, exit code 17."""
    spike_sigmas: float = 0.0
    """A loss is a spike if it lies so many robust standard deviations above the recent median; 0 is never."""
    spike_window: int = 64
    """Recent steps that a loss is judged by; none is judged before there are so many."""
    on_spike: OnSpike = OnSpike.skip
    """What follows a loss spike or a non-finite step. A step that led to a rollback once is only skipped afterwards."""


@dataclass
class LayoutConfig:
    """Ranks = pp x dp. Expert-parallel groups lie inside the data-parallel ranks: ep divides dp."""

    pp: int = 1
    """Pipeline-parallel degree."""
    dp: int = 1
    """Data-parallel degree."""
    ep: int = 1
    """Expert-parallel degree."""
    ep_per_node: int = 0
    """Consecutive ranks of an expert group that share a node, or an NVLink domain of several machines. With it a token
    crosses to each node once and goes on to its experts' ranks from there; 0: a copy for each of its experts, straight
    to their ranks."""
    schedule: Schedule = Schedule["1f1b"]
    """Order in which the stages of a pipeline take their microbatches."""
    microbatches: int = 1
    """Parts a data-parallel rank's share of the batch is cut into."""
    stages_per_rank: int = 2
    """Virtual stages of a rank under the interleaved schedules; V schedules use 2, the others 1."""
    recompute: Recompute = Recompute.none
    """What backward computes a second time, to hold less in memory."""
    overlap: bool = True
    """dualpipev runs the forward and the backward of a pair at once, exchanges of one beside computation of the other;
    false: in turn, with the same results."""

    @property
    def world_size(self) -> int:
        return self.pp * self.dp


def parts_of(path: str) -> list[str]:
    """Globs between commas."""
    return [part for part in map(str.strip, path.split(",")) if part]


@dataclass
class DataConfig:
    kind: DataKind = DataKind.text
    """`text` is read from `path`; `random` tokens measure speed."""
    path: str = "stdlib"
    """fsspec glob(s), comma separated, of plain text, .jsonl or .parquet; `stdlib` is the running Python's library
    source."""
    weights: list[float] = field(default_factory=list)
    """Shares of the sequences, one for each part of `path` between commas; none: all files are one row of tokens."""
    text_key: str = "text"
    """Field that holds the text in JSONL and Parquet."""
    tokenizer: str = "byte"
    """`byte`, or the path of a Hugging Face `tokenizer.json`."""
    cache_dir: str = "~/.cache/sparing/tokens"
    """Where token shards are kept, keyed by content."""
    validation_fraction: float = 0.05
    """Share of the documents held out."""

    @property
    def parts(self) -> list[str]:
        """What `path` names between its commas."""
        return parts_of(self.path)


@dataclass
class OptimConfig:
    """AdamW; the defaults are those of the V3 report, section 4.2, but for the peak rate."""

    lr: float = 3e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final over peak learning rate."""
    schedule: LRSchedule = LRSchedule.wsd
    """Course of the learning rate."""
    warmup_steps: int = 10
    """Steps over which the rate rises to its peak."""
    decay_fraction: float = 0.3
    """Share of the run that decays (wsd only)."""
    beta1: float = 0.9
    """Share of the first moment that a step keeps."""
    beta2: float = 0.95
    """Of the second."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Share of a matrix taken off per step, times the learning rate; vectors (norms, biases) do not decay."""
    clip_norm: float = 1.0
    """Global gradient norm; 0 is no clipping."""


@dataclass
class PrecisionConfig:
    compute_dtype: ComputeDtype = ComputeDtype.auto
    """Of products and activations."""
    fp8: bool = False
    """Linear layers and experts on FP8 operands, as in the V3 report, section 3.3 (model/fp8.py)."""
    power_of_two_scales: bool = False
    """All FP8 scales are powers of two, not only those of the attention output and of the dispatch."""
    moments: ComputeDtype = ComputeDtype.fp32
    """What the optimizer's moments rest in; steps are computed in fp32."""


@dataclass
class CheckpointConfig:
    dir: str | None = None
    """Any fsspec URL; default `<run.dir>/checkpoints`."""
    every: int | str = "auto"
    """Steps between checkpoints; 0 is only at the end, `auto` the interval that loses least (Young/Daly) for the
    observed cost of a save and `cluster.mtbf_hours_per_device`."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    background: bool = True
    """Write while training goes on."""
    max_failures: int = 5
    """Failed saves in a row after which the run ends; 0 is never."""
    memory_every: int = 20
    """Steps between copies of each rank's state into its own host memory and a buddy's, from which the others go on
    when a rank is replaced; 0 is none."""


@dataclass
class TrackerConfig:
    """metrics.jsonl and events.jsonl are always written."""

    wandb: WandbMode = WandbMode.offline
    """Weights & Biases beside them."""
    project: str = "sparing"
    """Of W&B, like the rest."""
    entity: str | None = None
    """User or team; none is the default of the API key."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: list[str] = field(default_factory=list)
    """Labels to find the run by."""


@dataclass
class PriceConfig:
    usd_per_h: float | None = None
    """Of one device for one hour; none is not known."""
    source: str = ""
    """Where the price was read."""
    date: str = ""
    """Day the price was read, YYYY-MM-DD."""


@dataclass
class HardwareConfig:
    """One device. Every figure has a source and a date; nothing here is computed."""

    name: str = "auto"
    """Name of a file in conf/hardware; `auto` picks the one that matches this machine's device."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    match: str = ""
    """Text found in the device's reported name, for `auto`."""
    bf16_tflops: float | None = None
    """Dense peak, 1e12 FLOP/s; none is measured at start (a GEMM in the compute dtype)."""
    fp32_tflops: float | None = None
    """Dense peak, likewise."""
    fp8_tflops: float | None = None
    """Dense peak, without sparsity; none has no FP8."""
    memory_gib: float | None = None
    """Of one device, in all, 2^30 bytes."""
    memory_gb_per_s: float | None = None
    """From the device's memory, 1e9 bytes/s."""
    scale_up_devices: int = 8
    """Devices of one scale-up domain (NVLink)."""
    scale_up_gb_per_s: float | None = None
    """Of one device to its domain, one direction, 1e9 bytes/s."""
    peer_gb_per_s: float | None = None
    """Of it to each other device, where no switch lies between them."""
    scale_out_gb_per_s: float | None = None
    """Of one device to other nodes, one direction, 1e9 bytes/s."""
    bf16_best_tflops: float | None = None
    """Best matrix product that anyone measured."""
    fp8_best_tflops: float | None = None
    """Likewise in FP8."""
    fp4_best_tflops: float | None = None
    """Likewise in FP4."""
    gemm_share: float | None = None
    """Share of the best product that a model's large ones reach, fitted to published runs; none takes the planner's
    assumption."""
    attention_share: float | None = None
    """Share of the bf16 peak that the attention core's forward reaches, measured or fitted likewise."""
    multiprocessors: int | None = None
    """SMs or compute units; a product's last wave fills only some of them."""
    watts: float | None = None
    """Of one device at full load, by its data sheet."""
    usd_per_h: float | None = None
    """Price of one device for one hour; none is shown as unknown, never as 0."""
    market: str = "on_demand"
    """What `usd_per_h` is paid for: `on_demand`, `reserved` or `spot`."""
    source: str = ""
    """Where the price was read."""
    date: str = ""
    """Day the price was read, YYYY-MM-DD."""
    reserved: PriceConfig = field(default_factory=PriceConfig)
    """Under a contract; `plan market=reserved` takes it."""
    spot: PriceConfig = field(default_factory=PriceConfig)
    """Preemptible; `plan market=spot` takes it, and charges no preemption."""


@dataclass
class BudgetConfig:
    max_usd: float | None = None
    """The run ends with a checkpoint before it has cost this; none is no limit."""


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    seed: int = 0
    """The one seed; every random stream derives from (seed, purpose, index)."""
    resume: str = "none"
    """`none`, `auto` (the newest whole checkpoint of run.dir, if any), or a checkpoint's path."""


def conf_dir() -> Path:
    """The folder of the shipped YAML files: beside the packages in a checkout, inside the package when installed."""
    here = Path(__file__).resolve().parent
    return next(folder for folder in (here.parent / "conf", here / "conf") if (folder / "config.yaml").exists())


def register() -> None:
    """Tell Hydra the schema: `base_config`, and `base_<group>` in every group."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    for key, hint in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            store.store(group=key, name=f"base_{key}", node=hint)


def to_dict(config: object) -> object:
    """Plain dicts, lists and scalars (enums by name): what `config.yaml` holds."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, list):
        return [to_dict(item) for item in config]
    return config


def from_dict(kind: type, values: dict, path: str = ""):
    """The dataclass `kind` from `to_dict`'s output; `ValueError` for a key that it does not have."""
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise ValueError(f"{path}{key}: unknown key" + (f"; did you mean {path}{near[0]}?" if near else ""))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, f"{path}{key}.")
        elif isinstance(hint, type) and issubclass(hint, Enum):
            if value not in hint.__members__:
                raise ValueError(f"{path}{key}={value}: must be one of {', '.join(hint.__members__)}")
            value = hint[value]
        elif typing.get_origin(hint) is tuple:
            value = tuple(value)
        arguments[key] = value
    return kind(**arguments)
