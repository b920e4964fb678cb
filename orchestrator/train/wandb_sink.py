"""Rows of a run to Weights & Biases, live or offline; whatever it does, the run goes on."""

from collections.abc import Callable
from pathlib import Path

from orchestrator.config import Config, WandbMode, to_dict
from orchestrator.errors import BadRequest, words

MAX_HISTOGRAM_BINS = 512
"""Of Weights & Biases; more experts than this go to metrics.jsonl alone."""


class WandbSink:
    """One Weights & Biases run per training run: a restart continues under the same id.

    Every row carries `step`, and charts use it as their axis, since W&B's own counter cannot go back with a
    resumed run; losses are shown over tokens and over dollars as well (`by_tokens/*`, `by_usd/*`).
    """

    def __init__(self, config: Config, root: Path, *, run_id: str, on_failure: Callable[[str], None]):
        self.config, self.root, self.run_id, self.on_failure = config, root, run_id, on_failure
        self.run = None
        if config.tracker.wandb is WandbMode.online:
            self._guard(self._open, "online")
        if self.run is None:
            self._guard(self._open, "offline")

    def log(self, row: dict) -> None:
        self._guard(self._log, row)

    def event(self, kind: str, **fields) -> None:
        """Events are for events.jsonl: W&B has no table that grows."""

    def finish(self, summary: dict) -> None:
        self._guard(self._finish, summary)

    def _guard(self, call: Callable, argument: object) -> None:
        """W&B may raise anything, its own errors and the network's; none of it is worth a training run."""
        if self.run is None and call != self._open:
            return
        try:
            call(argument)
        except Exception as error:
            self.run = None
            cause = f"Weights & Biases: {words(error)}".splitlines()[0]
            self.on_failure(cause)

    def _open(self, mode: str) -> None:
        import wandb

        tracker = self.config.tracker
        settings = wandb.Settings(
            silent=True, console="off", login_timeout=10, init_timeout=30, finish_timeout=60,
            x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False, save_code=False,
            disable_git=True, disable_code=True, disable_job_creation=True)
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise BadRequest("tracker.wandb=online: no key is set; set WANDB_API_KEY or use tracker.wandb=offline")
        self.run = wandb.init(
            id=self.run_id, resume="allow", mode=mode, dir=str(self.root), settings=settings,
            project=tracker.project, entity=tracker.entity, group=tracker.group, tags=tracker.tags,
            name=self.config.run.name, config=to_dict(self.config))
        self.run.define_metric("*", step_metric="step")
        self.run.define_metric("by_tokens/*", step_metric="tokens/total")
        self.run.define_metric("by_usd/*", step_metric="cost/usd_total")

    def _log(self, row: dict) -> None:
        import wandb

        values = {}
        for key, value in row.items():
            if isinstance(value, list):
                values |= {f"{key}/{i}": wandb.Histogram(np_histogram=(counts, list(range(len(counts) + 1))))
                           for i, counts in enumerate(value)
                           if isinstance(counts, list) and 0 < len(counts) <= MAX_HISTOGRAM_BINS}
            elif value is not None:
                values[key] = value
        for loss in values.keys() & {"train/loss", "validation/loss", "validation/bits_per_byte"}:
            values |= {f"{axis}/{loss.replace('/', '_')}": values[loss] for axis in ("by_tokens", "by_usd")}
        self.run.log(values)

    def _finish(self, summary: dict) -> None:
        import wandb

        self.run.summary.update({key: value for key, value in summary.items() if value is not None})
        twins = {"this run": summary, **summary.get("dense", {})}
        rows = [[name, twin.get("device_hours"), twin.get("usd_total", twin.get("usd"))]
                for name, twin in twins.items() if isinstance(twin, dict)]
        self.run.log({"dense": wandb.Table(columns=["same tokens", "device-hours", "USD"], data=rows)})
        self.run.finish(exit_code=1 if summary.get("status") == "failed" else 0)
