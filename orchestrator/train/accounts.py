"""What a run's steps add up to: the rows of metrics.jsonl, the ledger, the budget, and the final result.

Every rank keeps accounts, so that the loop needs no branches; rank 0's are the ones that are written and believed.
"""

import math
from collections import deque
from dataclasses import asdict
from statistics import fmean

import torch

from model.fp8 import why_emulated
from orchestrator.config import Config
from orchestrator.parallel.mesh import Mesh
from orchestrator.plan.cost import (
    Ledger,
    dense_equivalents,
    mfu,
    model_flops,
    usd_per_million_tokens,
    would_pass,
)
from orchestrator.plan.workload import Calibration
from orchestrator.train import metrics
from orchestrator.train.cadence import KEPT, Cadence
from orchestrator.train.control import Recovery, steady
from orchestrator.train.data import Corpus
from orchestrator.train.expected import expected, keep_plan
from orchestrator.train.finish import MEASURED_STEPS, earlier_end, medians, summarise
from orchestrator.train.machine import machine_of

PREDICTED = ("step_time_s", "forward_backward_s", "optimizer_s", "tokens_per_s", "memory_peak_gib", "steps_usd")
"""Logged as lines beside what is measured."""
TEARDOWN_S = 3.0
"""Wall time kept in hand for the release of the devices when a budget is about to end a run."""


class Accounts:
    """Times are unix seconds for the ledger and durations in seconds elsewhere."""

    def __init__(self, config: Config, mesh: Mesh, corpus: Corpus, progress, *, placed_at: float, attempt: int,
                 restored: dict | None, moe_layers: list[str], peak_flops_per_s: float,
                 recovery: Recovery | None = None):
        self.config, self.mesh, self.corpus, self.progress = config, mesh, corpus, progress
        self.moe_layers, self.attempt, self.peak = moe_layers, attempt, peak_flops_per_s
        self.placed_at, self.recovery = placed_at, recovery
        self.devices = mesh.layout.world_size
        self.tracker, self.row = None, {}
        wandb_id = (restored or {}).get("wandb_id")
        if mesh.info.rank == 0:
            self.tracker = metrics.open_tracker(config, resumed_step=progress.step, wandb_id=wandb_id,
                                                row=(restored or {}).get("row"))
        self.ledger = self._open_ledger(restored)
        self.faults = self._faults(restored)
        self.cadence = Cadence(config, devices=self.devices, faults=self.faults,
                               wall_s=self.ledger.charged_s(steady()) / (self.devices + self.ledger.spares))
        self.recoveries_s: list[float] = []
        self.machine, self.predicted, self.learnt = None, {}, Calibration()
        if self.tracker is not None:
            self.machine = machine_of(mesh, peak_flops_per_s, fp8=config.precision.fp8)
            self.predicted, self.learnt = expected(config, self.machine)
        self.ended_by_budget = False
        self.step_seconds: list[float] = []
        self.timed: deque[dict] = deque(maxlen=MEASURED_STEPS)
        self.save_seconds = self.write_seconds = self.validation_seconds = 0.0
        self.kept_tokens, self.kept_seconds, self.since_step = 0, 0.0, progress.step
        self.tokens_before = progress.tokens
        self.final: dict | None = None

    def start(self) -> None:
        """The first step is about to begin: all before it was start-up, or the way back from a fault."""
        emulated = why_emulated(self.mesh.device) if self.config.precision.fp8 else None
        recovery, now = self.recovery, steady()
        if recovery is None:
            self.ledger.charge("startup", max(0.0, now - self.placed_at))  # by another machine's clock
            if "step_time_s" in self.predicted:
                keep_plan(self.config, self.machine, self.learnt)
            self.event("predicted", **self.predicted)
            self.event("attempt_started", step=self.progress.step, attempt=self.attempt, ranks=self.devices,
                       device=self.mesh.device.type, peak_flops_per_s=self.peak)
            if emulated:
                self.event("fp8_emulated", step=self.progress.step, cause=emulated)
            return
        booked_s = math.fsum(self.ledger.buckets_s.values()) + self.unbooked_s
        open_s = max(0.0, self.ledger.charged_s(now) - booked_s)
        lost_s = self.tracker.dropped.seconds * self._devices_before() if self.tracker is not None else 0.0
        self.ledger.charge("lost_work", min(lost_s, open_s), devices=1)
        self.ledger.charge("restart", open_s - min(lost_s, open_s), devices=1)
        if self.tracker is not None:
            for event in recovery.events:
                self.tracker.event(**event)

    def _recovered(self) -> None:
        """The first step after a recovery has ended: what the fault cost."""
        since = max(0.0, steady() - self.recovery.fault_at)
        lost = self.tracker.dropped if self.tracker is not None else None
        if lost is not None:
            self.recoveries_s.append(since)
            seconds, price = (since * self.devices + lost.seconds * self._devices_before(),
                              self.config.hardware.usd_per_h)
            self.tracker.event("recovered", **self.recovery.decision, step=self.progress.step, seconds=since,
                               generation=self.recovery.generation, lost_steps=lost.rows, lost_s=lost.seconds,
                               device_s=seconds, usd=None if price is None else seconds / 3600 * price)
        self.recovery = None

    def _devices_before(self) -> int:
        """Devices that were held when the fault came."""
        earlier = [number for at, number, _ in self.recovery.held if at < self.recovery.fault_at]
        return earlier[-1] if earlier else self.devices

    @property
    def notices(self) -> list[str]:
        """What a person should be told once: of the data, and of a tracker that was given up."""
        return [*filter(None, [self.corpus.notice]), *(self.tracker.failures if self.tracker is not None else ())]

    def step(self, sums, *, lr: float, seconds: float, data_s: float, parts_s: dict[str, float], saving: bool) -> dict:
        """Book one step and make its row. saving: a checkpoint was being written beside it."""
        config, progress = self.config, self.progress
        tokens, self.tokens_before = progress.tokens - self.tokens_before, progress.tokens
        if self.recovery is not None:
            self._recovered()
        self.ledger.charge("data", data_s)
        self.ledger.charge("goodput" if sums.applied else "lost_work", seconds - data_s)
        self.step_seconds = [*self.step_seconds[1 - KEPT :], seconds]
        self.cadence.step(seconds, saving=saving)
        if sums.applied:
            self.kept_tokens, self.kept_seconds = self.kept_tokens + tokens, self.kept_seconds + seconds
            progress.loss_train = sums.losses[0] / tokens
        else:
            self.event("step_skipped", step=progress.step, cause=f"loss spike, {sums.losses[0] / tokens:.4g} per token"
                       if sums.spike else f"non-finite loss or gradient norm {sums.grad_norm}")
        flops = model_flops(config.model, tokens, config.train.seq_len)
        row = {
            "step": progress.step,
            "train/loss": sums.losses[0] / tokens,
            **{f"train/mtp_loss_{k + 1}": loss / tokens for k, loss in enumerate(sums.losses[1:])},
            "train/balance_loss": sums.balance_loss * config.model.balance_loss_weight * config.train.seq_len / tokens,
            "train/grad_norm": sums.grad_norm, "train/lr": lr, "train/skipped": int(not sums.applied),
            "train/skipped_total": progress.bad_steps, "train/loss_spikes_total": progress.loss_spikes,
            "train/rollbacks_total": progress.rollbacks,
            "tokens/total": progress.tokens, "tokens/per_s": tokens / seconds,
            "tokens/per_s_per_rank": tokens / seconds / self.devices,
            "time/step_s": seconds, "time/data_s": data_s, **{f"time/{name}_s": s for name, s in parts_s.items()},
            "time/cpu_s": sums.cpu_s, "memory/peak_gib": self._peak_gib(),
            "flops/model_total": model_flops(config.model, progress.tokens, config.train.seq_len),
            "perf/mfu": mfu(flops / seconds, devices=self.devices, peak_flops_per_s=self.peak),
        }
        self.timed.append({key: row[key] for key in row if key.startswith(("time/", "tokens/per_s", "train/skipped"))})
        self.row = row | self._loads(sums.tokens_per_expert) | self._costs()
        return self.row

    def validated(self, losses: list[float], acceptance: list[float], seconds: float) -> dict:
        """losses: mean cross-entropies in nats per token of the held-out sequences, main head first. acceptance: of
        each MTP depth, the share of guesses that are the main model's greedy token (model/transformer.py)."""
        self.ledger.charge("validation", seconds)
        self.validation_seconds = max(self.validation_seconds, seconds)
        self.progress.loss_validation = losses[0]
        per_token = self.corpus.bytes_per_token
        bits = losses[0] / math.log(2) / per_token if per_token else None
        self.progress.extra["bits_per_byte"] = bits
        self.event("validated", step=self.progress.step, loss=losses[0], bits_per_byte=bits)
        return {"validation/loss": losses[0], "validation/bits_per_byte": bits, "time/validation_s": seconds,
                **{f"validation/mtp_loss_{k + 1}": loss for k, loss in enumerate(losses[1:])},
                **{f"validation/mtp_acceptance_{k + 1}": share for k, share in enumerate(acceptance)}}

    def saved(self, seconds: float) -> dict:
        """`seconds` is how long the ranks stood still for a checkpoint."""
        self.save_seconds = max(self.save_seconds, seconds)
        self.cadence.saved(seconds)
        return {"time/checkpoint_s": self.stood_still(seconds)}

    def stood_still(self, seconds: float) -> float:
        self.ledger.charge("checkpoint", seconds)
        return seconds

    def log(self, row: dict) -> None:
        if self.tracker is not None:
            self.tracker.log(row | self._costs())

    def event(self, kind: str, **fields) -> None:
        if kind == "checkpoint_saved":
            self.write_seconds = max(self.write_seconds, fields["seconds"])
        if self.tracker is not None:
            self.tracker.event(kind, rank=0, node=self.mesh.info.node_rank, **fields)

    def budget_ends(self) -> bool:
        """Whether this step must be the last for the bill, final checkpoint and release included, to stay within."""
        step_s = max(self.step_seconds, default=0.0)
        # The last checkpoint is written while the ranks stand still, behind one that may just have begun.
        saves_s = 2 * max(self.save_seconds, self.write_seconds)
        ahead = 2 * step_s + self.validation_seconds + saves_s + TEARDOWN_S
        if would_pass(self.ledger, steady(), ahead, self.config.budget.max_usd):
            self.ended_by_budget = True
        return self.ended_by_budget

    def stopped(self, cause: str | None) -> str:
        """The status of a run that ended before its last step."""
        if self.ended_by_budget and cause is None:
            self.event("budget_reached", step=self.progress.step, cause=f"budget.max_usd={self.config.budget.max_usd}")
            return "budget"
        self.event("stop_requested", step=self.progress.step, cause=cause)
        return "preempted"

    def state(self) -> dict:
        """What a checkpoint remembers of the accounts."""
        row = metrics.plain({key: value for key, value in self.row.items() if key != "moe/tokens_per_expert"})
        return {"ledger": self.ledger.to_dict(steady()), "data_digest": self.corpus.digest, "faults": self.faults,
                "wandb_id": self.tracker.wandb_id if self.tracker is not None else None, "row": row}

    def result(self, status: str, checkpoint: dict) -> dict:
        """What `finish_run` makes the summary of."""
        progress, seconds = self.progress, self.kept_seconds
        now = steady()
        self.final = {
            "status": status, "steps": progress.step, "tokens": progress.tokens, "loss_train": progress.loss_train,
            "loss_validation": progress.loss_validation, "skipped_steps": progress.bad_steps,
            "loss_spikes": progress.loss_spikes, "rollbacks": progress.rollbacks,
            "bits_per_byte": {"validation": progress.extra.get("bits_per_byte"), **self.corpus.baselines},
            "tokens_per_s": self.kept_tokens / seconds if seconds else None,
            "since_step": self.since_step, "medians": medians(list(self.timed)),
            "predicted": self.predicted, "memory_peak_gib": self._peak_gib(),
            "machine": asdict(self.machine) if self.machine is not None else None,
            "peak_flops_per_s": self.peak, "device": self.mesh.device.type,
            "model_flops_total": model_flops(self.config.model, progress.tokens, self.config.train.seq_len),
            "ledger": self.ledger.to_dict(now), "checkpoint": checkpoint,
            "checkpoint_interval": self.cadence.summary(fmean(self.recoveries_s) if self.recoveries_s else None),
            "wandb_id": self.tracker.wandb_id if self.tracker is not None else None,
        }
        return self.final

    def close(self) -> None:
        """Flush and close the logs; without a result the run has failed."""
        if self.tracker is not None:
            final = self.final or {"status": "failed", "steps": self.progress.step,
                                   "ledger": self.ledger.to_dict(steady())}
            self.tracker.finish(summarise(self.config, final, placed_at=self.placed_at, released_at=steady(),
                                          devices=self.devices, attempts=self.attempt, spares=self.ledger.spares))

    def _faults(self, restored: dict | None) -> int:
        """Of the whole run so far, as far as it is known: an earlier attempt that lost steps had one."""
        before = (restored or {}).get("faults", 0)
        if self.recovery is not None:
            return before if self.recovery.skip_to else max(before + 1, self.recovery.generation)
        return before + (self.tracker is not None and self.tracker.dropped.rows > 0)

    def _open_ledger(self, restored: dict | None) -> Ledger:
        """This run's bill so far: the checkpoint's, raised to what earlier attempts were charged after it. Of a
        checkpoint of this very attempt the clock has run on since, with as many devices as were held meanwhile."""
        price, recovery = self.config.hardware.usd_per_h, self.recovery
        held = recovery is not None and restored is not None and restored["ledger"]["at"] >= self.placed_at
        since = restored["ledger"]["at"] if held else self.placed_at
        history = (recovery.held if recovery is not None and recovery.held else
                   [(0.0, self.devices, self.config.cluster.spares)])
        devices, spares = next(numbers for at, *numbers in reversed(history) if at <= since)
        ledger = (Ledger(devices, price, since, spares=spares) if restored is None else
                  Ledger.from_dict(restored["ledger"], devices=devices, usd_per_h=price, since=since, spares=spares))
        if self.tracker is not None and not held:
            if recovery is None:
                ledger.catch_up(self.tracker.dropped.charged_s, "lost_work")
            earlier = earlier_end(self.config.run.dir)
            if earlier is not None:
                ledger.catch_up(earlier["measured"]["charged_s"], "restart")
        self.unbooked_s = ledger.settled_s - math.fsum(ledger.buckets_s.values())
        for at, devices, spares in history:
            if at > since:
                ledger.resize(at, devices, spares=spares)
        return ledger

    def _loads(self, counts: torch.Tensor) -> dict:
        """Balance of the step's routing: the busiest expert's tokens over the mean, per layer and averaged."""
        if not self.moe_layers:
            return {}
        loads = (counts.max(1).values * counts.shape[1] / counts.sum(1).clamp(min=1)).tolist()
        every = 1 if counts.numel() <= metrics.MANY_COUNTS else metrics.MANY_COUNTS_EVERY
        table = {"moe/tokens_per_expert": counts.tolist()} if self.progress.step % every == 0 else {}
        return {"moe/load_max_over_mean": sum(loads) / len(loads),
                **{f"moe/load_max_over_mean/{name}": load for name, load in zip(self.moe_layers, loads, strict=True)},
                **table}

    def _peak_gib(self) -> float | None:
        """The most that this rank's tensors took so far; only a GPU's allocator knows."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.mesh.device.type == "cuda" else None

    def _costs(self) -> dict:
        now, config, tokens = steady(), self.config, self.progress.tokens
        usd = self.ledger.usd(now)
        share = mfu(model_flops(config.model, self.kept_tokens, config.train.seq_len) / self.kept_seconds,
                    devices=self.devices, peak_flops_per_s=self.peak) if self.kept_seconds else None
        dense = dense_equivalents(config.model, tokens, seq_len=config.train.seq_len, mfu=share,
                                  peak_flops_per_s=self.peak, usd_per_h=config.hardware.usd_per_h, devices=self.devices)
        row = {f"predicted/{key}": self.predicted[key] for key in PREDICTED if self.predicted.get(key) is not None}
        row |= {"cost/device_hours": self.ledger.device_hours(now), "cost/usd_total": usd,
                "cost/usd_per_million_tokens": usd_per_million_tokens(usd, tokens),
                **{f"cost/bucket_s/{name}": seconds for name, seconds in self.ledger.buckets_s.items()}}
        for name, twin in dense.items():
            row[f"cost/dense_{name}_device_hours"], row[f"cost/dense_{name}_usd"] = twin["device_hours"], twin["usd"]
        return row
