"""`sparing compare`: a mixture of experts and its dense twins, trained on the same data, held against each other.

Each run is an ordinary `sparing train` in a directory of its own below `out`, so a comparison that was interrupted goes
on where it stopped. What is reported was measured; only the part about another size is an extrapolation, and says so.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html import escape
from itertools import product

from model import count
from model.config import ModelConfig
from orchestrator.arguments import check_folder, taken
from orchestrator.compose import compose_config
from orchestrator.config import Config, to_dict
from orchestrator.errors import INTERRUPTED, BadRequest, Preempted, SparingError
from orchestrator.plan.cost import model_flops
from orchestrator.plan.layout import check_run
from orchestrator.plan.money import TWINS, equal_loss_of
from orchestrator.plan.multiplier import Curve, multiplier, spread
from orchestrator.plan.request import Request
from orchestrator.plan_format import dollars
from orchestrator.report_plots import Series, line_chart
from orchestrator.report_run import Run, read_run
from orchestrator.report_style import document, figure, table
from orchestrator.train import storage
from orchestrator.train.finish import SUMMARY, earlier_end
from orchestrator.train.run_dir import CONFIG, read_config
from orchestrator.words import plain, quoted

HELP = """\
usage: sparing compare [KEY=VALUE ...] [seeds=0,1] [out=DIR] [at='PLAN']

  sparing compare experiment=tiny                     the mixture and its dense twins, two seeds: six short runs
  sparing compare experiment=tiny seeds=0,1,2 train.steps=400 out=runs/compare
  sparing compare experiment=tiny at='model=deepseek_v3 cluster=h800_2048 tokens=14.8e12'

Trains the model, a dense model of equal active and one of equal total parameters, on the same data in the same order,
and reports what each loss cost in FLOPs, device-hours and dollars; writes compare.json and compare.html. With out=DIR
the same command goes on with a comparison that was interrupted. Keys are those of train; the learning rate does not
decay, so that each validation stands for a run of its length.
at= takes the words of a plan, and says what both would cost there: an extrapolation, far beyond what was measured."""
OPTIONS = ("seeds", "out", "at")
STOPPED = (Preempted.exit_code, INTERRUPTED, -signal.SIGINT)
"""How a run ends after Ctrl-C: with a checkpoint, with nothing to save yet, before Python was up."""
TRAINED_BY = ("model", "train", "layout", "data", "optim", "precision")
"""Parts of a config that a run's losses and times follow from."""
COSTS = {"flops": "FLOPs", "device_s": "device-seconds", "usd": "dollars"}


def run(arguments: list[str]) -> int:
    named, overrides = taken(plain(arguments), OPTIONS)
    reserved = [word for word in overrides if word.startswith(("run.dir=", "seed=", "resume=", "-"))]
    if reserved:
        raise BadRequest(f"{reserved[0]}: is set by compare for each of its runs; leave it out, use seeds=0,1 or "
                         "out=DIR")
    seeds = _seeds(named.get("seeds", "0,1"))
    config = compose_config(overrides)
    commands = {name: [*overrides, *changes] for name, changes in variants(config).items()}
    configs = {name: compose_config(words) for name, words in commands.items()}
    for each in configs.values():
        check_run(each)
    at = plan_at(named["at"]) if "at" in named else None
    check_folder(named, "out")
    out = named.get("out") or f"runs/compare-{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if any(storage.exists(storage.join(out, name)) for name in (CONFIG, SUMMARY)):
        raise BadRequest(f"out={out}: is a run's own directory; name a new folder, or that of an earlier comparison")
    _check_earlier(configs, seeds, out)
    result = compare(_train_all(commands, seeds, out, steps=config.train.steps), configs)
    if at is not None:
        result["extrapolated"] = extrapolate(named["at"], *at, result)
    storage.write_bytes(storage.join(out, "compare.json"), (json.dumps(result, indent=1) + "\n").encode())
    storage.write_bytes(storage.join(out, "compare.html"), page(result).encode())
    print("\n" + "\n".join(lines(result)) + f"\nwrote     {storage.join(out, 'compare.json')}, compare.html")
    return 0


def variants(config: Config) -> dict[str, list[str]]:
    """Overrides that turn the asked-for run into each of the three that are compared."""
    if config.model.n_routed_experts == 0:
        raise BadRequest(f"model.name={config.model.name}: has no experts to compare with a dense model; choose a "
                         "mixture of experts, as in model=tiny")
    steps, every = config.train.steps, config.train.validate_every
    common = ["optim.schedule=wsd", "optim.decay_fraction=0", "checkpoint.every=0"]
    if not 0 < every <= steps // 8:
        common.append(f"train.validate_every={max(1, steps // 10)}")
    found = {"moe": common}
    for name, twin_of in TWINS.items():
        try:
            twin = twin_of(config.model)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        found[name] = [*common, *_changes(config.model, twin), "layout.ep=1", "layout.ep_per_node=0"]
    return found


def _check_earlier(configs: dict[str, Config], seeds: list[int], out: str) -> None:
    """Refuse to take runs of other settings, finished or begun, for those that are asked for."""
    for seed, (name, config) in product(seeds, configs.items()):
        path = storage.join(out, f"{name}-seed{seed}")
        if not storage.exists(storage.join(path, CONFIG)):
            continue
        theirs, ours = to_dict(read_config(storage.join(path, CONFIG))), to_dict(config)
        differing = [f"{part}.{key}={theirs[part][key]} there, {value} here" for part in TRAINED_BY
                     for key, value in ours[part].items() if theirs[part][key] != value]
        if differing:
            raise BadRequest(f"out={out}: holds {name}-seed{seed} of another command: {'; '.join(differing[:4])}; give "
                             "another out=DIR, or the command that made it")


def compare(runs: dict[str, list[Run]], configs: dict[str, Config]) -> dict:
    """The result: curves of every run, and the ratio at equal loss by each cost, over the seeds. JSON."""
    config = configs["moe"]
    result = {"model": config.model.name, "steps": config.train.steps, "seq_len": config.train.seq_len,
              "batch_size": config.train.batch_size, "hardware": config.hardware.name, "variants": {}, "multiplier": {}}
    curves = {}
    for name, seeds in runs.items():
        model = configs[name].model
        parts = count.parameters(model)
        curves[name] = {cost: [curve_of(one, model, config.train.seq_len, cost) for one in seeds] for cost in COSTS}
        result["variants"][name] = {
            "parameters": parts.total, "active_parameters": count.active(parts, model).total,
            "loss": spread([one.summary["loss"]["validation"] for one in seeds]),
            "tokens": seeds[0].summary["tokens"], "runs": [one.path for one in seeds], "curves": curves[name]}
    for twin in TWINS:
        result["multiplier"][twin] = {}
        for cost in COSTS:
            pairs = [multiplier(*pair) for pair in zip(curves["moe"][cost], curves[twin][cost], strict=True)]
            if pairs and all(pairs):
                result["multiplier"][twin][cost] = spread([ratio for ratio, _ in pairs])
    return result


def curve_of(one: Run, model: ModelConfig, seq_len: int, cost: str) -> Curve:
    """(cost of the kept steps so far, validation loss) at every validation; empty where the price is unknown."""
    devices = one.summary["hardware"].get("devices") or 1
    usd_per_h = one.summary["hardware"].get("usd_per_h")
    points, seconds = [], 0.0
    for row in one.rows:
        seconds += row["time/step_s"]
        value = {"flops": model_flops(model, row["tokens/total"], seq_len), "device_s": seconds * devices,
                 "usd": None if usd_per_h is None else seconds * devices / 3600 * usd_per_h}[cost]
        if row.get("validation/loss") is not None and value is not None:
            points.append((value, row["validation/loss"]))
    return points


def plan_at(words: str) -> tuple[Request, dict]:
    """The plan at a size that the user names; `BadRequest` before anything is trained."""
    from orchestrator.show_plan import planned, split_words

    found, data = planned(*split_words(words.split()))
    if not found.candidates:
        raise BadRequest(f"at={words}: no layout of it fits; name more devices")
    if "equal_loss" not in data["dense"]:
        raise BadRequest(f"at={words}: model={found.request.model.name} has no experts to compare with a dense model; "
                         "name a mixture of experts")
    return found.request, data


def extrapolate(words: str, request: Request, data: dict, result: dict) -> dict:
    """The mixture's own steady bill there, and what a dense model of equal loss would cost, were the multiplier that
    was measured here to hold."""
    return {"at": words, "model": request.model.name, "devices": request.devices, "hardware": request.hardware.name,
            "tokens": request.tokens, "flops": model_flops(request.model, request.tokens, request.seq_len),
            "usd": data["bill"]["steady"]["usd"], "device_hours": data["bill"]["steady"]["gpu_hours"],
            "twin": "equal_active", "dense": equal_loss_of(request, data["dense"], result)["measured"],
            "measured_flops": result["variants"]["moe"]["curves"]["flops"][0][-1][0]}


def lines(result: dict) -> list[str]:
    """What the command prints."""
    said = [f"{'':14}{'parameters':>18}{'active':>18}{'loss':>9}  lowest to highest of the seeds"]
    for name, found in result["variants"].items():
        loss = found["loss"]
        said.append(f"{name:14}{found['parameters']:>18,}{found['active_parameters']:>18,}{loss['median']:>9.4f}  "
                    f"{_range(loss, '{:.4f}'.format)}")
    for twin, ratios in result["multiplier"].items():
        for cost, ratio in ratios.items():
            said.append(f"{twin}: at equal loss the dense model takes {ratio['median']:.2f}x the mixture's "
                        f"{COSTS[cost]} ({_range(ratio, '{:.2f}'.format)}): {_verdict(ratio)}")
    if result["variants"]["moe"]["loss"]["seeds"] == 1:
        said.append("one seed has no range to judge by; give more, as in seeds=0,1,2")
    return said + extrapolated(result.get("extrapolated"))


def _range(found: dict, said: Callable[..., str]) -> str:
    """From the lowest to the highest of the seeds."""
    if found["seeds"] == 1:
        return "1 seed, no range"
    return f"{said(found['low'])} to {said(found['high'])}, {found['seeds']} seeds"


def _verdict(ratio: dict) -> str:
    if ratio["seeds"] == 1:
        return "no verdict"
    return "the mixture is cheaper" if ratio["low"] > 1 else (
        "the dense model is cheaper" if ratio["high"] < 1 else "no clear winner")


def extrapolated(far: dict | None) -> list[str]:
    if far is None:
        return []
    said = [f"{far['model']} on {far['devices']:,} x {far['hardware']}, {far['tokens']:.4g} tokens (predicted): "
            f"{dollars(far['usd'])}"]
    if far["dense"] is None:
        return [*said, f"          no multiplier was measured against {far['twin']}, so no dense model is priced there"]
    cost = f"{dollars(far['dense']['median']['usd'])} ({_range(far['dense'], lambda line: dollars(line['usd']))})"
    return [*said, f"          a dense model of equal loss, by the FLOPs of {far['twin']}: {cost}, EXTRAPOLATED from "
                   f"runs of {far['flops'] / far['measured_flops']:.0e} times fewer: a multiplier seldom holds so far"]


def page(result: dict) -> str:
    """One self-contained HTML page."""
    plots = []
    for cost, unit in COSTS.items():
        series = [Series(name if seed == 0 else f"{name}, seed {seed}", [x for x, _ in curve], [y for _, y in curve],
                         colour, in_legend=seed == 0)
                  for colour, (name, found) in enumerate(result["variants"].items())
                  for seed, curve in enumerate(found["curves"][cost])]
        plots.append(figure(f"Loss against {unit}", "measured, kept steps only; every line is one seed",
                            line_chart(series, x_label=unit, y_label="nats / token")))
    head = ["", *COSTS.values()]
    rows = [[twin, *(f"{ratios[cost]['median']:.2f} ({_range(ratios[cost], '{:.2f}'.format)})"
                     if cost in ratios else "unknown" for cost in COSTS)]
            for twin, ratios in result["multiplier"].items()]
    return document("comparison - Sparing", [
        f"<h1>{escape(result['model'])} and its dense twins</h1>", f'<section class="grid">{"".join(plots)}</section>',
        figure("Dense over mixture at equal loss", "above 1 the mixture is cheaper; measured, median and range of the "
               "seeds", table(head, rows), wide=True)])


def _train_all(commands: dict[str, list[str]], seeds: list[int], out: str, *, steps: int) -> dict[str, list[Run]]:
    """One `sparing train` per variant and seed, in turns over the seeds; those that are complete are read back."""
    runs = {name: [] for name in commands}
    total, done = len(commands) * len(seeds), 0
    for seed in seeds:
        for name, words in commands.items():
            path, done = storage.join(out, f"{name}-seed{seed}"), done + 1
            if (earlier_end(path) or {}).get("status") != "completed":  # those that failed have a summary, too
                print(f"\nrun {done} of {total}: {name}, seed {seed}", flush=True)
                begun = ["resume=auto"] * storage.exists(storage.join(path, CONFIG))
                code = _train([*words, f"seed={seed}", f"run.dir={quoted(path)}", *begun])
                if code in STOPPED:
                    raise Preempted(f"compare: {path} was stopped; the same command with out={out} goes on from there")
                if code:
                    raise SparingError(f"compare: {path} ended with exit code {code}; its message stands above, and "
                                       f"the same command with out={out} goes on from there")
            one = read_run(path)
            if one.summary["status"] != "completed" or one.summary["steps"] != steps:
                raise BadRequest(f"out={out}: holds {name}-seed{seed}, a run of {one.summary['steps']} steps that "
                                 f"ended as {one.summary['status']}; give another out=DIR, or the command that made it")
            runs[name].append(one)
    return runs


def _train(words: list[str]) -> int:
    """A process of its own, so that nothing of one run is left in the next. A run that hears Ctrl-C, as we do, has time
    for its checkpoint."""
    with subprocess.Popen([sys.executable, "-m", "orchestrator", "train", *words]) as run:
        try:
            return run.wait()
        except KeyboardInterrupt:
            return run.wait() or Preempted.exit_code


def _changes(model: ModelConfig, twin: ModelConfig) -> list[str]:
    """Overrides that turn one model into the other."""
    old, new = to_dict(model), to_dict(twin)
    return [f"model.{key}={json.dumps(new[key]) if isinstance(new[key], bool) else new[key]}"
            for key in (field.name for field in dataclasses.fields(ModelConfig)) if old[key] != new[key]]


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    seeds = [int(word) for word in words if word.strip().isdecimal()]
    if len(seeds) != len(words) or len(set(seeds)) != len(seeds):
        raise BadRequest(f"seeds={text}: must be different whole numbers with commas between, as in seeds=0,1")
    return seeds
