"""From a plan's words to what is asked of the planner; mistakes are told by key, value, rule and remedy."""

from dataclasses import fields, replace
from math import inf, prod
from pathlib import Path

from model.config import ModelConfig
from orchestrator.compose import compose_config
from orchestrator.config import ComputeDtype, Config, HardwareConfig, PrecisionConfig, conf_dir
from orchestrator.errors import BadRequest, require
from orchestrator.own_files import is_own, words_of
from orchestrator.plan.bill import Terms
from orchestrator.plan.exchange import NAMED, Routing
from orchestrator.plan.forecast import Cpus, routing_of
from orchestrator.plan.hardware import at_market, catalogue, check_hardware, in_machines
from orchestrator.plan.keeping import PLANNED as KEPT
from orchestrator.plan.keeping import own
from orchestrator.plan.layout import MOST_RANKS, check_least, check_ramp, check_stages_per_rank, ramp_fault
from orchestrator.plan.money import terms_of
from orchestrator.plan.planner import default_batch
from orchestrator.plan.request import DEGREES, Request, divides_heads
from orchestrator.plan.stack import stack_named
from orchestrator.plan.workload import UNSCHEDULED, Assumptions, Calibration
from orchestrator.train.expected import check_device, counted, read_calibration
from orchestrator.train.memory import total_bytes
from orchestrator.train.run_dir import CONFIG, read_config
from orchestrator.train.storage import join

PINNED = ("pp", "dp", "ep", "schedule", "stages_per_rank", "microbatches", "recompute")

PLANNED = ("train.batch_size", "train.seq_len")
"""Keys that a plan sets itself."""
DUALPIPE = "layout.schedule=dualpipe"
"""A schedule that is priced, and that no config has since `train` does not run it."""
THOUSANDS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
TERMS = tuple(f.name for f in fields(Terms) if not f.name.startswith(("validate", "batch", "ramp")))
"""What a bill counts, by the words of a plan; validation and the batch's ramp are keys of train."""


def compose_plan(overrides: list[str]) -> tuple[Config, dict[str, str]]:
    """The config, and the words that were given, by key: those of a plan's own choice also by an experiment."""
    config = compose_config([text for text in overrides if text != DUALPIPE])
    given = {text.split("=", 1)[0]: text for text in overrides}
    word = given.get("experiment", "")
    chosen = {key: word for key in _keys_of(word.partition("=")[2]) if key in PLANNED or key.startswith("precision")}
    return config, chosen | given


def _keys_of(experiment: str) -> set[str]:
    """Groups and keys that it sets."""
    file = Path(experiment if is_own("experiment", experiment) else conf_dir() / "experiment" / f"{experiment}.yaml")
    is_there = file.expanduser().exists()
    return {word.split("=", 1)[0] for word in words_of("experiment", str(file))} if is_there else set()


def read_request(options: dict[str, str], config: Config, given: dict[str, str], *, sized: bool = True) -> Request:
    """What the words ask for. sized: the number of GPUs was asked for, rather than being what a question looks for."""
    calibration = read_calibration(options.get("calibrate"), "calibrate")
    if calibration.run and config.hardware.name == "auto":
        config, given = _on_its_hardware(calibration.run, config, given)
    check_hardware(config.hardware)
    for key in ("train.batch_size", "train.seq_len"):
        value = getattr(config.train, key.split(".")[1])
        require(value <= MOST_RANKS, key, value, f"must be at most {MOST_RANKS:,}", "give a smaller number")
    check_least(config)
    if config.hardware.device != "cuda" and not calibration.cores:
        raise BadRequest(f"hardware={config.hardware.name}: a plan needs a GPU's data sheet; use hardware=h100 (or "
                         "a100, h800, h200, b200), a cluster that names one, or calibrate=RUN, a run on this CPU")
    if calibration.run:
        check_device(calibration, "calibrate", config.hardware.name, config.hardware.device)
    if calibration.stack and "stack" in options:
        raise BadRequest(f"stack={options['stack']}: calibrate={calibration.run} is a run of this program and says "
                         "nothing of another; leave one of them out")
    devices = config.cluster.nodes * config.cluster.ranks_per_node
    if "gpus" in options:
        devices = int(number("gpus", options["gpus"], whole=True))
    require(devices <= MOST_RANKS, "gpus" if "gpus" in options else "cluster.nodes x cluster.ranks_per_node",
            options.get("gpus", devices), f"must be at most {MOST_RANKS:,}", "give a smaller number")
    if devices < 1:
        raise BadRequest("gpus: must be given; add gpus=64, or cluster.nodes and cluster.ranks_per_node")
    if "tokens" not in options:
        raise BadRequest("tokens: must be given; add the training tokens, as in tokens=1e12")
    if "train.steps" in given:
        raise BadRequest(f"{given['train.steps']}: a plan counts its steps from tokens={options['tokens']}; leave it "
                         "out")
    if "layout.ep_per_node" in given:
        raise BadRequest(f"{given['layout.ep_per_node']}: a plan chooses it by the links of the hardware; leave it out")
    dtype = _dtype(options, config, given)
    try:
        config.model.check()
    except ValueError as error:
        raise BadRequest(str(error)) from None
    assumptions = Assumptions()
    hardware = at_market(config.hardware, options.get("market", config.hardware.market),
                         given="hardware.usd_per_h" in given)
    stack = calibration.stack or stack_named(options.get("stack", "default"))
    routing = _routing(options.get("routing"), config.model, calibration)
    per_machine, cpus = config.cluster.ranks_per_node, None
    hardware = in_machines(hardware, per_machine)
    if hardware.device != "cuda":
        cpus = Cpus(hardware, calibration, per_machine, (total_bytes() or inf) / 2**30)
        hardware, assumptions, calibration = cpus.shared_by(devices)
    if not config.layout.overlap:
        assumptions = replace(assumptions, overlap_cost=inf)
    seq_len = config.train.seq_len if "train.seq_len" in given else min(4096, config.model.max_seq_len)
    if seq_len > config.model.max_seq_len:
        raise BadRequest(f"train.seq_len={seq_len}: must not exceed model.max_seq_len={config.model.max_seq_len}; "
                         "shorten it or raise model.max_seq_len")
    batch_asked = "train.batch_size" in given
    batch = config.train.batch_size if batch_asked else default_batch(devices if sized else 1, seq_len)
    wrong = ramp_fault(config.train.batch_start, batch, 1, "") if sized or batch_asked else None
    require(wrong is None, "train.batch_start", config.train.batch_start, *(wrong or ("", "")))
    tokens = number("tokens", options["tokens"], example="1e12")
    if tokens < batch * seq_len:
        raise BadRequest(f"tokens={options['tokens']}: must be at least one step of {batch:,} sequences of "
                         f"{seq_len:,}; use tokens={batch * seq_len} or more, or a smaller train.batch_size")
    asked = Request(config.model, hardware, devices, tokens, seq_len, batch, dtype if cpus is None else "bf16",
                    pinned=_pinned(options, config, given),
                    assumptions=assumptions, calibration=calibration, stack=stack, routing=routing,
                    batch_asked=batch_asked, terms=_terms(options, config), per_machine=per_machine,
                    cpus=cpus, cpu_dtype=dtype, run_words=_run_words(options, config, given, hardware, devices),
                    keeping=KEPT if cpus is None else own(dtype, cpu=True))
    _check_degrees(asked, sized=sized)
    return asked


def _on_its_hardware(run: str, config: Config, given: dict[str, str]) -> tuple[Config, dict[str, str]]:
    """Where no device was asked for: that of the calibrating run, with what was set of it."""
    found = read_config(join(run, CONFIG)).hardware
    changed = {key.split(".")[1]: getattr(config.hardware, key.split(".")[1]) for key in given if "hardware." in key}
    named = {"hardware": f"hardware={found.name}"} if found.name in catalogue() else {}
    return replace(config, hardware=replace(found, **changed)), given | named


def _dtype(options: dict[str, str], config: Config, given: dict[str, str]) -> str:
    words = [word for key, word in given.items() if key.split(".")[0] == "precision"]
    if words and "dtype" in options:
        raise BadRequest(f"{words[0]}: dtype={options['dtype']} says it as well; leave one of them out")
    precision = config.precision
    if config.hardware.device != "cuda":
        return _cpu_dtype(options, precision)
    if words and precision.compute_dtype is ComputeDtype.fp32 and not precision.fp8:
        raise BadRequest(f"{words[0]}: a plan is of products in bf16 or fp8; use precision=bf16")
    dtype = options.get("dtype", "fp8" if words and config.precision.fp8 else "bf16")
    if dtype not in ("bf16", "fp8", "any"):
        raise BadRequest(f"dtype={dtype}: must be bf16 or fp8, or any of the two; use dtype=bf16")
    return dtype


def _cpu_dtype(options: dict[str, str], precision: PrecisionConfig) -> str:
    if "dtype" in options:
        raise BadRequest(f"dtype={options['dtype']}: is of a GPU's tensor cores; leave it out, or use precision=bf16")
    if precision.fp8:
        raise BadRequest("precision.fp8=true: a CPU emulates eight bits, at a price nobody measured; leave it out, or "
                         "plan for a GPU, as in hardware=h100")
    return "bf16" if precision.compute_dtype is ComputeDtype.bf16 else "fp32"


def _terms(options: dict[str, str], config: Config) -> Terms:
    train = config.train
    check_ramp(train)
    base = Terms(validate_every=train.validate_every, validate_sequences=train.validate_sequences,
                 batch_start=train.batch_start, ramp_steps=train.batch_ramp_steps)
    try:
        return terms_of({key: options[key] for key in TERMS if key in options}, base)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def _run_words(options: dict[str, str], config: Config, given: dict[str, str], hardware: HardwareConfig,
               devices: int) -> tuple[str, ...]:
    """Those that `train` takes as they stand: hardware, cluster, a batch ramp. gpus= may have made the cluster another
    one, and market= the price."""
    chosen = ("model", "layout", *["precision"] * (hardware.device == "cuda"))
    words = list(dict.fromkeys(given[key] for key in given if key.split(".")[0] not in chosen and key not in PLANNED))
    words += [word for key, word in given.items() if key == "layout.overlap"]
    nodes, ranks = config.cluster.nodes, config.cluster.ranks_per_node
    if (nodes or ranks) and nodes * ranks != devices:
        nodes, ranks = (devices // ranks, ranks) if ranks and devices % ranks == 0 else (0, 0)
        words += [f"cluster.nodes={nodes}", f"cluster.ranks_per_node={ranks}"]
    if "market" in options:
        price = "null" if hardware.usd_per_h is None else hardware.usd_per_h
        words = [word for word in words if not word.startswith(("hardware.usd_per_h=", "hardware.market="))]
        words += [f"hardware.usd_per_h={price}", f"hardware.market={hardware.market}"]
    return tuple(words)


def _routing(asked: str | None, model: ModelConfig, calibration: Calibration) -> Routing:
    """A distribution by name, or what a run counted in its last steps; unasked, the calibrating run's."""
    if asked is None:
        return routing_of(calibration, model)
    if not model.n_routed_experts:
        raise BadRequest(f"routing={asked}: model={model.name} has no routed experts; leave it out")
    if asked in NAMED:
        return Routing(asked)
    names = ", ".join(NAMED)
    counts = counted(asked)
    if not counts:
        raise BadRequest(f"routing={asked}: must be one of {names}, or the directory of a run that counted its tokens "
                         "per expert, as in runs/tiny-20260101-120000")
    experts = len(counts[0])
    if experts != model.n_routed_experts:
        raise BadRequest(f"routing={asked}: counts {experts} experts a layer, and model={model.name} has "
                         f"{model.n_routed_experts}; name a run of this model, or one of {names}")
    return Routing(asked, counts)


def _pinned(options: dict[str, str], config: Config, given: dict[str, str]) -> tuple[tuple[str, object], ...]:
    """Keys of the layout that were given hold for every layout."""
    values = {key: getattr(config.layout, key) for key in PINNED if f"layout.{key}" in given}
    for key, value in values.items():
        if isinstance(value, int):
            require(value >= 1, f"layout.{key}", value, "must be at least 1", "use 1 or more, or leave it to the plan")
    if "stages_per_rank" in values:
        check_stages_per_rank(config.layout.schedule, values["stages_per_rank"])
    if given.get("layout.schedule") == DUALPIPE:
        values["schedule"] = "dualpipe"
    for key in (*DEGREES, "zero"):
        if key in options:
            values[key] = int(number(key, options[key], whole=True, example="1"))
    require(values.get("zero", 1) <= 3, "zero", values.get("zero"), "must be a ZeRO stage, 1 to 3", "use zero=1")
    return tuple((key, getattr(value, "name", value)) for key, value in values.items())


def _check_degrees(asked: Request, *, sized: bool) -> None:
    pinned, experts = dict(asked.pinned), asked.model.n_routed_experts
    most = pinned.get("pp", asked.devices // pinned.get("dp", 1) if sized else 2)
    if most == 1 and pinned.get("schedule", UNSCHEDULED) != UNSCHEDULED:
        raise BadRequest(f"layout.schedule={pinned['schedule']}: is one of pipelines, and layout.pp=1 is none; leave "
                         "one of them to the plan, or use more GPUs")
    tp = pinned.get("tp", 1)
    if not divides_heads(asked.model, tp) or tp > asked.most_tp:
        raise BadRequest(f"tp={tp}: must divide the model's {asked.model.n_heads} heads and be at most "
                         f"{asked.most_tp}, ranks of one node; leave it to the plan")
    degrees = {key: pinned[key] for key in ("pp", "dp", *DEGREES) if key in pinned}
    product = prod(degrees.values())
    if sized and asked.devices % product:
        words, which = " x ".join(map(option_of, degrees)), next(key for key in degrees if degrees[key] > 1)
        raise BadRequest(f"{option_of(which)}={degrees[which]}: {f'{words} = {product} ' * (len(degrees) > 1)}must "
                         f"divide the {asked.devices:,} GPUs; change one of them, or leave a degree to the plan")
    ep = pinned.get("ep", 1)
    if ep > 1 and (not experts or experts % ep):
        raise BadRequest(f"layout.ep={ep}: must divide the model's {experts} routed experts; leave it to the plan")
    if sized and (asked.devices // pinned.get("pp", 1)) % ep:
        raise BadRequest(f"layout.ep={ep}: must divide the {asked.devices // pinned.get('pp', 1):,} GPUs of a stage; "
                         "leave it to the plan")


def option_of(key: str) -> str:
    """What a part of a layout is asked for as."""
    return key if key in (*DEGREES, "zero") else f"layout.{key}"


def number(key: str, text: str, *, least: float = 1, whole: bool = False, example: str = "64") -> float:
    """An amount may end in one of `THOUSANDS`, as in 14.8T."""
    factor = 1.0 if whole else THOUSANDS.get(text[-1:].upper(), 1.0)
    try:
        value = float(text if factor == 1.0 else text[:-1]) * factor
    except ValueError:
        value = -1.0
    if not least <= value < 1e30 or (whole and value % 1):
        raise BadRequest(f"{key}={text}: must be a positive {'whole ' * whole}number{' below 1e30' * (value >= 1e30)}; "
                         f"use {key}={example}")
    return value
