"""`sparing plan`: from a command's words to a plan, its table, plan.json and page. All figures are predicted."""

import json
from dataclasses import fields
from pathlib import Path

from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest, NotFit
from orchestrator.plan.bill import Terms
from orchestrator.plan.forecast import shared_cores
from orchestrator.plan.hardware import at_market
from orchestrator.plan.money import money, terms_of
from orchestrator.plan.planner import Plan, Request, default_batch, make_plan, to_json
from orchestrator.plan.workload import Assumptions
from orchestrator.plan_explain import print_explained
from orchestrator.plan_page import page
from orchestrator.plan_table import print_plan, reasons
from orchestrator.train.expected import read_calibration

TERMS = tuple(f.name for f in fields(Terms) if not f.name.startswith(("validate", "batch", "ramp")))
OPTIONS = ("tokens", "gpus", "dtype", "out", "html", "explain", "market", "multiplier_from", "calibrate", *TERMS)


def run(arguments: list[str]) -> int:
    """`sparing plan ARGUMENTS`; returns the exit code."""
    if arguments[:1] in (["prices"], ["budgets"]):
        from orchestrator.plan_published import print_budgets, print_prices

        {"prices": print_prices, "budgets": print_budgets}[arguments[0]]()
    elif arguments[:1] == ["diff"]:
        from orchestrator.plan_diff import plan_diff

        plan_diff(arguments[1:])
    elif {"-m", "--multirun"} & set(arguments):
        from orchestrator.plan_sweep import plan_sweep

        plan_sweep([word for word in arguments if word not in ("-m", "--multirun")])
    else:
        plan(*split_words(arguments))
    return 0


def split_words(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The plan's own options, and overrides of the config."""
    named = dict(word.split("=", 1) for word in arguments if word.split("=", 1)[0] in OPTIONS and "=" in word)
    return named, [word for word in arguments if word.split("=", 1)[0] not in OPTIONS]


def plan(options: dict[str, str], overrides: list[str]) -> None:
    """Print the best layouts, the bills and why others were refused; write the whole as JSON where `out` says."""
    if options.get("explain", "false") not in ("true", "false"):
        raise BadRequest(f"explain={options['explain']}: must be true or false; use explain=true")
    found, data = planned(options, overrides)
    if options.get("out"):
        write("out", options["out"], json.dumps(data, indent=2) + "\n")
    if options.get("html") and found.candidates:
        write("html", options["html"], page(found, data))
    print_plan(found, data)
    if not found.candidates:
        raise NotFit(f"gpus={found.request.devices}: no layout of model={found.request.model.name} fits; use more "
                     "devices, devices with more memory, or a smaller model")
    if options.get("explain") == "true":
        print_explained(found, data)
    for key in ("out", "html"):
        if options.get(key):
            print(f"wrote     {options[key]}")


def write(key: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise BadRequest(f"{key}={path}: cannot be written ({error.strerror}); give a file in a folder that exists and "
                         "may be written") from None


def planned(options: dict[str, str], overrides: list[str], compared: dict | None = None) -> tuple[Plan, dict]:
    """The plan and what plan.json says of it. compared: the result of `sparing compare`, instead of its file."""
    config = compose_config(overrides)
    given = {text.lstrip("+").split("=", 1)[0] for text in overrides}
    request = read_request(options, config, given)
    compared = _compared(options["multiplier_from"]) if "multiplier_from" in options else compared
    try:
        terms = _terms(options, config)
        found = make_plan(request)
        data = json.loads(to_json(found))
        if found.candidates:
            best = found.candidates[0]
            if "train.validate_sequences" not in given:  # as the printed command for `train` has it
                terms = terms_of({"validate_sequences": str(best.work.dp * best.work.microbatches)}, terms)
            data |= money(request, best, terms, compared)
            for row, why in zip(data["candidates"], reasons(data["candidates"]), strict=True):
                row["why"] = why
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return found, data


def read_request(options: dict[str, str], config, given: set[str]) -> Request:
    calibration = read_calibration(options.get("calibrate"), "calibrate")
    if config.hardware.device != "cuda" and not calibration.cores:
        raise BadRequest(f"hardware={config.hardware.name}: a plan needs a GPU's data sheet; use hardware=h100 (or "
                         "a100, h800, h200, b200), a cluster that names one, or calibrate=RUN, a run on this CPU")
    devices = config.cluster.nodes * config.cluster.ranks_per_node
    if "gpus" in options:
        devices = int(_number("gpus", options["gpus"]))
    if devices < 1:
        raise BadRequest("gpus: must be given; add gpus=64, or cluster.nodes and cluster.ranks_per_node")
    if "tokens" not in options:
        raise BadRequest("tokens: must be given; add the training tokens, as in tokens=1e12")
    dtype = options.get("dtype", "bf16")
    if dtype not in ("bf16", "fp8"):
        raise BadRequest(f"dtype={dtype}: must be bf16 or fp8; use dtype=bf16")
    try:
        config.model.check()
    except ValueError as error:
        raise BadRequest(str(error)) from None
    hardware, assumptions = at_market(config.hardware, options.get("market", config.hardware.market)), Assumptions()
    if hardware.device != "cuda":
        hardware, assumptions = shared_cores(hardware, devices, calibration)
    seq_len = config.train.seq_len if "train.seq_len" in given else min(4096, config.model.max_seq_len)
    batch = config.train.batch_size if "train.batch_size" in given else default_batch(devices)
    return Request(config.model, hardware, devices, _number("tokens", options["tokens"]), seq_len, batch, dtype,
                   assumptions=assumptions, calibration=calibration)


def _terms(options: dict[str, str], config) -> Terms:
    train = config.train
    base = Terms(validate_every=train.validate_every, validate_sequences=train.validate_sequences,
                 batch_start=train.batch_start, ramp_steps=train.batch_ramp_steps)
    return terms_of({key: options[key] for key in TERMS if key in options}, base)


def _compared(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        raise BadRequest(f"multiplier_from={path}: is no readable JSON file; give the compare.json that "
                         "`sparing compare` wrote") from None


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1 <= value < 1e30:
        raise BadRequest(f"{key}={text}: must be a positive number; use {key}={'1e12' if key == 'tokens' else '64'}")
    return value
