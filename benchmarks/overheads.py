"""What it costs to be ready for a fault: heartbeats, copies in memory, checksums, checkpoints; as shares of a step.

    python benchmarks/overheads.py [Hydra overrides]          # model=mini on two ranks of one thread

Each part is timed alone, between steps, with the classes that a run uses. `stands` is how long training stands still
for it; `works` are the CPU seconds of all threads of a rank, which cost nothing where cores are idle, as on a machine
with GPUs, and everything where every core computes, as here. A part's share is that over a step's, by how often it
comes: a checkpoint at the interval that checkpoint.every=auto takes on 1,024 devices.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time

import ray
import torch.multiprocessing

SIZES = ["model=mini", "layout=single", "layout.dp=2", "layout.ep=2", "train.batch_size=8", "train.seq_len=256",
         "train.validate_sequences=8", "train.steps=100", "data=random", "tracker=off", "optim.warmup_steps=1",
         "cluster.threads_per_rank=1"]
STEPS, TIMES, DEVICES = 6, 3, 1024
STEP_S = 2.0
"""The next step meanwhile: what is sent is on its way."""


def main(overrides: list[str]) -> None:
    from orchestrator.compose import compose_config
    from orchestrator.plan.interval import mean_time_between_failures, optimal_interval

    beats = heartbeats()
    with tempfile.TemporaryDirectory(prefix="overheads-") as folder:
        config = compose_config([*SIZES, *overrides, f"run.dir={folder}/run", f"checkpoint.dir={folder}/checkpoints"])
        found = torch.multiprocessing.get_context("spawn").Manager().dict()
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ["TORCHELASTIC_RUN_ID"] = "overheads"  # the store is served by who started the ranks
        torch.multiprocessing.spawn(rank, (config, store.port, found), nprocs=2)
    found = dict(found)
    step_s, step_cpu_s = found.pop("step")
    save_s = found["checkpoint"][0] + found["checkpoint"][1]
    steps = {"copy in memory": config.checkpoint.memory_every, "  its checksum": config.checkpoint.memory_every,
             "states compared": config.checkpoint.memory_every, "ranks, links timed": config.checkpoint.memory_every}
    mtbf_s = mean_time_between_failures(DEVICES, config.cluster.mtbf_hours_per_device, faults=0, wall_s=0.0)
    saves = optimal_interval(save_s, mtbf_s) / step_s
    megabytes = found.pop("bytes") / 1e6
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {config.model.name}, {megabytes:.0f} MB of state a "
          f"rank, a step takes {step_s:.2f} s and {step_cpu_s:.2f} CPU seconds of each rank")
    print(f"{'':20}{'stands':>10}{'works':>10}{'every':>12}{'stands':>10}{'works':>10}  of a step")
    total = [0.0, 0.0]
    rows = {"heartbeat": (0.0, beats * step_s, 1.0)}
    rows |= {name: (*found[name], steps.get(name, saves)) for name in found}
    for name, (stands, works, every) in rows.items():
        shares = stands / every / step_s, works / every / step_cpu_s
        if not name.startswith(" "):
            total = [a + b for a, b in zip(total, shares, strict=True)]
        print(f"{name:20}{stands:>9.3f}s{works:>9.3f}s{every:>6.0f} steps{shares[0]:>10.2%}{shares[1]:>10.2%}")
    print(f"{'together':52}{total[0]:>10.2%}{total[1]:>10.2%}")


def rank(number: int, config, port: int, found) -> None:
    from orchestrator.parallel.mesh import connect
    from orchestrator.parallel.rank_info import RankInfo
    from orchestrator.plan.layout import layout_of
    from orchestrator.train.control import Control
    from orchestrator.train.drift import check_replicas
    from orchestrator.train.loop import Trainer
    from orchestrator.train.memory import keep_freed_memory
    from orchestrator.train.replica import KEPT_STEPS, Replicas
    from orchestrator.train.state import pieces_of

    keep_freed_memory()
    torch.set_num_threads(config.cluster.threads_per_rank)
    info = RankInfo(number, 2, number, 2, 0, "127.0.0.1", port)
    mesh = connect(layout_of(config), info, torch.device("cpu"), timeout_s=300)
    trainer = Trainer(config, mesh, Control(), placed_at=time.time(), attempt=1, replicas=Replicas())
    with contextlib.closing(trainer):
        checkpoints, state = trainer.checkpoints, {}
        trainer.accounts.start()
        steps = [timed(lambda: trainer._step(trainer._batch(trainer.progress.step))) for _ in range(STEPS)][2:]
        results = {"step": median(steps)}

        def copied() -> float:
            """One exchange; training stands still while the state is copied and while a stage is waited for."""
            began = time.perf_counter()
            checkpoints.buddies.offer(trainer.progress.step, pieces_of(trainer.pipeline, trainer.optimizer,
                                                                       with_copies=True), state)
            stands = time.perf_counter() - began
            checkpoints.buddies._packing.result()
            began = time.perf_counter()
            checkpoints.buddies.advance()
            stands += time.perf_counter() - began
            time.sleep(STEP_S)
            began = time.perf_counter()
            checkpoints.buddies.advance()
            return stands + time.perf_counter() - began

        def saved() -> float:
            trainer.progress.step += 1
            began = time.perf_counter()
            checkpoints.saver.save(trainer.progress.step, pieces_of(trainer.pipeline, trainer.optimizer), state)
            stands = time.perf_counter() - began
            checkpoints.saver.wait()
            return stands

        for _ in range(KEPT_STEPS + 2):  # from then on replicas are written to memory that older ones left
            copied()
            trainer.progress.step += 1
        results["copy in memory"] = median([timed(copied) for _ in range(TIMES)])
        replica = checkpoints.buddies.replicas.get(number, trainer.progress.step)
        results["  its checksum"] = 0.0, median([timed(replica.check) for _ in range(TIMES)])[1]
        results["states compared"] = median([timed(lambda: check_replicas(mesh, trainer.pipeline, trainer.progress))
                                             for _ in range(TIMES)])
        results["ranks, links timed"] = median([timed(lambda: trainer.stragglers.look(0)) for _ in range(TIMES)])
        results["checkpoint"] = median([timed(saved) for _ in range(TIMES)])
        if number == 0:
            found.update(results | {"bytes": replica.data.nbytes})
    mesh.close()


def timed(work) -> tuple[float, float]:
    """Seconds that training stands still, as `work` says or else its own, and CPU seconds of this process."""
    began, cpu = time.perf_counter(), time.process_time()
    stands = work()
    seconds = stands if isinstance(stands, float) else time.perf_counter() - began
    return seconds, time.process_time() - cpu


def median(found: list[tuple[float, float]]) -> tuple[float, float]:
    return tuple(statistics.median(side) for side in zip(*found, strict=True))


def heartbeats(seconds: float = 10.0) -> float:
    """CPU seconds a second that a rank's process spends on saying how it is, as often as its controller asks."""
    from orchestrator.cluster.ranks import ASK_S
    from orchestrator.cluster.worker import THREADS, Worker

    ray.init(address="local", include_dashboard=False, num_cpus=1, logging_level="ERROR", log_to_driver=False,
             _node_ip_address="127.0.0.1")
    try:
        worker = ray.remote(Worker).options(max_concurrency=THREADS).remote()
        pid = ray.get(worker.home.remote())["pid"]
        used, turns = [], []
        for asks in (False, True):
            began, cpu, ends = time.perf_counter(), cpu_s(pid), time.monotonic() + seconds
            while time.monotonic() < ends:
                if asks:
                    ray.get(worker.status.remote())
                    turns.append(0)
                time.sleep(ASK_S)
            used.append((cpu_s(pid) - cpu) / (time.perf_counter() - began))
        return max(0.0, used[1] - used[0])
    finally:
        ray.shutdown()


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(sys.argv[1:])
