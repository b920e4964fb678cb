"""The end of a run: close its ledger and write summary.json, the result that other programs read.

Every key is always there; what is not known is null. A run that failed is summed up from the rows it left.
"""

import contextlib
import json
import math
from statistics import median

from model import count
from orchestrator.config import Config
from orchestrator.errors import NotTrustworthy
from orchestrator.plan import cost
from orchestrator.plan.cost import Ledger
from orchestrator.train import storage
from orchestrator.train.metrics import EVENTS, METRICS, append_event, read_lines

SUMMARY = "summary.json"
MEASURED_STEPS = 1000
"""At a run's end, that medians are of."""
BILL = ("device_hours", "gpu_hours", "usd_total", "usd_per_million_tokens", "goodput", "buckets_s", "attempts",
        "placed_at", "released_at")
"""What an attempt adds to, whatever comes of it."""


def finish_run(config: Config, result: dict, *, placed_at: float, released_at: float, devices: int, attempts: int,
               spares: int = 0, refused: bool = False, failure: dict | None = None) -> dict:
    """Sum the run up and write it into the run directory. placed_at, released_at: unix times of the last attempt;
    devices, spares: held at its end, with a rank and without. refused: the attempt was asked for what cannot be, which
    takes nothing from a run that is complete but the money. failure: what the event of a failed attempt says."""
    earlier = earlier_end(config.run.dir)
    if result.get("ledger") is None or result.get("tokens_per_s") is None:
        rows = read_lines(config.run.dir, METRICS)
    if result.get("ledger") is not None and result.get("tokens_per_s") is None:  # it went on where nothing was to do
        result = result | _rates(rows)
    if result.get("ledger") is None:
        earlier_s = earlier["measured"]["charged_s"] if earlier and earlier["attempts"] < attempts else 0.0
        left = _result_from_rows(rows, earlier_s=earlier_s, held_s=released_at - placed_at, released_at=released_at,
                                 devices=devices, spares=spares)
        result = left | {key: value for key, value in result.items() if value is not None}
    summary = summarise(config, result, placed_at=placed_at, released_at=released_at, devices=devices,
                        attempts=attempts, spares=spares)
    if refused and earlier and earlier["status"] == "completed":
        measured = earlier["measured"] | {key: summary["measured"][key] for key in ("charged_s", "wall_s")}
        summary = earlier | {key: summary[key] for key in BILL if key in summary} | {"measured": measured}
    append_event(config.run.dir, "run_ended" if failure is None else "run_failed", **(failure or {}), attempt=attempts,
                 charged_s=summary["measured"]["charged_s"])
    storage.write_bytes(storage.join(config.run.dir, SUMMARY), (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def read_summary(run_dir: str) -> dict | None:
    """The summary an earlier attempt left, if any."""
    return read_kept(run_dir, SUMMARY)


def read_kept(run_dir: str, name: str) -> dict | None:
    """A JSON object that a run keeps in its directory, if it is there; `NotTrustworthy` where it is damaged."""
    path = storage.join(run_dir, name)
    if not storage.exists(path):
        return None
    try:
        kept = json.loads(storage.read_bytes(path))
    except ValueError:
        kept = None
    if not isinstance(kept, dict):
        raise NotTrustworthy(f"{path}: is damaged, no JSON object; `sparing report {run_dir}` sums up from the rows, "
                             "and resume=auto goes on and writes it anew")
    return kept


def earlier_end(run_dir: str) -> dict | None:
    """The summary of the last attempt that ended. Where it is damaged or gone, what the event of that end says in its
    stead: `attempts` and `charged_s`, so that a bill never goes back."""
    with contextlib.suppress(NotTrustworthy, KeyError, TypeError):
        if (summary := read_summary(run_dir)) and summary["attempts"] and summary["measured"]["charged_s"] >= 0:
            return summary
    for event in reversed(read_lines(run_dir, EVENTS)):
        if event.get("kind") in ("run_ended", "run_failed") and event.get("charged_s") is not None:
            return {"status": None, "attempts": event["attempt"], "measured": {"charged_s": event["charged_s"]}}
    return None


def goes_on(events: list[dict]) -> bool:
    """Whether an attempt has begun and not ended: what summary.json says is of one before. events: of events.jsonl."""
    kinds = [event["kind"] for event in events if event.get("kind") in ("attempt_claimed", "run_ended", "run_failed")]
    return kinds[-1:] == ["attempt_claimed"]


def summarise(config: Config, result: dict, *, placed_at: float, released_at: float, devices: int,
              attempts: int, spares: int = 0) -> dict:
    """The summary as data. `result` is the loop's; its ledger goes on to be charged until `released_at`."""
    price = config.hardware.usd_per_h
    ledger = (Ledger.from_dict(result["ledger"], devices=devices, usd_per_h=price, since=result["ledger"]["at"],
                               spares=spares)
              if result.get("ledger") else Ledger(devices, price, placed_at, spares=spares))
    ledger.close(released_at)
    tokens, tokens_per_s = result.get("tokens") or 0, result.get("tokens_per_s")
    flops, peak = cost.model_flops(config.model, 1, config.train.seq_len), result.get("peak_flops_per_s")
    mfu = cost.mfu(flops * tokens_per_s, devices=devices, peak_flops_per_s=peak) if tokens_per_s else None
    dense = cost.dense_equivalents(config.model, tokens, seq_len=config.train.seq_len, mfu=mfu, peak_flops_per_s=peak,
                                   usd_per_h=price, devices=devices)
    bits = result.get("bits_per_byte") or {}
    device = result.get("device") or config.hardware.device
    bill = _bill(ledger, tokens, released_at=released_at, gpu=device == "cuda")
    return _finite({
        "status": result.get("status", "failed"),
        "steps": result.get("steps") or 0,
        "tokens": tokens,
        "loss": {"train": result.get("loss_train"), "validation": result.get("loss_validation")},
        "bits_per_byte": {key: bits.get(key) for key in ("validation", "bigram", "gzip")},
        "tokens_per_s": tokens_per_s,
        "mfu": mfu,
        **bill,
        "dense": {"at": "this run's own MFU, productive time only", **dense},
        "predicted": result.get("predicted") or {},
        "measured": _measured(config, result, devices=devices, flops=flops) | {
            "charged_s": ledger.charged_s(released_at), "wall_s": released_at - placed_at,
            "steps_usd": None if bill["usd_total"] is None else bill["usd_total"] * (bill["goodput"] or 0.0)},
        **described(config, device=device, devices=devices, spares=spares),
        "checkpoint": result.get("checkpoint") or {"path": None, "step": None, "error": None},
        "checkpoint_interval": result.get("checkpoint_interval"),
        "attempts": attempts,
        "run_dir": config.run.dir,
        "placed_at": placed_at,
        "released_at": released_at,
        "wandb_id": result.get("wandb_id"),
    })


def described(config: Config, *, device: str, devices: int, spares: int) -> dict:
    """What trains on what: the keys of a summary that are known beforehand."""
    parts = count.parameters(config.model)
    price = {key: getattr(config.hardware, key) for key in ("name", "usd_per_h", "market", "source", "date")}
    return {
        "name": config.run.name,
        "model": {"name": config.model.name, "parameters": parts.total,
                  "active_parameters": count.active(parts, config.model).total},
        "layout": {"pp": config.layout.pp, "dp": config.layout.dp, "ep": config.layout.ep,
                   "schedule": config.layout.schedule.name, "microbatches": config.layout.microbatches},
        "hardware": price | {"device": device, "devices": devices, "spares": spares},
    }


def _bill(ledger: Ledger, tokens: int, *, released_at: float, gpu: bool) -> dict:
    """Of a ledger that is closed."""
    usd, charged_s = ledger.usd(released_at), ledger.charged_s(released_at)
    return {
        "device_hours": charged_s / 3600,
        **({"gpu_hours": charged_s / 3600} if gpu else {}),
        "usd_total": usd,
        "usd_per_million_tokens": cost.usd_per_million_tokens(usd, tokens),
        "goodput": ledger.buckets_s["goodput"] / charged_s if charged_s else None,
        "buckets_s": ledger.buckets_s,
    }


def _measured(config: Config, result: dict, *, devices: int, flops: float) -> dict:
    """flops: the model's, of one token."""
    tokens_per_s, peak = result.get("tokens_per_s"), result.get("peak_flops_per_s")
    return {
        **(result.get("medians") or medians([])),
        "since_step": result.get("since_step"),
        "machine": result.get("machine"),
        "memory_peak_gib": result.get("memory_peak_gib"),
        "skipped_steps": result.get("skipped_steps"),
        "loss_spikes": result.get("loss_spikes"),
        "rollbacks": result.get("rollbacks"),
        "tokens_per_s_per_rank": tokens_per_s / devices if tokens_per_s else None,
        "model_flops_total": result.get("model_flops_total") or flops * (result.get("tokens") or 0),
        "model_flops_per_token": flops,
        "peak_flops_per_s": peak,
        "peak_source": _peak_source(config, peak),
        "mfu_convention": cost.MFU_CONVENTION,
    }


def headline(summary: dict) -> list[str]:
    """The last block on the screen: what came out, beside what it is measured by."""
    bits, lines = summary["bits_per_byte"], []
    lines.append(f"{summary['status']}: {_plural(summary['steps'], 'step')}, {summary['tokens']:,} tokens, "
                 f"{_plural(summary['attempts'], 'attempt')}")
    if summary["loss"]["validation"] is not None:
        lines.append(f"loss      {summary['loss']['validation']:.4f} nats/token on held-out text")
    if bits["validation"] is not None:
        beside = [f"{name} {bits[name]:.3f}" for name in ("bigram", "gzip") if bits[name] is not None]
        lines.append(f"quality   {bits['validation']:.3f} bits per byte" + (f" ({', '.join(beside)})" * bool(beside)))
    if summary["tokens_per_s"] is not None:
        mfu = "" if summary["mfu"] is None else f", MFU {summary['mfu']:.1%} of {_peak(summary)}"
        lines.append(f"speed     {summary['tokens_per_s']:,.0f} tokens/s{since(summary)}{mfu}")
    goodput = "" if summary["goodput"] is None else f", goodput {summary['goodput']:.0%}"
    unit = "GPU-hours" if "gpu_hours" in summary else "device-hours"
    lines.append(f"cost      {format_usd(summary['usd_total'])}, {summary['device_hours']:.4g} {unit}{goodput}")
    if summary["usd_total"] is None:
        lines[-1] += " (set hardware.usd_per_h to see dollars)"
    if summary["usd_per_million_tokens"] is not None:
        lines.append(f"          {format_usd(summary['usd_per_million_tokens'])} per million tokens")
    for name, twin in (("total", summary["dense"]["equal_total"]), ("active", summary["dense"]["equal_active"])):
        if twin["device_hours"] is not None and not is_dense(summary):
            lines.append(f"dense     {format_usd(twin['usd'])}, {twin['device_hours']:.4g} {unit} for equal {name} "
                         f"parameters, same tokens, this MFU{since(summary)}")
    saved = summary["checkpoint"]
    if saved["error"] is not None:
        lines.append(f"NOT SAVED {saved['error']}; " + (f"the newest checkpoint is of step {saved['step']}"
                                                        if saved["step"] is not None else "there is no checkpoint"))
    return lines


def is_dense(summary: dict) -> bool:
    """Whether the model is its own dense twin, as one without experts is."""
    total, active = (summary["dense"].get(name, {}).get("device_hours") for name in ("equal_total", "equal_active"))
    return total is not None and total == active


def since(summary: dict) -> str:
    """Which steps speed and MFU are of, where it is not all: those since the run last began or recovered."""
    step = summary["measured"].get("since_step")
    return f" since step {step:,}" if step else ""


def format_usd(usd: float | None) -> str:
    """Dollars to three significant digits below $100, whole cents above; an unknown cost is said to be unknown."""
    if usd is None:
        return "unknown"
    if usd == 0 or usd >= 100:
        return f"${usd:,.2f}"
    return f"${usd:.{max(2, 2 - math.floor(math.log10(usd)))}f}"


def _peak(summary: dict) -> str:
    measured = summary["measured"]
    return (f"{summary['hardware']['devices']} x {measured['peak_flops_per_s'] / 1e12:.3g} TFLOP/s "
            f"({measured['peak_source']})")


def _peak_source(config: Config, peak: float | None) -> str | None:
    """Whether MFU is against a published peak or against what this machine's GEMM was seen to do."""
    if peak is None:
        return None
    published = {"bf16": config.hardware.bf16_tflops, "fp32": config.hardware.fp32_tflops}
    dtypes = [name for name, tflops in published.items() if tflops and math.isclose(tflops * 1e12, peak)]
    return f"{dtypes[0]} peak" if dtypes else "measured GEMM"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _result_from_rows(rows: list[dict], *, earlier_s: float, held_s: float, released_at: float, devices: int,
                      spares: int) -> dict:
    """What a failed attempt left behind: last figures and buckets by its last row.

    It is charged for as long as it held its devices, `held_s`, beside what attempts before it were by their summary,
    `earlier_s` device-seconds, and not less than its last row showed.
    """
    if not rows and not earlier_s:
        return {}
    last = rows[-1] if rows else {"step": 0}
    charged_s = max((last.get("cost/device_hours") or 0.0) * 3600, earlier_s + held_s * (devices + spares))
    ledger = {"at": released_at - charged_s / (devices + spares), "charged_s": 0.0, "usd": 0.0,
              "buckets_s": {name: last.get(f"cost/bucket_s/{name}") or 0.0 for name in cost.BUCKETS}}
    validated = [row for row in rows if row.get("validation/loss") is not None]
    return {
        "status": "failed", "steps": last["step"], "tokens": last.get("tokens/total"),
        "loss_train": last.get("train/loss"),
        "loss_validation": validated[-1]["validation/loss"] if validated else None,
        "bits_per_byte": {"validation": validated[-1].get("validation/bits_per_byte")} if validated else {},
        "ledger": ledger,
        **{key: last.get(f"train/{key.removesuffix('_steps')}_total")
           for key in ("skipped_steps", "loss_spikes", "rollbacks")},
        **_rates(rows),
    }


def _rates(rows: list[dict]) -> dict:
    """Of all kept steps that rows speak of."""
    rates = [row["tokens/per_s"] for row in rows if row.get("tokens/per_s") and not row.get("train/skipped")]
    return {"tokens_per_s": len(rates) / math.fsum(1 / rate for rate in rates) if rates else None,
            "since_step": 0, "medians": medians(rows)}


def medians(rows: list[dict]) -> dict:
    """What a step takes and its parts, and tokens a second at that, over the last kept steps of as many tokens as the
    very last, but for the first row, which warms up, where there are others. rows: of metrics.jsonl."""
    kept = [(round(row["tokens/per_s"] * row["time/step_s"]), row) for row in rows[-MEASURED_STEPS:]
            if row.get("tokens/per_s") and row.get("time/step_s") and not row.get("train/skipped")]
    counted = [row for size, row in kept if size == kept[-1][0]]
    counted = counted[counted[0] is rows[0] and len(counted) > 1 :] if counted else []
    names = sorted(set.intersection(*(set(row) for row in counted))) if counted else []
    found = {name.removeprefix("time/"): median(row[name] for row in counted)
             for name in names if name.startswith("time/")}
    step_s = found.pop("step_s", None)
    return {"step_time_s": step_s, "tokens_per_s": kept[-1][0] / step_s if step_s else None,
            "median_of_steps": len(counted), **found}


def _finite(value):
    """NaN and infinity are no JSON; a figure that is neither known nor finite is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


