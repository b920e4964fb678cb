"""A run's checkpoints as the loop sees them: choose one to continue from, save in the background, tell what happened.

All ranks take the same decision: rank 0 proposes through the store, each rank says whether it could read its part.
When ranks meet again after one was replaced, their state in memory (replica.py) is tried before storage.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, fields

import torch
import torch.distributed as dist

from model.config import ModelConfig
from orchestrator import errors
from orchestrator.config import Config, to_dict
from orchestrator.errors import BadRequest, NotFit, NotTrustworthy, SparingError, public_kind
from orchestrator.parallel.mesh import Mesh
from orchestrator.parallel.pipeline import Pipeline
from orchestrator.train import checkpoint, lineage
from orchestrator.train.control import Recovery
from orchestrator.train.drift import check_replicas
from orchestrator.train.manifest import CorruptManifest
from orchestrator.train.memory import free_bytes
from orchestrator.train.metrics import plain
from orchestrator.train.replica import COPIES, Buddies, MemoryLoader, Replicas, agree, fetch
from orchestrator.train.shards import Loader
from orchestrator.train.state import pieces_of, restore, share_biases


class Checkpoints:
    """Saving and resuming for one rank. `on_event(kind, **fields)` hears of every result on rank 0.

    `last`: path and step of the newest checkpoint of this attempt, and why the newest save failed, if it did. On rank
    0, `failed` and `failed_in_a_row` count the saves that did not end in a checkpoint.
    """

    def __init__(self, config: Config, mesh: Mesh, pipeline: Pipeline, optimizer: torch.optim.Optimizer, *,
                 attempt: int, data_digest: str, replicas: Replicas | None = None, recovery: Recovery | None = None,
                 on_progress: Callable[[], None] = lambda: None):
        self.data_digest, self.recovery, self.on_progress = data_digest, recovery, on_progress
        self.buddies = None
        if replicas is not None and mesh.world is not None and config.checkpoint.memory_every:
            replicas.use(config.layout)
            self.buddies = Buddies(mesh, replicas, timeout_s=config.cluster.step_timeout_s)
        self.resume = "auto" if recovery is not None else config.resume
        self.config, self.mesh, self.pipeline, self.optimizer = config, mesh, pipeline, optimizer
        self.attempt = attempt
        self.on_event: Callable = lambda kind, **fields: None
        self.resumed: dict | None = None
        self.last: dict = {"path": None, "step": None, "error": None}
        self.failed = self.failed_in_a_row = 0
        self.waits = False
        self.told: list[tuple[str, str]] = []
        """Kinds and causes of events from before anybody could be told."""
        if self.buddies is not None:
            self._leave_room()
        self.saver = checkpoint.Saver(
            config.checkpoint.dir, rank=mesh.info.rank, world_size=mesh.layout.world_size, store=mesh.store,
            keep=config.checkpoint.keep, fence=f"attempt-{attempt}", timeout_s=config.cluster.save_timeout_s,
            experts=_expert_blocks(config.model), on_wait=on_progress)

    def _leave_room(self) -> None:
        """Keep no copies where they would not fit beside what the machine holds; all ranks do or none does."""
        replicas, here = self.buddies.replicas, self.mesh.info.local_world_size
        state = sum(piece.tensor.nbytes for piece in pieces_of(self.pipeline, self.optimizer, with_copies=True))
        free, needed = free_bytes("cpu"), COPIES * state * here
        fits = replicas.has_room and (self.recovery is not None or free is None or needed <= free)
        agreed = torch.tensor([int(fits)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.buddies.group)
        replicas.has_room = bool(agreed.item())
        if not replicas.has_room:
            self.buddies.close()
            self.buddies = None
            self.told.append(("memory_copies_off", f"{COPIES} copies of the state of {here} ranks take "
                              f"{needed / 2**30:.1f} GiB of a machine's memory, more than is free on some"))

    def restore(self, progress) -> dict | None:
        """Fill model, optimizer and `progress` from memory or the checkpoint that `resume` names; None: a fresh start.
        """
        if self.recovery is not None and self.buddies is not None:
            state = self._restore_from_memory()
            if state is not None:
                _fill(progress, state)
                return state
        state = self._restore_from_storage(progress)
        if self.resumed is None and self.recovery is not None and self.config.resume not in ("none", "auto"):
            self.resume = self.config.resume
            state = self._restore_from_storage(progress)
        return state

    def _restore_from_memory(self) -> dict | None:
        """The newest step that all ranks' memories hold together, unless storage has a newer one."""
        replicas, group, turn = self.buddies.replicas, self.buddies.group, 0
        while (found := agree(self.mesh, replicas, turn)) is not None:
            step, holders = found
            if self._newest_saved(turn) > step:
                return None
            error = None
            try:
                loader = MemoryLoader(fetch(self.mesh, replicas, step, holders, group))
                restore(self.pipeline, self.optimizer, loader, on_progress=self.on_progress)
            except NotTrustworthy as caught:
                error = caught
            if self._first_error(error, f"memory/{turn}") is None:
                share_biases(self.pipeline)
                replicas.drop_after(step)
                moved = [owner for owner, holder in holders.items() if owner != holder]
                self.resumed = {"path": "memory", "skipped": [], "from_buddies": moved}
                return loader.state
            replicas.drop_after(step - 1)
            turn += 1
        return None

    def _newest_saved(self, turn: int) -> int:
        """The step of the newest checkpoint on storage, by rank 0's view."""
        key, store = f"memory/{turn}/saved", self.mesh.store
        if self.mesh.info.rank == 0:
            steps = [lineage.step_of(path) for path in self._own_checkpoints()]
            store.set(key, str(max(steps, default=-1)))
        return int(store.get(key))

    def _restore_from_storage(self, progress) -> dict | None:
        if self.resume == "none":
            return None
        loader: Loader | None = None

        def load(path: str, turn: int) -> SparingError | None:
            nonlocal loader
            loader, error = self._load(path)
            failure = self._first_error(error, str(turn))
            if failure is not None and self.resume != "auto":
                raise error or failure
            return failure

        path, damaged = lineage.newest_loadable(self._proposed, load)
        if path is not None:
            share_biases(self.pipeline)
            state = loader.state
            loader.close()
            self.resumed = {"path": path, "skipped": list(damaged), "causes": list(damaged.values())}
            if state.get("weights_only"):
                return None
            _fill(progress, state)
            return state
        if self.resume != "auto":
            raise BadRequest(f"resume={self.resume}: no whole checkpoint there; give its path, or resume=auto")
        if damaged:
            raise NotTrustworthy(f"resume=auto: none of the {len(damaged)} checkpoints in {self.config.checkpoint.dir} "
                                 f"is whole: {list(damaged.values())[-1]}; start a new run with resume=none and "
                                 "another run.dir")
        return None

    def remember(self, progress, extra: Callable[[], dict], *, due: bool) -> None:
        """Once a step: go on with an exchange of copies between buddies, or start one if due."""
        if self.buddies is None:
            return
        self.buddies.advance()
        if due:
            check_replicas(self.mesh, self.pipeline, progress)
            self.buddies.offer(progress.step, pieces_of(self.pipeline, self.optimizer, with_copies=True),
                               self._state(progress, extra()))

    def may_save(self, step: int, *, due: bool, late: bool) -> bool:
        """Whether to save after this step, which all ranks answer alike: training does not wait for slow storage.

        late: the save under way on some rank takes so long that the next one waits for it, and not the ranks.
        """
        if due and late and not self.waits:
            self.on_event("checkpoint_waits", step=step, cause="the one before is not written yet")
        self.waits = (self.waits or due) and late
        return due and not late

    @property
    def gave_up(self) -> bool:
        """On rank 0: `checkpoint.max_failures` saves in a row have failed."""
        return self.mesh.info.rank == 0 and 0 < self.config.checkpoint.max_failures <= self.failed_in_a_row

    def save(self, progress, extra: dict, *, background: bool) -> None:
        """Hand this rank's state to the saver; returns when it is copied, or written if not in the background."""
        check_replicas(self.mesh, self.pipeline, progress)
        self.report()
        self.saver.save(progress.step, pieces_of(self.pipeline, self.optimizer), self._state(progress, extra),
                        background=background and self.config.checkpoint.background)
        if not background:
            self.wait()

    def wait(self) -> None:
        self.saver.wait()
        self.report()

    def settle(self) -> None:
        """End what is under way, so that the newest state is one to go back to."""
        self.wait()
        if self.buddies is not None:
            self.buddies.finish()

    def end_exchange(self) -> None:
        """All ranks, after the last step: nothing may be under way between buddies when the first of them leaves."""
        if self.buddies is not None:
            self.buddies.settle()

    def close(self) -> None:
        """Give a save under way a moment; after a failure it cannot end, since other ranks are gone."""
        self.saver.wait(timeout_s=1)
        if self.buddies is not None:
            self.buddies.close()

    def _state(self, progress, extra: dict) -> dict:
        """As JSON, which knows neither the loss of a model that has diverged nor a budget without end."""
        return plain({"progress": asdict(progress), "config": to_dict(self.config), **extra})

    def report(self) -> None:
        """Tell how saves have ended since the last call."""
        for kind, cause in self.told:
            self.on_event(kind, cause=cause)
        self.told.clear()
        for result in self.saver.results():
            self.failed += not result.ok
            self.failed_in_a_row = 0 if result.ok else self.failed_in_a_row + 1
            if result.ok:
                self.last = {"path": result.path, "step": result.step, "error": None}
                self.on_event("checkpoint_saved", step=result.step, bytes=result.bytes, seconds=result.seconds)
            else:
                self.last = self.last | {"error": result.error}
                self.on_event("checkpoint_failed", step=result.step, cause=result.error)

    def _proposed(self, tried: list[str]) -> str | None:
        """The next checkpoint to try, by rank 0's view of storage."""
        key = f"resume/{self.resume}/{len(tried)}"
        if self.mesh.info.rank == 0:
            if self.resume == "auto":
                left = [path for path in reversed(self._own_checkpoints()) if path not in tried]
                path = left[0] if left else ""
            else:
                path = "" if tried else self._named()
            if self.mesh.store is not None:
                self.mesh.store.set(key, path)
        else:
            path = self.mesh.store.get(key).decode()
        return path or None

    def _own_checkpoints(self) -> list[str]:
        """Those to go on from: all under resume=auto, else those written since this attempt started."""
        found = lineage.list_checkpoints(self.config.checkpoint.dir)
        if self.config.resume == "auto" or self.recovery is None:
            return found
        return [path for path in found if lineage.claim_of(path) >= self.recovery.first_claim]

    def _named(self) -> str:
        """`resume` may name a checkpoint, or a run or checkpoint directory, whose newest is meant."""
        return lineage.newest_under(self.resume) or self.resume

    def _load(self, path: str) -> tuple[Loader | None, SparingError | None]:
        try:
            loader = Loader(path)
            weights_only = bool(loader.state.get("weights_only"))
            lineage.check_same(self.config, path, loader.state)
            lineage.check_same_data(self.config, path, loader.state, self.data_digest)
            restore(self.pipeline, self.optimizer, loader, weights_only=weights_only, on_progress=self.on_progress)
            return loader, None
        except (KeyError, TypeError, AttributeError) as error:  # a state that no run has written
            return None, CorruptManifest(f"{path}: the state in its manifest cannot be gone on from ({error!r})")
        except (SparingError, OSError) as error:
            return None, error if isinstance(error, SparingError) else NotFit(f"{path}: {error}")

    def _first_error(self, error: SparingError | None, turn: str) -> SparingError | None:
        """The same answer on every rank: None if all could load, else the lowest failing rank's error."""
        if self.mesh.world is None:
            return error
        failed = torch.tensor([0 if error is None else 1], device=self.mesh.device)
        dist.all_reduce(failed, group=self.mesh.world)
        if not failed.item():
            return None
        store, prefix = self.mesh.store, f"resume/{self.resume}/{turn}/error"
        if error is not None:
            store.set(f"{prefix}/{self.mesh.info.rank}", json.dumps([public_kind(error), str(error)]))
        first = torch.tensor([self.mesh.layout.world_size if error is None else self.mesh.info.rank],
                             device=self.mesh.device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self.mesh.world)
        kind, message = json.loads(store.get(f"{prefix}/{first.item()}"))
        return getattr(errors, kind)(message)


def _expert_blocks(model: ModelConfig) -> dict[str, int]:
    """Routed experts of every block that routes, for the census."""
    if not model.n_routed_experts:
        return {}
    blocks = [f"layers.{i}" for i in range(model.n_layers) if model.is_moe(i)]
    return dict.fromkeys([*blocks, *(f"mtp.{k}.block" for k in range(model.n_mtp_layers))], model.n_routed_experts)


def _fill(progress, state: dict) -> None:
    for f in fields(progress):
        setattr(progress, f.name, state["progress"].get(f.name, getattr(progress, f.name)))
