"""`sparing plan explain=true`: how each number of the best layout came about, by term, with its equation's name."""

from model import count
from orchestrator.plan.block import layer_time, shapes
from orchestrator.plan.confidence import band, made
from orchestrator.plan.estimate import estimate
from orchestrator.plan.kernels import product_s, rates_of
from orchestrator.plan.planner import Plan
from orchestrator.plan.workload import Workload, pipeline_of
from orchestrator.plan_format import console as console_of
from orchestrator.plan_format import dollars
from orchestrator.plan_page import dense_rows

Line = tuple[str, str, str]
"""What, how much, by which equation."""


def explained(plan: Plan, data: dict) -> list[tuple[str, list[Line]]]:
    """Sections from the layer up to the bill; every figure in them is one that the plan used."""
    work = plan.candidates[0].work
    return [("FLOPs", _flops(work, data)), ("one layer, one microbatch, one rank", _layer(work)),
            ("the step", _step(work)), ("from the step to the run", _run(data)),
            ("memory of the fullest rank", _memory(data)), ("the bills", _bills(data["bill"])),
            ("dense models", _dense(data))]


def print_explained(plan: Plan, data: dict) -> None:
    from rich.table import Table

    console = console_of()
    for title, lines in explained(plan, data):
        table = Table(box=None, pad_edge=False, show_header=False)
        for justify in ("left", "right", "left"):
            table.add_column(justify=justify)
        for line in lines:
            table.add_row("  " + line[0], line[1], line[2])
        console.print(f"\n[bold]{title}[/bold]")
        console.print(table)


def _flops(work: Workload, data: dict) -> list[Line]:
    model = work.model
    active = count.active_parameters(model, mtp=True)
    per_token = count.training_flops(model, work.seq_len, mtp=True)
    core = 3 * count.attention_flops(model, work.seq_len) * (model.n_layers + model.n_mtp_layers)
    parts, three = count.parameters(model), count.active_parameters(model)
    without = (f"{three.excluding_embedding / 1e9:.2f} B without the embedding, {three.excluding_both / 1e9:.2f} B "
               "without both")
    return [("parameters", f"{parts.total / 1e9:.2f} B", "MTP modules left out (count.parameters)"),
            ("active parameters", f"{three.including_both / 1e9:.2f} B", f"with embedding and head; {without}"),
            ("active parameters that multiply", f"{active.excluding_embedding / 1e9:.2f} B", "input embedding left "
             "out, MTP modules in (count.active_parameters)"),
            ("attention core a token", f"{core / 1e9:.1f} GFLOP", "causal half: 3 x layers x seq_len x heads x (d_qk + "
             "d_v) (count.attention_flops)"),
            ("training FLOPs a token", f"{per_token / 1e9:.1f} GFLOP", "6 x active + attention core, no recompute "
             "(count.training_flops; a head pass a MTP depth more)"),
            ("of the whole run", f"{per_token * data['tokens']:.3g}", "x tokens")]


def _layer(work: Workload) -> list[Line]:
    lines, hardware, assumed = [], work.hardware, work.assumptions
    rates = rates_of(hardware, work.dtype, assumed, work.stack.attention)
    kinds = [("dense", False)] * (work.model.n_dense_layers > 0 or not work.model.n_routed_experts)
    kinds += [("MoE", True)] * (work.model.n_routed_experts > 0)
    for name, moe in kinds:
        found, rest = layer_time(work, moe), 0.0
        for rows, columns, inner, groups, low in shapes(work, moe):
            seconds = product_s(rates, rows, columns, inner, groups=groups, low=low)
            rest += seconds
            many = f" in each of {groups:,.0f} experts" if groups > 1 else ""
            lines.append((f"{name}: {rows:,.0f} x {inner:,.0f} times {inner:,.0f} x {columns:,.0f}{many}",
                          f"{seconds * 1e3:.3f} ms", "FLOPs / (best rate x fitted share x tiles filled x inner size), "
                          f"or bytes; {work.dtype if low else 'bf16'}"))
        lines += [(f"{name}: all else in forward", f"{(found.forward - rest) * 1e3:.3f} ms", "attention core by its "
                   "share of the peak, other operators by bytes and launches x the stack's overhead, "
                   f"{work.stack.overhead:g} ({work.stack.name})"),
                  (f"{name}: forward", f"{found.forward * 1e3:.2f} ms", "their sum"),
                  (f"{name}: input gradients", f"{found.backward * 1e3:.2f} ms", "the products turned, core 2.5 times, "
                   f"and recompute={work.recompute.name}"),
                  (f"{name}: weight gradients", f"{found.weight * 1e3:.2f} ms", "the products turned the other way")]
        if found.sent_bytes or found.up_bytes:
            lines += [(f"{name}: to other nodes", f"{found.sent_bytes / 1e6:.0f} MB", "node-limited all-to-all (V3 "
                       f"report, 3.2.2), ep={work.ep}, imbalance {work.imbalance:g}; over "
                       f"{hardware.scale_out_gb_per_s:g} GB/s x {assumed.network:g}, or x "
                       f"{assumed.network_overlapped:g} beside computation"),
                      (f"{name}: inside the node", f"{found.up_bytes / 1e6:.0f} MB",
                       f"the same over {hardware.scale_up_gb_per_s:g} GB/s")]
    return lines


def _step(work: Workload) -> list[Line]:
    found = estimate(work)
    ranges, table, _ = pipeline_of(work)
    equations = {
        "pipeline": f"busiest rank at work: event clock over the {work.schedule} table, {len(ranges)} stages of "
                    f"{min(map(len, ranges))} to {max(map(len, ranges))} layers, {sum(map(len, table))} slots",
        "bubble": "the same rank idle on that clock",
        "reduce": "reduce-scatter of fp32 gradients, all-gather of bf16 weights, over the slower link",
        "optimizer": "AdamW by bytes: 34 a parameter that the rank owns, 8 a local gradient / memory bandwidth"}
    lines = [(name, f"{seconds:.3f} s", equations.get(name, "")) for name, seconds in found.parts_s.items()]
    low, high = band(work)
    return [*lines, ("step", f"{found.step_time_s:.3f} s", "their sum"),
            ("P10 to P90", f"{low * found.step_time_s:.2f} to {high * found.step_time_s:.2f} s",
             f"{made(work)}: where eight of ten published runs of its kind lay (conf/bands.yaml)"),
            ("bubble fraction", f"{found.bubble_fraction:.1%}", "idle share of all ranks' time on the clock")]


def _run(data: dict) -> list[Line]:
    best = data["best"]
    steps = data["tokens"] / data["batch_size"] / data["seq_len"]
    return [("steps", f"{steps:,.1f}", "tokens / (sequences x seq_len)"),
            ("tokens a second", f"{best['tokens_per_s']:,.0f}", "sequences x seq_len / step"),
            ("MFU", f"{best['mfu']:.1%}", "training FLOPs x tokens a second / (devices x bf16 peak)"),
            ("days", f"{best['days']:.2f}", "steps x step"),
            ("GPU-hours a trillion tokens", f"{best['gpu_hours_per_trillion_tokens']:,.0f}",
             "devices x hours / tokens")]


def _memory(data: dict) -> list[Line]:
    equations = {"weights": "parameters on the rank x bytes of the compute copy",
                 "gradients": "parameters on the rank x bytes of a gradient",
                 "masters": "fp32 masters, sharded over the replicas", "moments": "two AdamW moments, sharded likewise",
                 "activations": "by tensor and layer x microbatches in flight, read off the schedule's table",
                 "logits": "tokens of a microbatch x vocabulary, at the loss",
                 "buffers": "rows of an all-to-all, sends between stages, a block in reduction",
                 "framework": "device context, libraries, collectives (aiconfigurator's tables)", "total": "their sum"}
    return [(name, f"{size:.2f} GiB", equations.get(name, "")) for name, size in data["best"]["memory_gib"].items()]


def _bills(bill: dict) -> list[Line]:
    lines = [(term["name"], f"{term['gpu_hours']:,.0f} h", f"{term['equation']}; {term['source']}")
             for term in bill["expected"]["terms"]]
    price = bill["price"]["usd_per_h"]
    for name in ("steady", "expected"):
        lines.append((f"{name} bill", dollars(bill[name]["usd"]), f"{bill[name]['gpu_hours']:,.0f} GPU-hours x "
                      + ("an unknown price" if price is None else f"${price:.2f}")))
    lines.append(("production factor", f"{bill['production_factor']:.4f}", "expected / steady"))
    if bill["mtbf_h"] is not None:
        lines += [("MTBF", f"{bill['mtbf_h']:.1f} h", "24,000 / ((failures + preemptions) x nodes)"),
                  ("checkpoint every", f"{bill['checkpoint_every_s']:,.0f} s", "Young and Daly: sqrt(2 x stall x MTBF) "
                   "and the next terms")]
    if bill["energy_kwh"] is not None:
        lines.append(("energy", f"{bill['energy_kwh']:,.0f} kWh", bill["energy_equation"]))
    return lines


def _dense(data: dict) -> list[Line]:
    return [(name, " to ".join(dollars(each["usd"]) for each in entries), how)
            for name, entries, how in dense_rows(data)]
