"""The keys of `config.py` that say where ranks live: on which nodes, and who gets the job. They change no number."""

from dataclasses import dataclass, field

from orchestrator.choices import ClusterKind, LaunchKind


@dataclass
class ClusterConfig:
    kind: ClusterKind = ClusterKind.auto
    """The Ray to run on."""
    nodes: int = 0
    """Nodes; 0 derives them from the layout. Under `local` they are simulated."""
    ranks_per_node: int = 0
    """Ranks of a node; 0 puts all on one node (local) or one per device (ray)."""
    threads_per_rank: int = 0
    """CPU threads of a rank; 0 shares the machine's cores out evenly."""
    resources: dict[str, float] = field(default_factory=dict)
    """Of Ray's custom resources, what every rank takes beside its device, as in {rack1: 1}."""
    join_timeout_s: float = 0.0
    """Longest wait for a Ray cluster's head to answer and its nodes to join before what is missing is said."""
    start_timeout_s: float = 120.0
    """Longest wait for the ranks to be placed and connected."""
    step_timeout_s: float = 600.0
    """Longest wait for one step, also the process group's timeout."""
    save_timeout_s: float = 600.0
    """Longest time that ranks may stand still for a checkpoint."""
    spares: int = 0
    """Warm ranks kept ready beside the others: a lost rank is replaced in seconds. Charged like the others."""
    mtbf_hours_per_device: float = 50_000.0
    """Mean time between failures of one device. Llama 3 405B had 419 unexpected interruptions in 54 days on 16,384 GPUs
    (Llama team 2024, section 3.3.4); a run's own rate counts once it is higher."""
    replace_timeout_s: float = 60.0
    """Longest wait for the place of a lost rank; afterwards the run goes on with fewer (`min_ranks`) or ends."""
    min_ranks: int = 0
    """A run that finds no place for lost ranks goes on with a smaller data-parallel degree, down to this many ranks,
    and grows back when there is room; 0 keeps the layout."""


@dataclass
class LaunchConfig:
    kind: LaunchKind = LaunchKind.local
    """Who gets the job."""
    dry_run: bool = False
    """Print the filled manifest and submit nothing."""
    address: str | None = None
    """ray_job: the cluster's dashboard, default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265. torchrun on several
    nodes: the rendezvous, host:port of one of them."""
    allow_insecure: bool = False
    """Submit to a dashboard on another machine although it lets anyone in."""
    install: bool = False
    """ray_job: have Ray install the pinned packages for this job on every node."""
    image: str | None = None
    """kuberay: the container image that `deploy/Dockerfile` makes."""
    hours: float = 24.0
    """slurm: the time limit; a run saves before it and is queued again. kuberay: counted from creation, a mere cut."""
    restarts: int = 3
    """slurm, kuberay, skypilot: how often a run that failed in passing (exit code 33) is started again."""
