"""`sparing plan`: from a command's words to a printed ranking and plan.json. All figures are predicted."""

import json
from pathlib import Path

from orchestrator.compose import compose_config
from orchestrator.errors import BadRequest, NotFit
from orchestrator.plan.planner import Plan, Request, default_batch, make_plan, to_json

OPTIONS = ("tokens", "gpus", "dtype", "out")
SHOWN = 8


def plan(options: dict[str, str], overrides: list[str]) -> None:
    """Print the best layouts, the bill and why others were refused; write the whole as JSON where `out` says."""
    request = read_request(options, overrides)
    try:
        found = make_plan(request)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    text = to_json(found)
    if options.get("out"):
        Path(options["out"]).write_text(text)
    print_plan(found, json.loads(text))
    if not found.candidates:
        raise NotFit(f"gpus={request.devices}: no layout of model={request.model.name} fits; use more devices, devices "
                     "with more memory, or a smaller model")
    if options.get("out"):
        print(f"wrote     {options['out']}")


def read_request(options: dict[str, str], overrides: list[str]) -> Request:
    config = compose_config(overrides)
    given = {text.lstrip("+").split("=", 1)[0] for text in overrides}
    if config.hardware.device != "cuda":
        raise BadRequest(f"hardware={config.hardware.name}: a plan needs a GPU's data sheet; use hardware=h100 (or "
                         "a100, h800, h200, b200), or a cluster that names one")
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
    seq_len = config.train.seq_len if "train.seq_len" in given else min(4096, config.model.max_seq_len)
    batch = config.train.batch_size if "train.batch_size" in given else default_batch(devices)
    return Request(config.model, config.hardware, devices, _number("tokens", options["tokens"]), seq_len, batch, dtype)


def print_plan(plan: Plan, data: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    request, console = plan.request, Console(highlight=False, soft_wrap=True, width=140)
    hardware = request.hardware
    console.print(f"{request.model.name} on {request.devices:,} x {hardware.name}, {request.tokens:.4g} tokens, "
                  f"{request.batch_size:,} sequences of {request.seq_len:,} a step, {request.dtype}. "
                  f"[bold]All figures are predicted.[/bold]")
    console.print(f"{plan.considered:,} layouts considered, {len(plan.candidates):,} fit\n")
    if plan.candidates:
        table = Table("pp", "dp", "ep", "schedule", "micro", "recompute", "step s", "bubble", "GiB", "MFU", "days",
                      "GPU-hours", "USD", box=None, pad_edge=False)
        for column in table.columns:
            column.no_wrap, column.justify = True, "left" if column.header in ("schedule", "recompute") else "right"
        for row in data["candidates"][:SHOWN]:
            layout, usd = row["layout"], row["usd_total"]
            table.add_row(*(str(layout[key]) for key in ("pp", "dp", "ep", "schedule", "microbatches", "recompute")),
                          f"{row['step_time_s']:.2f}", f"{row['bubble_fraction']:.0%}",
                          f"{row['memory_gib']['total']:.0f}", f"{row['mfu']:.1%}", f"{row['days']:.1f}",
                          f"{row['gpu_hours']:,.0f}", "unknown" if usd is None else f"{usd:,.0f}")
        console.print(table)
        _print_best(console, data)
    for refused in _telling(plan):
        console.print(f"refused   {refused}")


def _print_best(console, data: dict) -> None:
    best, hardware = data["best"], data["hardware"]
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in best["parts_s"].items())
    memory = ", ".join(f"{name} {size:.1f}" for name, size in best["memory_gib"].items() if name != "total")
    console.print(f"\nstep      {parts} s")
    console.print(f"memory    {memory} GiB of {hardware['memory_gib']:.0f}")
    price = (f"${hardware['usd_per_h']:.2f} an hour ({hardware['source']}, {hardware['date']})"
             if "usd_per_h" in hardware else "a price that is unknown")
    console.print(f"bill      {best['gpu_hours_per_trillion_tokens']:,.0f} GPU-hours per trillion tokens, at {price}")
    console.print("          steady: no start-up, failures or validation")
    for name in ("equal_total", "equal_active"):
        twin = data["dense"][name]
        usd = "unknown" if twin["usd"] is None else f"${twin['usd']:,.0f}"
        console.print(f"dense     {usd}, {twin['device_hours']:,.0f} GPU-hours for equal {name.split('_')[1]} "
                      "parameters, same tokens, this MFU")
    runs = next((row for row in data["candidates"] if row["train"]), None)
    if runs is not None:
        aside = "" if runs is best else f"  ({runs['step_time_s']:.2f} s a step; dualpipe is planned, not run, here)"
        console.print(f"train     {' '.join(runs['train'])}{aside}")


def _telling(plan: Plan) -> list[str]:
    """One refusal of each kind, the commonest first."""
    kinds: dict[str, list] = {}
    for item in plan.refused:
        kind = "memory" if item.reason.startswith("needs ") else item.reason.split(" wants ")[0].split(" stages ")[-1]
        kinds.setdefault(kind, []).append(item)
    lines = []
    for items in sorted(kinds.values(), key=len, reverse=True)[:4]:
        layout = items[-1].layout
        lines.append(f"{len(items)} layouts, such as pp={layout['pp']} dp={layout['dp']} ep={layout['ep']} "
                     f"{layout['schedule']} recompute={layout['recompute']}: {items[-1].reason}")
    return lines


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1 <= value < 1e30:
        raise BadRequest(f"{key}={text}: must be a positive number; use {key}={'1e12' if key == 'tokens' else '64'}")
    return value
