"""The verb `launch`: one manifest of `deploy/` filled for a run, shown or submitted. Submitting is launch_submit.py.

What is filled in is arithmetic over the config and the words of the command line. Of the environment it reads only
RAY_API_SERVER_ADDRESS, the dashboard's address where `launch.address` is not given, so that no secret can get into a
manifest. The same command line in the manifest continues the run (`resume=auto`).
"""

import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.choices import ClusterKind, LaunchKind
from orchestrator.config import Config, conf_dir
from orchestrator.config_cluster import LaunchConfig
from orchestrator.errors import BadRequest

HELP = """\
usage: sparing launch launch=ray_job|slurm|kuberay|skypilot|torchrun [KEY=VALUE ...]

  sparing launch launch=ray_job launch.address=http://HEAD:8265 experiment=tiny run.dir=/shared/runs/tiny
  sparing launch launch=slurm model=mini hardware=h100 layout.dp=16 layout.ep=8 cluster.ranks_per_node=8
  sparing launch launch=kuberay launch.image=IMAGE hardware=h100 ... run.dir=s3://bucket/runs/mine
  sparing launch launch=skypilot hardware=h100 ... run.dir=s3://bucket/runs/mine
  sparing launch launch=torchrun layout.pp=2 layout.microbatches=2

Keys and groups are those of train. Fills a manifest of deploy/, keeps it in runs/, submits it, streams the job's log
and returns its exit code. launch.dry_run=true prints the manifest instead. deploy/README.md says which to use when."""

MANIFESTS = {LaunchKind.ray_job: "ray_job.sh", LaunchKind.slurm: "slurm.sbatch", LaunchKind.kuberay: "kuberay.yaml",
             LaunchKind.skypilot: "skypilot.yaml", LaunchKind.torchrun: "torchrun.sh"}
ASK_FOR_DEVICES = (LaunchKind.slurm, LaunchKind.kuberay, LaunchKind.skypilot)
MOUNTS_NOTHING = (LaunchKind.kuberay, LaunchKind.skypilot)
RUN_ELSEWHERE = (LaunchKind.ray_job, LaunchKind.kuberay, LaunchKind.skypilot)
GPUS_PER_NODE = 8
"""Of any machine that is sold by the node; scale-up domains beyond that are of several."""
CPUS_PER_GPU = 8
"""Asked for beside each GPU, for the host's share of the work."""
GIB_PER_GPU, GIB_PER_CPU = 64, 4
"""Host memory asked for beside each: the program, its batches, copies of its own and a buddy's state. Slurm gives whole
nodes with all they have."""
SKY_NAMES = {"a100": "A100-80GB", "a100_40": "A100", "rtx_3090": "RTX3090", "rtx_4090": "RTX4090",
             "rtx_5090": "RTX5090", "mi300x": "MI300X", "mi325x": "MI325X", "mi355x": "MI355X"}
"""Accelerators as SkyPilot spells them where that is not the upper case of ours."""
SLURM_HOURS = 0.2
"""Least time limit: a run that is told of its end, five minutes before, as it starts is queued again for ever."""
JOIN_TIMEOUT_S = 600
"""How long a run may wait for the nodes of the cluster that its manifest starts."""
PULL_S = 300
"""And KubeRay beside that for the image to be fetched."""
USED_BY = {"launch.address": (LaunchKind.ray_job, LaunchKind.torchrun), "launch.allow_insecure": (LaunchKind.ray_job,),
           "launch.install": (LaunchKind.ray_job,), "launch.image": (LaunchKind.kuberay,),
           "launch.hours": (LaunchKind.slurm, LaunchKind.kuberay), "launch.restarts": ASK_FOR_DEVICES}
ENVIRONMENT = ("torch", "ray", "hydra-core", "omegaconf", "wandb", "fsspec", "s3fs", "grain", "numpy", "rich",
               "safetensors", "tenacity", "tokenizers", "pyarrow")
"""What a node needs to run, as opposed to develop, this program."""


@dataclass(frozen=True)
class Job:
    """A filled manifest and what submitting it needs to know."""

    kind: LaunchKind
    name: str
    manifest: str
    address: str | None = None
    allow_insecure: bool = False

    @property
    def file(self) -> str:
        """Name under which the manifest is kept."""
        return f"{self.name}{Path(MANIFESTS[self.kind]).suffix}"


def run(arguments: list[str]) -> int:
    from orchestrator.compose import compose_config
    from orchestrator.own_files import expanded
    from orchestrator.plan.layout import check_run

    arguments = expanded(arguments)
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise BadRequest(f"{flags[0]}: launch has no flags; {HELP.splitlines()[0]}")
    config = compose_config(arguments)
    check_run(config)
    job = fill(config, arguments, stamp=time.strftime("%Y%m%d-%H%M%S"), python=sys.executable, cwd=Path.cwd())
    if config.launch.dry_run:
        print(job.manifest, end="")
        return 0
    from orchestrator.launch_submit import submit

    return submit(job, Path("runs"))


def fill(config: Config, arguments: list[str], *, stamp: str, python: str, cwd: Path) -> Job:
    """The manifest for this run; `BadRequest` for what a launcher cannot do."""
    launch = config.launch
    _check(config)
    _check_words(arguments, launch)
    run = f"sparing-{re.sub('[^a-z0-9]+', '-', config.run.name.lower())[:20].strip('-')}"
    name = f"{run}-{stamp}"
    nodes, ranks_per_node = _nodes(config)
    gpus = ranks_per_node if config.hardware.device == "cuda" else 0
    root, goes_on = conf_dir().parent, config.resume in ("none", "auto")  # a second start may name no checkpoint
    manifest = _templates().get_template(f"{MANIFESTS[launch.kind]}.j2").render(
        name=name, run=run, nodes=nodes, ranks_per_node=ranks_per_node, gpus=gpus,
        cpus=ranks_per_node * (CPUS_PER_GPU if gpus else 1), accelerator=_accelerator(config.hardware.name),
        gpu_resource="amd.com/gpu" if config.hardware.name.startswith("mi") else "nvidia.com/gpu",
        command=shlex.join(["python", "-m", "orchestrator", "train", *_overrides(config, arguments, stamp, cwd)]),
        root=str(root), cwd=str(cwd), bin=str(Path(python).parent), address=_address(config),
        memory_gib=ranks_per_node * (GIB_PER_GPU if gpus else GIB_PER_CPU), image=launch.image,
        whole_nodes=gpus > 0 and (nodes > 1 or gpus >= GPUS_PER_NODE),
        spare_nodes=bool(config.cluster.spares or config.cluster.min_ranks),
        save_timeout=round(config.cluster.save_timeout_s),
        seconds=round(launch.hours * 3600), pending_seconds=round(
            config.cluster.join_timeout_s or JOIN_TIMEOUT_S) + PULL_S, time_limit=_slurm_time(launch.hours),
        goes_on=goes_on, restarts=launch.restarts if goes_on else 0, ray_version=pinned(root)["ray"],
        packages=[f"{package}=={version}" for package, version in pinned(root).items() if package in ENVIRONMENT]
        if launch.install else [])
    return Job(launch.kind, name, manifest, _address(config), launch.allow_insecure)


def pinned(root: Path) -> dict[str, str]:
    """Versions by package of `constraints.txt`."""
    lines = (root / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def _check(config: Config) -> None:
    launch, kind = config.launch, config.launch.kind
    if kind is LaunchKind.local:
        raise BadRequest("launch=local: hands the run to nobody; use launch=ray_job, slurm, kuberay, skypilot or "
                         "torchrun, or `sparing train` for a run on this machine")
    if not (conf_dir().parent / "constraints.txt").exists():
        raise BadRequest(f"launch={kind.name}: sends the code of a checkout, and this is an installed package; call it "
                         "as `python -m orchestrator launch` in a checkout")
    if config.cluster.kind is ClusterKind.local:
        raise BadRequest(f"cluster=local: would keep the run on one machine, and launch={kind.name} sends it to a "
                         "cluster; leave it out")
    if kind in ASK_FOR_DEVICES and config.hardware.name == "auto":
        raise BadRequest(f"hardware=auto: launch={kind.name} asks for devices before it sees any; name them, as in "
                         "hardware=h100 or hardware=cpu")
    rocm = kind is LaunchKind.kuberay and launch.image
    if kind in ASK_FOR_DEVICES and config.hardware.name.startswith("mi") and not rocm:
        raise BadRequest(f"hardware={config.hardware.name}: `sparing plan` alone knows it, launch={kind.name} would "
                         "bring a torch for CUDA; use launch=kuberay with a launch.image of your own that has ROCm's")
    if kind in RUN_ELSEWHERE:
        _check_folder(kind, "run.dir", config.run.dir or "None")
        _check_folder(kind, "checkpoint.dir", config.checkpoint.dir or config.run.dir)
    if kind is LaunchKind.kuberay and not launch.image:
        raise BadRequest("launch.image=null: launch=kuberay needs a container image; build one with deploy/Dockerfile, "
                         "push it, and give launch.image=REGISTRY/NAME:TAG")
    hours = SLURM_HOURS if kind is LaunchKind.slurm else 0.02
    for key, value, low in [("launch.hours", launch.hours, hours), ("launch.restarts", launch.restarts, 0)]:
        if not value >= low or not math.isfinite(value):
            raise BadRequest(f"{key}={value:g}: must be at least {low:g}; use {key}={24 if low else 3}")


def _check_words(arguments: list[str], launch: LaunchConfig) -> None:
    """Refuse what this launcher would leave out of its manifest; a default, which a file of one's own has of each key,
    asks for nothing."""
    kind, defaults = launch.kind, LaunchConfig()
    for word in arguments:
        key = word.split("=", 1)[0]
        users, leaf = USED_BY.get(key, (kind,)), key.removeprefix("launch.")
        if kind not in users and getattr(launch, leaf) != getattr(defaults, leaf):
            raise BadRequest(f"{word}: is of launch={' and '.join(user.name for user in users)} alone, and "
                             f"launch={kind.name} knows nothing like it; leave it out")
        if word == "resume=none":
            raise BadRequest("resume=none: a run that is launched again goes on (resume=auto); leave it out, and for a "
                             "new run name a new run.dir")


def _check_folder(kind: LaunchKind, key: str, folder: str) -> None:
    path = folder.removeprefix("file://").removeprefix("local://")
    elsewhere = "://" in path and not path.startswith("memory://")
    if elsewhere or (path.startswith("/") and kind not in MOUNTS_NOTHING):
        return
    rule = "a URL of an object store" + ("" if kind in MOUNTS_NOTHING else " or an absolute path")
    raise BadRequest(f"{key}={folder}: must be {rule}, as launch={kind.name} runs elsewhere and any other would go "
                     f"with the machine; use {key}=s3://bucket/runs/NAME" + (
                         "" if kind in MOUNTS_NOTHING else " or a folder that all nodes share"))


def _nodes(config: Config) -> tuple[int, int]:
    """Nodes and ranks of each, spares included. Where the config does not say: one node, or for more GPUs than one has
    as many full ones."""
    ranks, cluster, devices = config.layout.world_size, config.cluster, config.hardware.scale_up_devices
    per_node = cluster.ranks_per_node or (ranks // cluster.nodes if cluster.nodes else ranks + cluster.spares)
    given = cluster.ranks_per_node or cluster.nodes or config.launch.kind not in ASK_FOR_DEVICES
    if not given and config.hardware.device == "cuda" and per_node > min(devices, GPUS_PER_NODE):
        if devices > GPUS_PER_NODE or per_node % devices:
            raise BadRequest(f"cluster.ranks_per_node=0: {per_node} GPUs of {config.hardware.name} are not on one "
                             f"node, and how many of them a node has must be said; use cluster.ranks_per_node="
                             f"{4 if devices > GPUS_PER_NODE else devices}")
        per_node = devices
    return math.ceil((ranks + cluster.spares) / per_node), per_node


def _overrides(config: Config, arguments: list[str], stamp: str, cwd: Path) -> list[str]:
    """The run's own words, with a run directory that is the same at every start. What a launcher starts in the
    checkout is told paths from here."""
    from orchestrator.words import quoted

    def here(path: str) -> str:
        return str(cwd / Path(path).expanduser()) if path and "://" not in path else path

    paths = {"data.path": ",".join(part if re.match(r"stdlib(:|$)", part) else here(part)
                                   for part in config.data.parts),
             "data.tokenizer": "byte" if config.data.tokenizer == "byte" else here(config.data.tokenizer),
             "checkpoint.dir": here(config.checkpoint.dir or ""), "run.calibrate": here(config.run.calibrate or "")}
    kept = [word for word in arguments if not re.match(r"launch\b", word)]
    kept = [word for word in kept if word.split("=", 1)[0] not in ("run.dir", "resume")]
    resume = "auto" if config.resume == "none" else config.resume
    if config.launch.kind not in RUN_ELSEWHERE:
        kept = [f"{key}={quoted(paths[key])}" if paths.get(key := word.split("=", 1)[0]) else word
                for word in kept]
        resume = resume if resume == "auto" else here(resume)
    run_dir = here(config.run.dir or f"runs/{config.run.name}-{stamp}")
    wait = [] if config.launch.kind is LaunchKind.torchrun else [f"cluster.join_timeout_s={JOIN_TIMEOUT_S}"]
    given = any(word.startswith("cluster.join_timeout_s=") for word in kept)
    return [*kept, *([] if given else wait), f"run.dir={quoted(run_dir)}", f"resume={quoted(resume)}"]


def _address(config: Config) -> str | None:
    launch = config.launch
    if launch.kind is LaunchKind.ray_job:
        address = launch.address or os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
        url = urlsplit(address)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise BadRequest(f"launch.address={url.scheme}://{url.hostname or ''}: must be the dashboard's URL without "
                             "a user or password; use launch.address=http://HEAD:8265")
        return address.rstrip("/")
    if launch.kind is LaunchKind.torchrun and _nodes(config)[0] > 1:
        if not re.fullmatch(r"[^\s/:]+:\d+", launch.address or ""):
            raise BadRequest(f"launch.address={launch.address}: {_nodes(config)[0]} nodes must find each other at one "
                             "of them, host:port; use launch.address=FIRST_NODE:29400 on every node")
        return launch.address
    return None


def _templates():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(conf_dir().parent / "deploy"), undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"sh": shlex.quote, "json": json.dumps}
    return environment


def _accelerator(hardware: str) -> str:
    return SKY_NAMES.get(hardware, hardware.upper())


def _slurm_time(hours: float) -> str:
    minutes = math.ceil(hours * 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"
