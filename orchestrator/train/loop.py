"""One rank's life: connect, build, resume, then step after step until the run is over. Knows nothing of Ray.

`run_rank` is what a Ray worker, torchrun and a test all call; every rank calls it with the same config. The
decisions that all ranks must share (a non-finite step, a request to stop, the budget) ride in one reduction a step.
"""

import contextlib
import gc
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from model.transformer import routers
from orchestrator.config import ComputeDtype, Config, OnSpike
from orchestrator.errors import NotFit, NotTrustworthy
from orchestrator.parallel.mesh import Mesh, connect, meet, open_store, pick_device
from orchestrator.parallel.pipeline import Pipeline, build_pipeline
from orchestrator.parallel.rank_info import RankInfo
from orchestrator.plan.layout import batch_size_at, layout_of
from orchestrator.train import data, spikes
from orchestrator.train.accounts import Accounts
from orchestrator.train.control import Control, Recovery, steady
from orchestrator.train.counts import Progress, StepSums, moe_layer_names
from orchestrator.train.machine import peak_flops_per_s
from orchestrator.train.memory import keep_freed_memory
from orchestrator.train.optim import build_optimizer, clip_and_step, learning_rate, squared_norm
from orchestrator.train.replica import Replicas
from orchestrator.train.resume import Checkpoints
from orchestrator.train.spikes import RollBack
from orchestrator.train.stopwatch import Stopwatch
from orchestrator.train.straggler import Stragglers

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""A save that has been written for longer makes the next one wait rather than the ranks."""


def run_rank(config: Config, info: RankInfo, *, control: Control, placed_at: float, attempt: int = 1,
             store: dist.Store | None = None, replicas: Replicas | None = None,
             recovery: Recovery | None = None) -> dict:
    """Train to the end and return the result, the same on every rank; rank 0 writes the run directory's logs.

    placed_at: unix time from which the devices are charged. attempt: 1 for the first start of this run directory.
    replicas: memory of this process that outlives the group of ranks. recovery: set when a lost rank was replaced.
    """
    keep_freed_memory()
    device = pick_device(info, config.hardware)
    torch.set_num_threads(threads_per_rank(config, info))
    control.update(rank=info.rank, phase="start", steps=config.train.steps)
    start_timeout_s = config.cluster.start_timeout_s
    store = store or open_store(info, timeout_s=start_timeout_s)
    meet(store, info, timeout_s=start_timeout_s)
    mesh = connect(layout_of(config), info, device, timeout_s=config.cluster.step_timeout_s, store=store)
    whole_store = mesh.store
    try:
        while True:
            trainer = Trainer(config, mesh, control, placed_at=placed_at, attempt=attempt, replicas=replicas,
                              recovery=recovery)
            with contextlib.closing(trainer):
                try:
                    return trainer.run()
                except RollBack as back:
                    recovery = trainer.going_back(str(back))
            if whole_store is not None:  # keys that nobody has used
                prefix = f"rollback/{trainer.progress.rolled_back_at}"
                mesh = replace(mesh, store=dist.PrefixStore(prefix, whole_store))
            del trainer  # its memory is the next one's
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        mesh.close()


def threads_per_rank(config: Config, info: RankInfo) -> int:
    """CPU threads of a rank: as configured, else this machine's cores shared by the ranks on it."""
    return config.cluster.threads_per_rank or max(1, (os.cpu_count() or 1) // info.local_world_size)


class Trainer:
    """State of one attempt on one rank."""

    def __init__(self, config: Config, mesh: Mesh, control: Control, *, placed_at: float, attempt: int,
                 replicas: Replicas | None = None, recovery: Recovery | None = None):
        self.config, self.mesh, self.control = config, mesh, control
        self.is_lead, self.n_extra = mesh.info.rank == 0, 1 + config.model.n_mtp_layers
        control.alive(phase="data")
        self.corpus = data.prepare(config.data, model=config.model, seq_len=config.train.seq_len, n_extra=self.n_extra,
                                   on_progress=lambda done, total: control.alive(phase="data", done=done, total=total))
        control.alive(phase="start")
        data.compare_over_ranks(self.corpus, config.data, mesh.info.rank, mesh.store, control.alive)
        compute = compute_dtype(config, mesh.device)
        self.pipeline: Pipeline = build_pipeline(config, mesh, compute)
        self.optimizer = build_optimizer(self.pipeline.shards, config.optim, moments_dtype=as_dtype(
            config.precision.moments, torch.float32))
        self.moe_layers = moe_layer_names(config.model)
        self.stopwatch = Stopwatch(mesh.device)
        self.progress = Progress()
        self.checkpoints = Checkpoints(config, mesh, self.pipeline, self.optimizer, attempt=attempt,
                                       data_digest=self.corpus.digest, replicas=replicas, recovery=recovery,
                                       on_progress=control.alive)
        restored = self.checkpoints.restore(self.progress)
        self.held = recovery.held if recovery is not None else []
        self.first_claim = (recovery.first_claim if recovery else 0) or self.checkpoints.saver.claim_number
        if recovery is not None and recovery.skip_to:
            self.progress.skipped_samples = recovery.skip_to - data.samples_before(self.progress.step, config.train)
            for name, value in recovery.kept.items():
                setattr(self.progress, name, value)
        self._mean_over_ranks(0.0)
        peak = recovery.peak_flops_per_s if recovery is not None else None
        peak = peak or self._mean_over_ranks(peak_flops_per_s(config, mesh.device, compute))
        self.accounts = Accounts(config, mesh, self.corpus, self.progress, placed_at=placed_at, recovery=recovery,
                                 restored=restored, moe_layers=self.moe_layers, attempt=attempt, peak_flops_per_s=peak)
        self.checkpoints.on_event = self.accounts.event
        self.stragglers = Stragglers(mesh, config.checkpoint.memory_every,
                                     self.accounts.tracker.event if self.accounts.tracker is not None else None)
        if self.checkpoints.resumed:
            self.accounts.event("resumed", step=self.progress.step, **self.checkpoints.resumed)
        self.fetcher = ThreadPoolExecutor(1, thread_name_prefix="data")
        self.hosted = torch.zeros(len(self.moe_layers), max(1, config.model.n_routed_experts), dtype=torch.int64)

    def close(self) -> None:
        self.fetcher.shutdown(wait=False, cancel_futures=True)
        self.checkpoints.close()
        self.accounts.close()

    def run(self) -> dict:
        """Steps until the last one, the budget or a request to stop; then the last validation and checkpoint."""
        config, progress = self.config, self.progress
        self.accounts.start()
        self._publish(phase="step", peak_flops_per_s=self.accounts.peak, claim=self.first_claim)
        status = "completed"
        upcoming = self.fetcher.submit(self._batch, progress.step)
        while progress.step < config.train.steps:
            self.control.alive()
            began = time.perf_counter()
            tokens = upcoming.result().to(self.mesh.device, non_blocking=True)
            data_s = time.perf_counter() - began
            if progress.step + 1 < config.train.steps:
                upcoming = self.fetcher.submit(self._batch, progress.step + 1)
            sums, lr = self._step(tokens)
            row = self.accounts.step(sums, lr=lr, seconds=time.perf_counter() - began, data_s=data_s,
                                     parts_s=self.stopwatch.read(), saving=self.checkpoints.saver.busy_s > 0)
            rolls_back = config.train.on_spike is OnSpike.rollback and progress.step > progress.rolled_back_at
            if rolls_back and not sums.applied:
                self.accounts.log(row)
                raise RollBack("loss spike" if sums.spike else "non-finite loss or gradient")
            last = progress.step == config.train.steps or sums.stop
            if last or _due(progress.step, config.train.validate_every):
                row |= self._validate()
            if last or self.checkpoints.may_save(progress.step, due=sums.save_due, late=sums.saving_late):
                row |= self._save(background=not last)
            row |= self._saves_so_far() | self.stragglers.look(progress.step)
            row |= self._remember(row.get("time/checkpoint_s", 0.0), last=last)
            self.accounts.log(row)
            self._publish(phase="step", loss=row["train/loss"], tokens_per_s=row["tokens/per_s"],
                          usd_total=row["cost/usd_total"])
            if progress.bad_in_a_row >= config.train.max_bad_steps:
                raise NotTrustworthy(f"{progress.bad_in_a_row} steps in a row had a non-finite loss or gradient, or a "
                                     f"loss spike (train.max_bad_steps={config.train.max_bad_steps}); lower optim.lr, "
                                     "or look at the data; the last checkpoint stands")
            if sums.stop and progress.step < config.train.steps:
                status = self.accounts.stopped(self.control.stop_cause)
                break
        if progress.step == 0:
            raise NotTrustworthy("no step was taken")
        self.checkpoints.wait()
        self.checkpoints.end_exchange()
        self._mean_over_ranks(0.0)  # a rank that leaves takes its connections along: none before all are through
        self._saves_so_far()
        if self.checkpoints.gave_up:
            raise NotFit(f"checkpoint.dir={config.checkpoint.dir}: {self.checkpoints.failed_in_a_row} saves in a row "
                         f"failed, the last one because {self.checkpoints.last['error']}")
        self._publish(phase="done")
        return self.accounts.result(status, self.checkpoints.last)

    def going_back(self, cause: str) -> Recovery:
        """How all ranks, which call this at the same step, go on from their newest kept state behind today's data."""
        self.control.update(phase="start")
        self.checkpoints.settle()
        progress, now = self.progress, steady()
        progress.rollbacks, progress.rolled_back_at = progress.rollbacks + 1, progress.step
        event = {"kind": "rolled_back", "time": now, "rank": 0, "node": self.mesh.info.node_rank,
                 "step": progress.step, "cause": cause, "rollbacks": progress.rollbacks}
        kept = {name: getattr(progress, name) for name in ("bad_steps", "loss_spikes", "rollbacks", "rolled_back_at")}
        skip_to = data.samples_before(progress.step, self.config.train) + progress.skipped_samples
        return Recovery(progress.rollbacks, now, [event], self.accounts.peak, self.first_claim, skip_to, kept,
                        held=self.held)

    def _step(self, tokens: Tensor) -> tuple[StepSums, float]:
        """Forward, backward, agree, clip, update: one optimizer step of the V3 recipe."""
        config, progress, pipeline = self.config, self.progress, self.pipeline
        sequences = batch_size_at(progress.step, config.train)
        self.stopwatch.start()
        losses = pipeline.train_step(tokens, step_sequences=sequences)
        pipeline.finish_grads()
        self.stopwatch.lap("forward_backward")
        sums = self._reduce(losses)
        self.stopwatch.lap("agree")
        self._judge(sums, sums.losses[0] / (sequences * config.train.seq_len))
        lr = learning_rate(progress.optimizer_steps + 1, config.optim, config.train.steps)
        if sums.applied:
            clip_and_step(self.optimizer, pipeline.shards, norm=sums.grad_norm, optim=config.optim, lr=lr)
            self._update_expert_bias(sums.tokens_per_expert)
            progress.optimizer_steps += 1
            progress.bad_in_a_row = 0
        else:
            progress.bad_steps += 1
            progress.bad_in_a_row += 1
            progress.loss_spikes += sums.spike
        pipeline.zero_grad()
        self.stopwatch.lap("optimizer")
        progress.step += 1
        progress.samples += sequences
        progress.tokens += sequences * config.train.seq_len
        return sums, lr

    def _judge(self, sums: StepSums, loss: float) -> None:
        """Mark a loss spike. The loss is the sum over all ranks and the window is in the checkpoint, so every rank
        decides alike, after a resume too."""
        train, progress = self.config.train, self.progress
        sums.spike = sums.finite and spikes.is_spike(loss, progress.recent_losses, sigmas=train.spike_sigmas,
                                                     window=train.spike_window)
        progress.recent_losses = spikes.remember(loss, progress.recent_losses, window=train.spike_window)

    def _reduce(self, losses: Tensor) -> StepSums:
        """One all-reduce for all that ranks must agree on: losses, gradient norm, stop, counts per expert."""
        width = len(losses)
        counts = torch.zeros(len(self.moe_layers), max(1, self.config.model.n_routed_experts), dtype=torch.float64)
        balance = 0.0
        for stage in self.pipeline.stages:
            for name, router in routers(stage):
                counts[self.moe_layers.index(name)] = router.tokens_per_expert.double()
                balance += float(router.balance_loss_sum)
        stop = self.control.stop_cause is not None or (self.is_lead and self.accounts.budget_ends())
        late = self.checkpoints.saver.busy_s > PATIENCE_S
        due = self.is_lead and (self.checkpoints.waits or self.accounts.cadence.due(self.progress.step + 1))
        head = torch.tensor([balance, float(squared_norm(self.pipeline.shards)), self.stopwatch.cpu_s(), stop, late,
                             due], dtype=torch.float64)
        packed = torch.cat([losses.detach().double().cpu(), head, counts.flatten()])
        packed = self._sum_over_ranks(packed)
        squared, cpu_s, *flags = packed[width + 1 : width + 6].tolist()
        reduced = packed[width + 6 :].view_as(counts).to(torch.int64)
        self.hosted += reduced
        return StepSums(packed[:width].tolist(), packed[width].item(), math.sqrt(squared) if squared >= 0 else squared,
                        *(flag > 0 for flag in flags), reduced, cpu_s)

    def _sum_over_ranks(self, packed: Tensor) -> Tensor:
        if self.mesh.world is None:
            return packed
        packed = packed.to(self.mesh.device)
        dist.all_reduce(packed, group=self.mesh.world)
        return packed.cpu()

    def _mean_over_ranks(self, value: float) -> float:
        return self._sum_over_ranks(torch.tensor([value], dtype=torch.float64)).item() / self.mesh.layout.world_size

    def _update_expert_bias(self, counts: Tensor) -> None:
        for stage in self.pipeline.stages:
            for name, router in routers(stage):
                if self.config.model.expert_bias:
                    router.update_bias(counts[self.moe_layers.index(name)].to(self.mesh.device))

    def _validate(self) -> dict:
        """Mean cross-entropies and acceptance over the held-out sequences, the same under every layout."""
        began, config, number = time.perf_counter(), self.config, self.config.train.validate_sequences
        self.control.update(phase="validate")
        share = number // self.mesh.layout.dp
        mine = range(number)[self.mesh.coordinate.dp * share :][:share]
        rows = torch.from_numpy(data.validation_batch(self.corpus, mine, number, config.train.seq_len, self.n_extra))
        size = math.gcd(share, batch_size_at(self.progress.step, config.train) // self.mesh.layout.dp)
        sums = 0.0
        for part in rows.to(self.mesh.device).split(size):
            self.control.alive()
            sums = sums + self.pipeline.validate(part).double()
        sums = self._sum_over_ranks(sums.cpu())
        losses, accepted = (sums / number).split([self.n_extra, config.model.n_mtp_layers])
        guesses = (config.train.seq_len - torch.arange(1, self.n_extra)).clamp(min=0)
        return self.accounts.validated((losses / config.train.seq_len).tolist(), (accepted / guesses).tolist(),
                                       time.perf_counter() - began)

    def _save(self, *, background: bool) -> dict:
        self.control.update(phase="save")
        began = time.perf_counter()
        self.checkpoints.save(self.progress, self.accounts.state(), background=background)
        return self.accounts.saved(time.perf_counter() - began)

    def _saves_so_far(self) -> dict:
        """Tell how saves ended; too many failures in a row ask for the end, with one more try."""
        self.checkpoints.report()
        if self.checkpoints.gave_up:
            self.control.request_stop(f"{self.checkpoints.failed_in_a_row} saves in a row failed")
        return {"checkpoint/failed_total": self.checkpoints.failed}

    def _remember(self, saved_s: float, *, last: bool) -> dict:
        began = time.perf_counter()
        if not last:
            due = _due(self.progress.step, self.config.checkpoint.memory_every)
            self.checkpoints.remember(self.progress, self.accounts.state, due=due)
        return {"time/checkpoint_s": saved_s + self.accounts.stood_still(time.perf_counter() - began)}

    def _batch(self, step: int) -> Tensor:
        """This rank's sequences of a step, [sequences, S + 1 + M]: a function of (seed, step) and coordinate alone."""
        train, dp = self.config.train, self.mesh.layout.dp
        size = batch_size_at(step, train)
        share = size // dp
        first = data.samples_before(step, train) + self.progress.skipped_samples + self.mesh.coordinate.dp * share
        return torch.from_numpy(data.batch(self.corpus, seed=self.config.seed, first_sample=first, num=share,
                                           seq_len=train.seq_len, n_extra=self.n_extra))

    def _publish(self, **fields) -> None:
        """Status for whoever asks: what is hosted here, what it received, how far the run is."""
        experts = self.mesh.layout.experts_of(self.mesh.info.rank, self.config.model.n_routed_experts)
        names = [name for stage in self.pipeline.stages for name, _ in routers(stage)]
        received = {name: self.hosted[self.moe_layers.index(name)][experts.start : experts.stop].tolist()
                    for name in names}
        self.control.update(rank=self.mesh.info.rank, step=self.progress.step, steps=self.config.train.steps,
                            stages=list(self.pipeline.stage_ids), notices=self.accounts.notices,
                            layers=[int(i) for stage in self.pipeline.stages for i in stage.layers],
                            experts=[experts.start, experts.stop], tokens_per_expert=received, **fields)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """bf16 on GPUs and fp32 on CPUs unless told otherwise; master weights are fp32 always."""
    return as_dtype(config.precision.compute_dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)


def as_dtype(asked: ComputeDtype, auto: torch.dtype) -> torch.dtype:
    return {ComputeDtype.auto: auto, ComputeDtype.fp32: torch.float32, ComputeDtype.bf16: torch.bfloat16}[asked]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
