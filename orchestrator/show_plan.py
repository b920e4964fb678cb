"""`sparing plan`: from a command's words to a plan, its table, plan.json and page. All figures are predicted."""

import json
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from orchestrator.arguments import check_writable, positional, taken, write_file
from orchestrator.errors import BadRequest, NotFit
from orchestrator.plan.dense import measured_multiplier
from orchestrator.plan.money import bill_of, money, terms_for
from orchestrator.plan.planner import price, to_dict, trained
from orchestrator.plan.questions import fits, scaled, smallest
from orchestrator.plan.request import DEGREES, Request
from orchestrator.plan.runs import cannot_run
from orchestrator.plan.search import Plan, layouts, search
from orchestrator.plan.workload import MOST_MICROBATCHES
from orchestrator.plan_explain import print_explained
from orchestrator.plan_format import first_runnable
from orchestrator.plan_page import page
from orchestrator.plan_questions import OPTIONS as QUESTIONS
from orchestrator.plan_questions import settle
from orchestrator.plan_request import TERMS, compose_plan, option_of, read_request
from orchestrator.plan_table import print_plan, reasons
from orchestrator.words import plain

HELP = """\
usage: sparing plan [KEY=VALUE ...] tokens=N [gpus=N] [dtype=bf16|fp8|any] [market=on_demand|reserved|spot]
                    [out=plan.json] [html=plan.html] [explain=true] [-m]
       sparing plan diff A B                 each a plan.json or a run's directory
       sparing plan prices | budgets

  sparing plan model=deepseek_v3 cluster=h800_2048 tokens=14.8e12 dtype=fp8
  sparing plan model=moonlight_16b hardware=h100 gpus=64 tokens=1e12 train.batch_size=1024 market=spot
  sparing plan model=path/to/config.json hardware=h100 gpus=64 tokens=1e12      a Hugging Face config.json
  sparing plan model=moonlight_16b hardware=h100 tokens=1e12 deadline_days=30   GPUs needed (gpus=fit: to hold it)
  sparing plan model=moonlight_16b hardware=h100 tokens=1e12 budget_usd=5e4     the fastest for that; without tokens
                                                       but with gpus: the tokens it buys
  sparing plan model=moonlight_16b hardware=h100,h200 gpus=32,64 tokens=1e12    front of dollars against days;
                                                       hardware=all objective=dollars: the cheapest type
  sparing plan -m cluster=h100_1024,h200_1024 model=deepseek_v3,qwen3_235b_a22b tokens=1e12    every combination
  sparing plan diff before.json after.json             what a change does to days and dollars, by term
  sparing plan prices                                  published API prices beside what serving costs
  sparing plan budgets                                 published training budgets, each with its source

Keys and groups are those of train. The batch is 8 sequences a GPU, at most 15,360, of more than 4,096 tokens so many
fewer, unless train.batch_size says otherwise. stack= names the software (conf/stacks.yaml), routing= how even it is
(balanced, bias, unbalanced, or a run).
layout.* holds for every layout; tp= cp= zero= and layout.schedule=dualpipe do too, which `train` does not run.
calibrate=RUN takes what a finished run on the same kind of device measured.
multiplier_from=compare.json adds the dense model of equal loss that `sparing compare` measured.
The expected bill takes failures= and preemptions= (per 1,000 node-days), recovery_s= checkpoint_stall_s= start_up_s=
server_factor= power_share= pue= other_gpu_hours= extension=STEPSxSEQUENCESxTOKENS+... and, of train, batch_start,
batch_ramp_steps, validate_every and validate_sequences."""
OPTIONS = ("tokens", "gpus", "dtype", "stack", "routing", "out", "html", "explain", "market", "multiplier_from",
           "calibrate", *DEGREES, "zero", *QUESTIONS, *TERMS)

PARTS = {"diff": "usage: sparing plan diff A B\n\nEach is a file of `sparing plan out=FILE.json`, or a run directory.",
         "prices": "usage: sparing plan prices\n\nPublished API prices beside what serving costs.",
         "budgets": "usage: sparing plan budgets\n\nPublished training budgets, each with its source."}


def run(arguments: list[str]) -> int:
    """`sparing plan ARGUMENTS`; returns the exit code."""
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        _part(*arguments)
    elif {"-m", "--multirun"} & set(arguments):
        from orchestrator.plan_sweep import plan_sweep

        plan_sweep([word for word in arguments if word not in ("-m", "--multirun")])
    else:
        plan(*split_words(arguments))
    return 0


def _part(name: str, *arguments: str) -> None:
    """`diff`, `prices` or `budgets`."""
    if name not in PARTS:
        near = get_close_matches(name, PARTS, n=1)
        hint = f"did you mean {near[0]}?" if near else "write KEY=VALUE, as in gpus=64"
        raise BadRequest(f"plan {name}: there are plan {', plan '.join(PARTS)}, and overrides; {hint}")
    if arguments[:1] in (("-h",), ("--help",)):
        print(PARTS[name])
        return
    from orchestrator.plan_diff import plan_diff
    from orchestrator.plan_published import print_budgets, print_prices

    given = positional(f"plan {name}", list(arguments), 2 if name == "diff" else 0, PARTS[name])
    {"diff": plan_diff, "prices": print_prices, "budgets": print_budgets}[name](*given)


def split_words(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The plan's own options, and overrides of the config."""
    return taken(plain(arguments), OPTIONS)


def plan(options: dict[str, str], overrides: list[str]) -> None:
    """Print the best layouts, the bills and why others were refused; write the whole as JSON where `out` says."""
    if options.get("explain", "false") not in ("true", "false"):
        raise BadRequest(f"explain={options['explain']}: must be true or false; use explain=true")
    check_writable(options, "out", "html")
    answer = settle(options, overrides)
    options = answer.options
    found, data = planned(options, answer.overrides)
    if answer.question:
        data["question"] = answer.question
    try:  # before who reads what is printed may leave
        if "out" in options:
            write_file(options, "out", json.dumps(data, indent=2) + "\n")
        if "html" in options and found.candidates:
            write_file(options, "html", page(found, data))
    finally:  # whatever a full disk refuses
        print_plan(found, data)
        if found.candidates and options.get("explain") == "true":
            print_explained(found, data)
    if not found.candidates:
        raise no_layout(found.request)


def planned(options: dict[str, str], overrides: list[str]) -> tuple[Plan, dict]:
    """The plan and what plan.json says of it."""
    config, given = compose_plan(overrides)
    request = read_request(options, config, given)
    compared = _compared(options["multiplier_from"], request) if "multiplier_from" in options else None
    try:
        found = search(request)
        data = to_dict(found)
        if found.candidates:
            best = found.candidates[0]
            data |= money(request, best, terms_for(request, best.work), compared)
            data["scaling"] = scaled(best, request)
            if runs := first_runnable(data["candidates"]):
                own = trained(found.candidates[data["candidates"].index(runs)])
                bill = bill_of(request, own, terms_for(request, own.work))["expected"]
                runs["expected"] = {"days": bill["days"], "usd": bill["usd"]}
            elif row := _but_for_ramp(request):
                data["but_for_ramp"] = row
            if compared and data["dense"]["equal_loss"]["measured"] is None:
                data["dense"]["equal_loss"]["measured_not"] = (
                    f"{options['multiplier_from']} has no multiplier: the losses of mixture and dense twin never met")
            for row, why in zip(data["candidates"], reasons(data["candidates"]), strict=True):
                row["why"] = why
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return found, data


def _but_for_ramp(request: Request) -> dict | None:
    """Of the fastest layouts that `train` would run but for the batch ramp, the one that suits ramps best, with what it
    has against this one; none without a ramp."""
    if not request.terms.batch_start:
        return None
    found = search(replace(request, terms=replace(request.terms, batch_start=0, ramp_steps=0))).candidates
    runs = [each for each in found if not cannot_run(each.work)]
    return price(min(runs, key=lambda each: each.work.dp * each.work.microbatches), request) if runs else None


def no_layout(request: Request) -> NotFit:
    """What of the request keeps all layouts from it: so many microbatches, so few sequences, so little memory."""
    devices, batch, on = request.devices, request.batch_size, f"{request.devices} x {request.hardware.name}"
    micro = min((work.microbatches for work in layouts(request)), default=0)
    if micro > MOST_MICROBATCHES:
        return NotFit(f"train.batch_size={batch}: makes {micro:,} microbatches a step on {on}, and a plan has at most "
                      f"{MOST_MICROBATCHES:,}; use a smaller one, one that more of the GPUs divide, or more GPUs")
    larger = (batch // devices + 1) * devices
    try:
        least = smallest(request)
    except ValueError as error:  # between nodes, say, nothing is known of the device
        return NotFit(f"gpus={devices}: no layout of model={request.model.name} fits on {on}, and on more of them none "
                      f"can be planned: {error}")
    if request.pinned and (least is None or least.devices == devices):
        remedy = f"leave one of {', '.join(option_of(key) for key, _ in request.pinned)} to the plan"
    elif least is None:
        remedy = (f"nor does it on any number up to {request.most_devices:,} of {request.hardware.name}; "
                  f"{request.more_memory}")
    else:
        remedy = f"the smallest that holds it is gpus={least.devices}"
        if least.devices < devices and fits(replace(request, batch_size=larger)):
            remedy = f"so many want a larger train.batch_size, such as {larger}; {remedy}"
    return NotFit(f"gpus={devices}: no layout of model={request.model.name} fits on {on}; {remedy}")


def _compared(path: str, request: Request) -> dict:
    if not request.model.n_routed_experts:
        raise BadRequest(f"multiplier_from={path}: model={request.model.name} has no routed experts; leave it out")
    give = "give the compare.json that `sparing compare` wrote"
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        raise BadRequest(f"multiplier_from={path}: is no readable JSON file; {give}") from None
    twin = found.get("multiplier") if isinstance(found, dict) else None
    twin = twin.get("equal_active") if isinstance(twin, dict) else None
    if not isinstance(twin, dict) or "flops" in twin and measured_multiplier(found) is None:
        raise BadRequest(f"multiplier_from={path}: must have multiplier.equal_active, and has none; {give}")
    return found
