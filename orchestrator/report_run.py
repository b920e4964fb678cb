"""A run directory read back for the report: its files, its headline figures, its balance. No prose, no drawing."""

from dataclasses import dataclass

from orchestrator.config import Config
from orchestrator.errors import BadRequest, NotTrustworthy
from orchestrator.plan.cost import BUCKETS, dense_equivalents
from orchestrator.report_plots import format_number
from orchestrator.train import storage
from orchestrator.train.finish import SUMMARY, described, format_usd, goes_on, is_dense, read_summary, since
from orchestrator.train.metrics import EVENTS, METRICS, read_lines
from orchestrator.train.run_dir import CONFIG, read_config

LAST_STEPS = 50


@dataclass(frozen=True)
class Run:
    """What a run directory holds. `summary` has the keys of summary.json even where the run has not written one."""

    path: str
    summary: dict
    rows: list[dict]
    events: list[dict]
    config: str
    """Text of config.yaml."""
    is_finished: bool
    label: str = ""
    note: str = ""
    """What stands in for a file that is damaged."""

    def column(self, key: str) -> list:
        return [row.get(key) for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """A headline number with its unit and what it is to be read beside."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Share:
    """One bucket of the ledger."""

    bucket: str
    device_s: float
    share: float
    usd: float | None
    at_optimum: float | None = None
    """The share predicted for the optimal checkpoint interval, where failures and saves have part in the bucket."""


def read_run(path: str) -> Run:
    """Read a run directory; one that is still running or was killed is summed up from its rows."""
    rows = [row for row in read_lines(path, METRICS) if "step" in row]
    events, config, written, note = read_lines(path, EVENTS), _config(path), {}, ""
    try:
        written = read_summary(path) or {}
    except NotTrustworthy:
        note = f"{SUMMARY} is damaged: summed up from the rows"
    if written and goes_on(events):
        written, note = {}, f"{SUMMARY} is of an earlier attempt: summed up from the rows"
    if not (rows or events or config or written or note):
        raise BadRequest(f"report: {path}: is not a run directory (no config.yaml, metrics.jsonl or summary.json "
                         "there); give the directory that `sparing train` printed")
    return Run(path, _filled(written, rows, events, path), rows, events, config, is_finished=bool(written), note=note)


def headline_figures(summary: dict) -> list[Figure]:
    bits, loss, dense = summary["bits_per_byte"], summary["loss"], summary["dense"]
    beside = [f"{name} {bits[name]:.3f}" for name in ("bigram", "gzip") if bits.get(name) is not None]
    devices, device = summary["hardware"].get("devices"), summary["hardware"].get("device") or "device"
    peak = summary["measured"].get("peak_flops_per_s")
    peak_note = "" if peak is None else (f"of {devices} x {peak / 1e12:.3g} TFLOP/s, "
                                         f"{summary['measured'].get('peak_source')}")
    twin = dense.get("equal_total", {})
    mean_of = f"the last {LAST_STEPS} steps" if summary["status"] == "unfinished" else (
        f"kept steps{since(summary)}")
    return [
        Figure("Validation loss", _fixed(loss["validation"], 4), f"nats/token; train {_fixed(loss['train'], 4)}"),
        Figure("Bits per byte", _fixed(bits["validation"], 3), ", ".join(beside) or "on held-out text"),
        Figure("Throughput", format_number(summary["tokens_per_s"]), f"tokens/s, mean of {mean_of}"),
        Figure("MFU", "-" if summary["mfu"] is None else f"{summary['mfu']:.1%}", peak_note),
        Figure("GPU-hours" if "gpu_hours" in summary else "Device-hours", format_number(summary["device_hours"]),
               f"{devices} x {summary['hardware'].get('name') or device}" if devices else "charged so far"),
        Figure("Cost", format_usd(summary["usd_total"]), _price_note(summary["hardware"])),
        Figure("Per million tokens", format_usd(summary["usd_per_million_tokens"]),
               f"{format_number(summary['tokens'])} tokens in {summary['steps']:,} steps"),
        Figure("Dense of equal total", "-", "the model is dense") if is_dense(summary) else
        Figure("Dense of equal total", format_usd(twin.get("usd")),
               f"same tokens at this run's own MFU{since(summary)}; "
               f"{format_number(twin.get('device_hours'))} device-hours"),
    ]


def shares(summary: dict) -> list[Share]:
    """The ledger's buckets in their order, those that are empty left out; dollars at the run's mean price."""
    buckets = summary.get("buckets_s") or {}
    total = sum(buckets.values())
    usd, predicted = summary["usd_total"], (summary.get("checkpoint_interval") or {}).get("predicted_loss", {})
    return [Share(name, seconds, seconds / total, None if usd is None else usd * seconds / total, predicted.get(name))
            for name in (*BUCKETS, *sorted(buckets.keys() - set(BUCKETS)))
            if total and ((seconds := buckets.get(name, 0.0)) or predicted.get(name))]


def interval_note(summary: dict) -> str:
    """How often the run saved, beside the optimum for what its saves cost and how often it fails."""
    told = summary.get("checkpoint_interval")
    if not told:
        return ""
    mean = "once, at the end" if told["saves"] < 2 else f"every {_duration(told['mean_interval_s'])} of training"
    asked = "auto" if told["every"] == "auto" else f"every {told['every']} steps" if told["every"] else "at the end"
    return (f"Saved {mean} (checkpoint.every: {asked}). For saves that cost {told['save_cost_s']:.2g} s and a failure "
            f"in {_duration(told['mtbf_s'])} the optimum is every {_duration(told['optimal_interval_s'])}.")


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def expert_load(run: Run) -> tuple[list[list[float]], list[str], int]:
    """Tokens per expert over the layer's mean, summed over the last steps: [layers][experts], names, steps."""
    counted = [row["moe/tokens_per_expert"] for row in run.rows if row.get("moe/tokens_per_expert")][-LAST_STEPS:]
    if not counted:
        return [], [], 0
    sums = [[sum(per_step) for per_step in zip(*layer, strict=True)] for layer in zip(*counted, strict=True)]
    loads = [[tokens * len(layer) / (sum(layer) or 1) for tokens in layer] for layer in sums]
    prefix = "moe/load_max_over_mean/"
    names = [key.removeprefix(prefix) for key in run.rows[-1] if key.startswith(prefix)]
    return loads, names if len(names) == len(loads) else [f"MoE {i}" for i in range(len(loads))], len(counted)


def _filled(written: dict, rows: list[dict], events: list[dict], path: str) -> dict:
    """A summary with every key that the page reads. An unfinished run's is from its config and its last rows, speed and
    MFU over the same ones; the rest is unknown."""
    last = rows[-1] if rows else {}
    validated = next((row for row in reversed(rows) if row.get("validation/loss") is not None), {})
    summary = {
        "status": "unfinished", "name": "", "run_dir": path, "steps": last.get("step", 0),
        "tokens": last.get("tokens/total", 0),
        "attempts": sum(event.get("kind") == "attempt_claimed" for event in events),
        "loss": {"train": last.get("train/loss"), "validation": validated.get("validation/loss")},
        "bits_per_byte": {"validation": validated.get("validation/bits_per_byte"), "bigram": None, "gzip": None},
        "tokens_per_s": _mean_rate(rows, "tokens/per_s"), "mfu": _mean_rate(rows, "perf/mfu"),
        "device_hours": last.get("cost/device_hours"),
        "usd_total": last.get("cost/usd_total"), "usd_per_million_tokens": last.get("cost/usd_per_million_tokens"),
        "buckets_s": {}, "predicted": {}, "measured": {"model_flops_total": last.get("flops/model_total")}, "model": {},
        "layout": {}, "hardware": {},
    }
    twins = {"equal_total": {}, "equal_active": {}}
    if not written and (config := _parsed(path)) is not None:
        summary |= described(config, device=config.hardware.device, devices=config.layout.world_size,
                             spares=config.cluster.spares)
        twins = dense_equivalents(config.model, summary["tokens"], seq_len=config.train.seq_len, mfu=None,
                                  peak_flops_per_s=None, usd_per_h=None, devices=1)
    summary["dense"] = {name: twin | {"device_hours": last.get(f"cost/dense_{name}_device_hours"),
                                      "usd": last.get(f"cost/dense_{name}_usd")} for name, twin in twins.items()}
    return summary | written


def _mean_rate(rows: list[dict], key: str) -> float | None:
    """Over the last steps, all of one size as a rule: the harmonic mean."""
    recent = [row[key] for row in rows[-LAST_STEPS:] if row.get(key)]
    return len(recent) / sum(1 / rate for rate in recent) if recent else None


def labelled(runs: list[Run]) -> list[Run]:
    """Names for the legends: the run's own, its directory's where those are not distinct."""
    names = [run.summary["name"] or run.path.rstrip("/").rsplit("/", 1)[-1] for run in runs]
    if len(set(names)) < len(names):
        names = [run.path.rstrip("/").rsplit("/", 1)[-1] for run in runs]
    if len(set(names)) < len(names):
        names = [run.path for run in runs]
    return [Run(**(vars(run) | {"label": name})) for run, name in zip(runs, names, strict=True)]


def _config(path: str) -> str:
    at = storage.join(path, CONFIG)
    return storage.read_bytes(at).decode(errors="replace") if storage.exists(at) else ""


def _parsed(path: str) -> Config | None:
    try:
        return read_config(storage.join(path, CONFIG))
    except BadRequest:
        return None


def _price_note(hardware: dict) -> str:
    price = hardware.get("usd_per_h")
    if price is None:
        return "hardware.usd_per_h is not set" if hardware else "so far"
    dated = ", ".join(part for part in (hardware.get("market"), hardware.get("date")) if part)
    return f"{format_usd(price)} a device-hour" + (f" ({dated.replace('_', ' ')})" if dated else "")


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
