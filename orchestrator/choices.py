"""The values that a key of `config.py` may take where they are a few names; a member is called what is written."""

from enum import Enum

Schedule = Enum("Schedule", {name: name for name in
                             ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")})
Schedule.__doc__ = "Pipeline schedules by the names of the DualPipe README; executed by torch.distributed.pipelining."


class Recompute(Enum):
    """Whether a block's activations are kept (`none`), computed again in backward (`full`), or only what is cheap to
    compute (`selective`: up-projections of latents, SwiGLU outputs, and norms whose output a product would keep
    whole)."""

    none = "none"
    selective = "selective"
    full = "full"


class LRSchedule(Enum):
    """`wsd`: warm-up, stable, decay. `cosine`: warm-up, then half a cosine."""

    wsd = "wsd"
    cosine = "cosine"


class ComputeDtype(Enum):
    """`auto` is bf16 on GPUs and fp32 on CPUs. Master weights and gradients are fp32 always."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class OnSpike(Enum):
    """`skip`: the step is not applied. `rollback`: back to the newest kept state, and on behind the data since it."""

    skip = "skip"
    rollback = "rollback"


class WandbMode(Enum):
    """`offline` writes into the run directory and needs neither key nor network."""

    off = "off"
    offline = "offline"
    online = "online"


class ClusterKind(Enum):
    """`local`: Ray started on this machine, nodes simulated. `ray`: the Ray cluster this process is in.
    `auto`: the cluster if there is one (a Ray job, or RAY_ADDRESS), else local."""

    auto = "auto"
    local = "local"
    ray = "ray"


class DataKind(Enum):
    text = "text"
    random = "random"


class LaunchKind(Enum):
    """Who gets a run from `sparing launch`; `local` is nobody, which is `sparing train`."""

    local = "local"
    ray_job = "ray_job"
    slurm = "slurm"
    kuberay = "kuberay"
    skypilot = "skypilot"
    torchrun = "torchrun"
