"""`sparing plan explain=true`: how each number of the best layout came about, by term, with its equation's name."""

from collections import Counter
from dataclasses import replace

from model import count
from orchestrator.plan.activations import block_bytes, head_bytes
from orchestrator.plan.block import LayerTime, attention_core_s, head_time, layer_time, shapes
from orchestrator.plan.comm import tensor_s
from orchestrator.plan.confidence import band, made
from orchestrator.plan.estimate import PHASES, estimate, linked, phases_s, send_s, stage_times
from orchestrator.plan.exchange import scale_up_bytes_per_s
from orchestrator.plan.keeping import own
from orchestrator.plan.kernels import product_s, rates_of
from orchestrator.plan.memory import state_bytes
from orchestrator.plan.search import Plan
from orchestrator.plan.workload import Workload, is_last, pipeline_of
from orchestrator.plan_format import console as console_of
from orchestrator.plan_format import dollars, hours
from orchestrator.plan_page import dense_rows

Line = tuple[str, str, str]
"""What, how much, by which equation."""


def explained(plan: Plan, data: dict) -> list[tuple[str, list[Line]]]:
    """Sections from the layer up to the bill; every figure in them is one that the plan used."""
    work = plan.candidates[0].work
    work = replace(work, hardware=linked(work.hardware, work.devices))
    return [("FLOPs", _flops(work, data)), ("one layer, one microbatch, one rank", _layer(work)),
            ("one stage, one microbatch", _stages(work)), ("the step", _step(work)),
            ("from the step to the run", _run(data)), ("memory of the fullest rank", _memory(data)),
            ("bytes by precision, the whole model in one place", precisions(work)),
            ("the bills", _bills(data["bill"])), ("dense models", _dense(data))]


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
        found, rest, core = layer_time(work, moe), 0.0, attention_core_s(work, rates)
        tensor = tensor_s(work, moe) * (1 - work.stack.tensor_hidden)
        for rows, columns, inner, groups, low in shapes(work, moe):
            seconds = product_s(rates, rows, columns, inner, groups=groups, low=low)
            rest += seconds
            many = f" in each of {groups:,.0f} experts" if groups > 1 else ""
            lines.append((f"{name}: {rows:,.0f} x {inner:,.0f} times {inner:,.0f} x {columns:,.0f}{many}",
                          f"{seconds * 1e3:.3f} ms", "FLOPs / (best rate x fitted share x tiles filled x inner size), "
                          f"or bytes; {work.dtype if low else 'bf16'}"))
        if tensor:
            lines.append((f"{name}: tensor parallelism", f"{tensor * 1e3:.3f} ms", f"collectives of tp={work.tp} in "
                          "one forward, less what the stack hides"))
        lines += [(f"{name}: attention core", f"{core * 1e3:.3f} ms", "FLOPs / (peak x share), or the bytes of scores "
                   f"that are written out; {work.stack.attention}"),
                  (f"{name}: all else in forward", f"{(found.forward - rest - core - tensor) * 1e3:.3f} ms",
                   f"by bytes and launches x the stack's overhead, {work.stack.overhead:g} ({work.stack.name}), and "
                   "waits for the host" + ", keys and values of other ranks" * (work.cp > 1)),
                  (f"{name}: forward", f"{found.forward * 1e3:.2f} ms", "their sum"),
                  (f"{name}: input gradients", f"{found.backward * 1e3:.2f} ms", "the products turned, core 2.5 times, "
                   f"and recompute={work.recompute.name}"),
                  (f"{name}: weight gradients", f"{found.weight * 1e3:.2f} ms", "the products turned the other way")]
        if found.sent_bytes:
            lines.append((f"{name}: to other nodes", f"{found.sent_bytes / 1e6:.0f} MB", f"{_routed(work)}; over "
                          f"{hardware.scale_out_gb_per_s:g} GB/s x {assumed.network:g}, or x "
                          f"{assumed.network_overlapped:g} beside computation"))
        if found.up_bytes:
            ranks = min(work.ep * work.etp, hardware.scale_up_devices)
            lines.append((f"{name}: inside the node", f"{found.up_bytes / 1e6:.0f} MB", f"{_routed(work)}; over "
                          f"{scale_up_bytes_per_s(hardware, ranks) / 1e9:g} GB/s, likewise"))
    return lines


def _routed(work: Workload) -> str:
    how = "a copy for each expert" if work.stack.copies else "node-limited all-to-all (V3 report, 3.2.2)"
    return f"{how}, ep={work.ep}, imbalance {work.imbalance:g}"


def _stages(work: Workload) -> list[Line]:
    """What the clock is given: seconds of every kind of stage, of the head, and of a send."""
    ranges, _, _ = pipeline_of(work)
    scale = work.calibration.forward_backward
    layers = {moe: layer_time(work, moe) for moe in {work.model.is_moe(layer) for layer in range(work.model.n_layers)}}
    head, kinds, lines = head_time(work), {}, []
    for stage, time in enumerate(stage_times(work, ranges)):
        of = Counter(work.model.is_moe(layer) for layer in ranges[stage])
        kinds.setdefault((of[False], of[True], is_last(work, stage, len(ranges))), (time, []))[1].append(stage)
    for (dense, moe, last), (time, stages) in kinds.items():
        each = " + ".join([f"{dense} dense"] * (dense > 0) + [f"{moe} MoE"] * (moe > 0) + ["head"] * last)
        name = f"stage {', '.join(map(str, stages[:3]))}{', ...' * (len(stages) > 3)} ({each})"
        total = sum((layers[kind] for kind, number in ((False, dense), (True, moe)) for _ in range(number)),
                    head if last else LayerTime())
        exchange = time.forward - scale * total.forward
        alone = f" + {exchange * 1e3:.2f} ms of all-to-all alone" if exchange > 1e-9 else ""
        again = f" + {(time.backward - scale * total.backward) * 1e3:.2f} ms of all-to-all alone" if alone else ""
        by = "" if scale == 1 else f", x {scale:.3g} as calibrated"
        own_part = f"its layers{' and the head' * last}"
        lines += [(f"{name}: forward", f"{time.forward * 1e3:.2f} ms", f"{own_part}{alone}{by}"),
                  (f"{name}: input gradients", f"{time.backward * 1e3:.2f} ms", f"likewise{again}"),
                  (f"{name}: weight gradients", f"{time.weight * 1e3:.2f} ms", "likewise")]
        if work.schedule in ("dualpipe", "dualpipev") and work.pp > 1:
            lines.append((f"{name}: overlapped pair", f"{time.overlapped * 1e3:.2f} ms", "a forward and a backward at "
                          "once: the longer of their computation, on the multiprocessors that communication leaves, "
                          f"and their all-to-alls, x {work.assumptions.overlap_cost:g}; or in turn"))
    if work.pp > 1:
        lines.append(("head" + " and MTP modules" * (work.model.n_mtp_layers > 0),
                      f"{scale * (head.forward + head.backward + head.weight) * 1e3:.2f} ms",
                      f"of the last stage: forward {scale * head.forward * 1e3:.2f}, input gradients "
                      f"{scale * head.backward * 1e3:.2f}, weight gradients {scale * head.weight * 1e3:.2f} ms"))
        lines.append(("a send to the next stage", f"{send_s(work) * 1e3:.3f} ms", "tokens of "
                      "a microbatch x dim x 2 bytes over the slower link; delays the neighbour, not the sender"))
    return lines


def _step(work: Workload) -> list[Line]:
    found = estimate(work)
    ranges, table, _ = pipeline_of(work)
    busiest = max(range(work.pp), key=lambda rank: found.timeline.busy[rank])
    slots = Counter("1F1B" if len(span.actions) == 2 else PHASES[span.actions[0].kind]
                    for span in found.timeline.spans if span.rank == busiest)
    names = {"1F": "forwards", "1B": "backwards, or their input parts", "1W": "weight parts", "1F1B": "pairs"}
    phases = [(f"  rank {busiest}: {names[phase]}", f"{seconds:.3f} s", f"{slots[phase]:,} slots of its "
               "stages' times above") for phase, seconds in phases_s(found.timeline, busiest).items() if slots[phase]]
    equations = {
        "pipeline": f"busiest rank at work: event clock over the {work.schedule} table, {len(ranges)} stages of "
                    f"{min(map(len, ranges))} to {max(map(len, ranges))} layers, {sum(map(len, table))} slots",
        "bubble": "the same rank idle on that clock",
        "reduce": reduce_words(work),
        "optimizer": "AdamW by bytes: 34 a parameter that the rank owns, 8 a local gradient / memory bandwidth"}
    lines = [(name, f"{seconds:.3f} s", equations.get(name, "")) for name, seconds in found.parts_s.items()]
    low, high = band(work)
    return [lines[0], *phases, *lines[1:], ("step", f"{found.step_time_s:.3f} s", "their sum"),
            ("P10 to P90", f"{low * found.step_time_s:.2f} to {high * found.step_time_s:.2f} s",
             f"{made(work)}: where eight of ten published runs of its kind lay (conf/bands.yaml)"),
            ("idle share", f"{found.bubble_fraction:.1%}", "idle time of all ranks on the clock over the pipeline's "
             "length times their number")]


def reduce_words(work: Workload) -> str:
    """What is moved between the replicas for gradients and weights, and how often (`comm.reduce_s`)."""
    if work.replicas == 1:
        return "nothing: there is one replica"
    gradients = f"{work.stack.gradient_bytes:g}-byte gradients"
    hidden = f", {work.stack.reduce_hidden:.0%} of it behind the pipeline" if work.stack.reduce_hidden else ""
    often = f"reduce-scatter of {gradients} after each of {work.microbatches} microbatches"
    behind = "behind computation as far as it goes"
    moved = {0: f"all-reduce of {gradients}, once{hidden}",
             1: f"reduce-scatter of {gradients} and all-gather of 2-byte weights, once{hidden}",
             2: f"{often}, {behind}; all-gather of 2-byte weights, once{hidden}",
             3: f"{often}, all-gather of 2-byte weights for its forward and its backward, {behind}"}[work.zero]
    return f"{moved}; over the slower link"


def precisions(work: Workload) -> list[Line]:
    """What `train` keeps under each precision, and what the plan is priced with: bytes of training state a parameter,
    MB a token between forward and backward without recompute. One rank, so nothing is sharded."""
    model, lines = work.model, []
    blocks = [model.is_moe(layer) for layer in range(model.n_layers + model.n_mtp_layers)]
    cpu = work.hardware.device != "cuda"
    kept = {f"train precision={dtype}": (dtype, own(dtype, cpu=cpu)) for dtype in ("fp32", "bf16", "fp8")}
    planned = {} if cpu else {f"as planned, {work.dtype}": (work.dtype, work.keeping)}
    for name, (dtype, keeping) in (kept | planned).items():
        one = Workload(model, work.hardware, 1, 1, 1, 1, 1, "1f1b", 1, dtype=dtype, keeping=keeping)
        parts = state_bytes(one, 1.0, 0.0)
        parts["weights"] += keeping.cast
        held = sum(block_bytes(one, moe) for moe in blocks) + head_bytes(one)
        lines += [(f"{name}: state a parameter", f"{sum(parts.values()):g} bytes",
                   ", ".join(f"{part} {size:g}" for part, size in parts.items() if size)),
                  (f"{name}: kept a token", f"{held / 1e6:.3g} MB", "activations from forward to backward, all blocks "
                   "and heads, no recompute")]
    return lines


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
    lines = [(term["name"], f"{hours(term['gpu_hours'])} h", f"{term['equation']}; {term['source']}")
             for term in bill["expected"]["terms"]]
    price = bill["price"]["usd_per_h"]
    for name in ("steady", "expected"):
        lines.append((f"{name} bill", dollars(bill[name]["usd"]), f"{hours(bill[name]['gpu_hours'])} GPU-hours x "
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
