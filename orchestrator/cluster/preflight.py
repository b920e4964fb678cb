"""What must hold before a device is paid for: room on the cluster, and data that can be used."""

import time

import ray

from orchestrator.cluster import nodes, placement
from orchestrator.config import Config, DataKind
from orchestrator.errors import NotFit
from orchestrator.train.progress import Progress


def has_gpus(config: Config, progress: Progress, *, here: bool) -> bool:
    """Whether ranks take GPUs: where there are any, but for a machine with too few of them, whose ranks take CPUs. On a
    cluster also where the hardware that was named is one: its nodes may still be on their way."""
    if not here and config.hardware.device == "cuda":
        return True
    there, ranks = int(ray.cluster_resources().get("GPU", 0)), config.layout.world_size
    if config.hardware.device == "cuda" and there < ranks:
        smaller = f"use a layout of {there} rank{'s' * (there > 1)}" if there else "see what nvidia-smi says"
        raise NotFit(f"hardware={config.hardware.name}: {ranks} rank{'s' * (ranks > 1)} would train on the CPU at its "
                     f"price: Ray sees {there or 'no'} GPU{'s' * (there != 1)} here; {smaller}, or hardware=cpu")
    if here and 0 < there < ranks:
        progress.say(f"{ranks} ranks and {there} GPU{'s' * (there > 1)}: running on the CPU; a layout of {there} or "
                     "fewer ranks takes the GPU")
        return False
    return there > 0


def checked_request(config: Config, *, gpu: bool, simulated: bool) -> placement.Request:
    """What to ask of Ray; `NotFit`, with what is missing, where the nodes that joined in time can never give it."""
    deadline, asked = time.monotonic() + config.cluster.join_timeout_s, False
    try:
        while True:
            there = [placement.Node(node["NodeManagerAddress"], node["Resources"].get("CPU", 0),
                                    node["Resources"].get("GPU", 0), node["Resources"]) for node in nodes.alive()]
            request = placement.request_for(config, there, gpu=gpu, simulated=simulated)
            missing = placement.what_is_missing(request, there)
            if missing is None:
                return request
            if time.monotonic() >= deadline:
                raise NotFit(f"layout.pp={config.layout.pp} x layout.dp={config.layout.dp}: no room on the cluster: "
                             f"{missing}; add nodes or use a smaller layout")
            if not asked:
                asked = True
                nodes.ask_for([request.bundle(request.ranks_per_bundle)] * request.bundles
                              + [request.bundle(1)] * request.spares)
            time.sleep(1.0)
    finally:
        if asked:
            nodes.ask_for([])


def check_data(config: Config, progress: Progress, *, here: bool) -> None:
    """Find out that the data cannot be used before a device is paid for; on this machine also tokenise it."""
    from orchestrator.train import data, lineage, texts, tokenizer

    if here:
        lineage.check_data(config, data.prepare_here(config, progress).digest)
    elif config.data.kind is DataKind.text:
        texts.find_files(config.data.path)
        tokenizer.load_tokenizer(config.data.tokenizer)
