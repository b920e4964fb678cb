"""What a run goes on from, by names and manifests alone: no torch, no Ray, no tensor is read.

Whoever starts a run looks back first (`look_back`), so that what the ranks would refuse costs no start; the ranks ask
the same of what they read (resume.py).
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable

from model.config import ModelConfig
from orchestrator.config import Config, DataConfig, DataKind, from_dict, to_dict
from orchestrator.errors import BadRequest, NotFit, NotTrustworthy, SparingError
from orchestrator.train import storage
from orchestrator.train.finish import read_summary
from orchestrator.train.manifest import MANIFEST, CorruptManifest, Manifest, read_manifest
from orchestrator.train.metrics import METRICS
from orchestrator.train.progress import Progress
from orchestrator.train.tokenizer import load_tokenizer, same_ids

TOKENIZER = "tokenizer.json"
FREE_MODEL_KEYS = {"name", "max_seq_len", "init_std", "bias_update_speed", "balance_loss_weight", "mtp_loss_weight"}
CONTEXT_MODEL_KEYS = {"rope_theta", "rope_factor", "rope_scaling", "original_seq_len", "beta_fast", "beta_slow",
                      "mscale", "mscale_all_dim"}
"""How far positions reach: a new run from weights alone may extend it (V3 report, section 4.3)."""
FIXED_KEYS = ("seed", "data.kind", "train.seq_len", "train.batch_size", "train.batch_start", "train.batch_ramp_steps")

_STEP_NAME = re.compile(r"step-(\d{8,12})\.(\d{4,9})-(\d{1,9})", re.ASCII)


def look_back(config: Config, progress: Progress, *, here: bool) -> dict | None:
    """Refuse a checkpoint that the ranks would refuse, before they are started. Returns the summary of a run that is
    complete and is asked for no further step, else None. here: on the ranks' machine; elsewhere a place that cannot be
    seen is theirs to judge."""
    if here and config.checkpoint.dir:
        _check_writable(config.checkpoint.dir)
    try:
        found = _named(config, here=here)
    except NotFit:
        if here:
            raise
        return None
    if found is None:
        if config.resume == "auto" and not config.run.dir and not config.checkpoint.dir:
            raise BadRequest("resume=auto: goes on with the run in run.dir, and none is named; use run.dir=runs/NAME")
        if config.resume == "auto" and config.run.dir:
            progress.say(f"resume=auto: {config.run.dir} has steps but no whole checkpoint; starting from step 0"
                         if storage.exists(storage.join(config.run.dir, METRICS)) else
                         f"notice: nothing to resume in {config.run.dir}: a new run")
        return None
    path, state = found[0], found[1].state
    # The ranks say so of a state that no run has written, and a damaged summary does not keep a run from going on.
    with contextlib.suppress(KeyError, TypeError, AttributeError, NotTrustworthy):
        check_same(config, path, state)
        step = 0 if state.get("weights_only") else state["progress"]["step"]
        if summary := _complete(config, progress, step):
            return summary
        if step > config.train.steps or step == config.train.steps and config.resume != "auto":
            raise BadRequest(f"train.steps={config.train.steps}: resume={config.resume} is at step {step}, and no step "
                             f"would be left; use {step + 1} or more")
    return None


def check_same(config: Config, path: str, state: dict) -> None:
    """Refuse a checkpoint that this config cannot go on from. One that is older than a key has that key's default."""
    weights_only = bool(state.get("weights_only"))
    ours, theirs = to_dict(config), state["config"]
    model = to_dict(ModelConfig()) | theirs["model"]
    free = FREE_MODEL_KEYS | (CONTEXT_MODEL_KEYS if weights_only else set())
    differing = [f"model.{key}={model[key]} there, {value} here" for key, value in ours["model"].items()
                 if key not in free and model[key] != value]
    if differing:
        raise BadRequest(f"resume={path}: a checkpoint of another model: {'; '.join(differing[:4])}; use the same "
                         "model, or start a new run with resume=none")
    if weights_only:
        return _check_tokenizer(config, path, state)
    for key in FIXED_KEYS:
        if _get(ours, key) != _get(theirs, key):
            raise BadRequest(f"{key}={_get(ours, key)}: the checkpoint {path} was written with {_get(theirs, key)}"
                             f", and the order of samples depends on it; use {key}={_get(theirs, key)}")


def check_data(config: Config, digest: str) -> None:
    """`check_same_data` of the checkpoint that `resume` means, before the ranks are started on this machine."""
    if found := _named(config, here=True):
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # as in `look_back`
            check_same_data(config, found[0], found[1].state, digest)


def check_same_data(config: Config, path: str, state: dict, digest: str) -> None:
    """Refuse a checkpoint whose samples this run would not continue. digest: of this run's tokens."""
    if state.get("weights_only") or state["data_digest"] == digest:
        return
    theirs = state["config"]["data"]
    differing = [f"data.{key}={theirs[key]} there, {value} here" for key, value in to_dict(config.data).items()
                 if key != "cache_dir" and theirs.get(key, value) != value]
    raise BadRequest(f"data.path={config.data.path}: is not the text that the checkpoint {path} was trained on: "
                     f"{'; '.join(differing) or 'the files have changed since'}; restore the data, or start a new run "
                     "with resume=none")


def tokenizer_of(path: str, state: dict) -> str:
    """Of a checkpoint at `path`: `byte` or a file, as in training. An imported one has it beside; if not, empty."""
    if not state.get("weights_only"):
        return from_dict(DataConfig, state["config"]["data"]).tokenizer
    beside = os.path.join(os.path.dirname(path.rstrip("/")), TOKENIZER)
    return beside if os.path.isfile(beside) else ""


def newest_under(path: str) -> str | None:
    """What a person means by `path`: this checkpoint, or the newest of this directory of checkpoints or of this run."""
    local = storage.local_path(path)
    if local is not None and os.path.exists(local) and not os.path.isdir(local):
        return None
    if storage.exists(storage.join(path, MANIFEST)):
        return path
    return find_latest(path) or find_latest(storage.join(path, "checkpoints"))


def find_latest(directory: str) -> str | None:
    """The newest committed checkpoint whose manifest is sound. Its shards are not looked at."""
    found = _latest(directory)
    return found and found[0]


def newest_loadable(propose: Callable[[list[str]], str | None],
                    load: Callable[[str, int], SparingError | None]) -> tuple[str | None, dict[str, str]]:
    """The first checkpoint that loads, and why each before it does not. propose(tried): the next to try, if there is
    one. load(path, turn): what keeps it from being loaded.

    Only what is damaged is passed over: storage that is away comes back, and going back in silence would cost the steps
    since.
    """
    damaged: dict[str, str] = {}
    while (path := propose(list(damaged))) is not None:
        error = load(path, len(damaged))
        if error is None:
            return path, damaged
        if not isinstance(error, NotTrustworthy):
            raise error
        damaged[path] = str(error)
    return None, damaged


def list_checkpoints(directory: str, *, retry_s: float = storage.RETRY_S) -> list[str]:
    """Paths of the committed checkpoints in `directory`, oldest first (by step, then attempt)."""
    return [path for path in step_paths(directory, retry_s)
            if storage.exists(storage.join(path, MANIFEST), retry_s=retry_s)]


def step_paths(directory: str, retry_s: float) -> list[str]:
    """Directories of saves, finished or not, by step, attempt and sequence."""
    found = [match for name in storage.list_dir(directory, retry_s=retry_s) if (match := _STEP_NAME.fullmatch(name))]
    found.sort(key=lambda match: tuple(map(int, match.groups())))
    return [storage.join(directory, match[0]) for match in found]


def step_of(path: str) -> int:
    """The step that a checkpoint's name tells."""
    return int(_STEP_NAME.fullmatch(path.rsplit("/", 1)[-1])[1])


def claim_of(path: str) -> int:
    """The claim under which a checkpoint was written."""
    return int(_STEP_NAME.fullmatch(path.rsplit("/", 1)[-1])[2])


def _named(config: Config, *, here: bool) -> tuple[str, Manifest] | None:
    """The checkpoint that `resume` means, as far as it can be seen from here."""
    if config.resume == "none":
        return None
    if config.resume == "auto":
        directory = config.checkpoint.dir or config.run.dir and storage.join(config.run.dir, "checkpoints")
        return _latest(directory) if directory else None
    local = storage.local_path(config.resume)
    if not here and local is not None and not os.path.exists(local):
        return None
    path = newest_under(config.resume)
    if path is None:
        raise BadRequest(f"resume={config.resume}: no whole checkpoint there; name a checkpoint, or a run that has one")
    return path, read_manifest(path)


def _check_writable(folder: str) -> None:
    if (local := storage.local_path(folder)) is None:
        return
    try:
        os.makedirs(local, exist_ok=True)
        tempfile.TemporaryFile(dir=local).close()
    except OSError as error:
        raise NotFit(f"checkpoint.dir={folder}: cannot be written ({error.strerror}); choose another checkpoint.dir"
                     ) from error


def _latest(directory: str) -> tuple[str, Manifest] | None:
    for path in reversed(list_checkpoints(directory)):
        with contextlib.suppress(CorruptManifest):
            return path, read_manifest(path)
    return None


def _complete(config: Config, progress: Progress, step: int) -> dict | None:
    """The summary of a run whose last step is saved, where `train.steps` asks for no other; says so."""
    summary = read_summary(config.run.dir) if config.resume == "auto" and config.run.dir else None
    if summary is None or (summary["status"], summary["steps"], summary["checkpoint"]["error"]) != (
            "completed", step, None) or config.train.steps > step:
        return None
    progress.say(f"run.dir={config.run.dir}: the run is complete at step {step}, and train.steps={config.train.steps} "
                 "changes nothing; a larger number goes on")
    return summary


def _check_tokenizer(config: Config, path: str, state: dict) -> None:
    """Weights from elsewhere are worth nothing under another tokenizer than their own."""
    theirs, ours = tokenizer_of(path, state), config.data.tokenizer
    if theirs and config.data.kind is DataKind.text and not same_ids(load_tokenizer(theirs), load_tokenizer(ours)):
        raise BadRequest(f"data.tokenizer={ours}: is not that of the weights in resume={config.resume}; use "
                         f"data.tokenizer={theirs}")


def _get(values: dict, dotted: str):
    for part in dotted.split("."):
        values = values[part]
    return values
