"""The command: `sparing VERB ...`, equally `python -m orchestrator VERB ...`. Parse, check, call, tell, exit.

Exit codes: 0 done, 1 failed, 2 bad request, 3 environment not fit, 17 not trustworthy, 33 transient, 34 preempted, 93
fault after fault without progress, 130 interrupted by Ctrl-C with nothing to save, 141 what is printed has lost its
reader (`| head`).
SPARING_TRACEBACK=1 shows where an error came from. What takes time to import is imported where `main` hears Ctrl-C.
"""

import errno
import importlib
import logging
import os
import signal
import sys

from orchestrator.errors import INTERRUPTED, UNREAD, BadRequest, NotFit, SparingError

USAGE = """\
Sparing trains mixture-of-experts language models and accounts for what that costs.

usage: sparing VERB [arguments]      (the same as python -m orchestrator VERB ...)

  train   [OVERRIDES]        train; `sparing train experiment=tiny` is a first run of about two minutes
  prepare [OVERRIDES]        tokenise a run's corpus before any device is paid for
  launch  OVERRIDES          train on a cluster: launch=ray_job, slurm, kuberay, skypilot or torchrun
  plan    OVERRIDES          rank layouts for a model, GPUs and tokens: step time, memory, GPU-hours, dollars; predicted
  status  RUN                what a live run is doing: who hosts what, load, rate, cost so far
  report  RUN [RUN ...]      one self-contained HTML page (and Markdown) about finished runs; out=FILE.html
  compare [OVERRIDES]        train the model and its dense twins on the same data: what each loss cost, measured
  export  CHECKPOINT DIR     write a Hugging Face directory; dtype=fp32, bf16 or fp8
  import  DIR CHECKPOINT     read a Hugging Face directory; then train with resume=CHECKPOINT
  evaluate CHECKPOINT [..]   bits per byte and perplexity on text, or tasks of lm-evaluation-harness
  generate CHECKPOINT [..]   text from a prompt, streamed; speculative=compare says what drafts gain
  serve   CHECKPOINT         an OpenAI-compatible server: completions and chat, continuous batching, its own bill

`sparing VERB --help` says more."""

HELP = {
    "train": """\
usage: sparing train [KEY=VALUE ...] [Hydra flags]

  sparing train experiment=tiny                        four ranks on this machine (layout pp=2, dp=2, ep=2)
  sparing train experiment=tiny train.steps=50 layout.schedule=dualpipev layout.microbatches=4
  sparing train data=text data.path='/corpus/*.jsonl'  your own text
  sparing train data=text 'data.path="web/*.jsonl,code/*.jsonl"' data.weights=[0.8,0.2]    mixed by these shares
  sparing train model=path/to/config.json              the shape of a Hugging Face config.json, from scratch
  sparing train run.dir=runs/NAME resume=auto          go on with a run, with its own config
  sparing train budget.max_usd=25                      end, with a checkpoint, before it costs more

Groups: model layout data optim precision checkpoint tracker hardware cluster experiment; `model=x` lists what there is.
Flags:  --cfg job (print the config), --multirun (one run per value), --hydra-help; and, for completion in bash,
        eval "$(sparing -sc install=bash)\"""",
    "status": "usage: sparing status RUN\n\nRUN is a run directory, such as runs/tiny-20261124-120000.",
    "report": "usage: sparing report RUN [RUN ...] [out=FILE.html]\n\n"
              "Several runs are overlaid. Default: RUN/report.html.",
    "export": "usage: sparing export CHECKPOINT DIR [dtype=fp32|bf16|fp8]\n\n"
              "CHECKPOINT may be a run directory: its newest.",
    "import": "usage: sparing import DIR CHECKPOINT\n\n"
              "DIR holds config.json and safetensors of a supported architecture.",
}
# Verbs that have a module of their own, with HELP and run(arguments) -> exit code; imported when called.
MODULES = {"compare": "orchestrator.compare", "evaluate": "orchestrator.evaluate", "generate": "orchestrator.generate",
           "launch": "orchestrator.launch", "plan": "orchestrator.show_plan", "prepare": "orchestrator.prepare",
           "serve": "orchestrator.serve"}
EXIT_CODES = {"completed": 0, "budget": 0, "preempted": 34, "failed": 1}


def main(argv: list[str] | None = None) -> int:
    """argv: by default the process's own, whose signals are then heard, too."""
    if argv is None:
        argv = sys.argv[1:]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupted)
        logging.raiseExceptions = False  # a log that cannot be printed is no reason to print more
    try:
        code = _told(argv)
        sys.stdout.flush()
        return code
    except OSError as error:
        return _system_told(error, argv)


def _told(argv: list[str]) -> int:
    try:
        return _run(argv)
    except SparingError as error:
        _print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # as rich leaves
            return UNREAD
        raise


def _system_told(error: OSError, argv: list[str]) -> int:
    """A path of the user's, or what is printed, that the system refused; any other error goes on."""
    from orchestrator.arguments import blamed
    from orchestrator.train.storage import FULL, refusal

    unread = error.errno in (errno.EPIPE, errno.EIO) and _is_unread()  # a pipe, or a terminal
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what it holds would end the process in another error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if unread:
        return UNREAD
    if found := blamed(error, argv[1:]):
        _print_error(found[0] + str(refusal(error, found[1])))
    elif error.filename is None and error.errno in FULL:
        _print_error("stdout: no space left; send it to another place")
    else:
        raise error
    return NotFit.exit_code


def _is_unread() -> bool:
    import select

    watched = select.poll()
    for stream in (1, 2):
        watched.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))


def _print_error(words: str) -> None:
    if os.environ.get("SPARING_TRACEBACK"):
        import traceback

        traceback.print_exc()
    print(f"error: {words}", file=sys.stderr)


def _interrupted(number, frame) -> None:
    """Ctrl-C. In an import nothing can be lost yet, and what libraries make of a KeyboardInterrupt there is anything
    from another error to a crash: the process ends at once."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"sparing {version('sparing')}")
        return 0
    verb, arguments = argv[0], argv[1:]
    if {verb, *arguments[:1]} & {"-sc", "--shell-completion"}:
        from orchestrator.completion import complete

        return complete([argument for argument in argv if "=" in argument], [*VERBS, *MODULES])
    if verb in MODULES:
        module = importlib.import_module(MODULES[verb])
        if arguments[:1] in (["-h"], ["--help"]):
            print(module.HELP)
            return 0
        return module.run(arguments)
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, [*VERBS, *MODULES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*VERBS, *MODULES])}"
        raise BadRequest(f"{verb}: no such verb; {hint} (`sparing --help`)")
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP[verb])
        return 0
    return VERBS[verb](arguments)


def _train(arguments: list[str]) -> int:
    from orchestrator.compose import compose_config, with_hydra_flags
    from orchestrator.overrides import check_overrides
    from orchestrator.own_files import expanded

    arguments = expanded(arguments)
    if any(argument.startswith("-") for argument in arguments):
        check_overrides([argument for argument in arguments if "=" in argument and not argument.startswith("-")])
        return with_hydra_flags(arguments, train_config)
    return train_config(compose_config(arguments))


def train_config(config) -> int:
    """Check and run one config, here as one of torchrun's processes or as Ray's driver; returns the exit code."""
    from orchestrator.choices import LaunchKind
    from orchestrator.plan.layout import check_run

    check_run(config)
    if config.launch.kind is not LaunchKind.local:
        raise BadRequest(f"launch={config.launch.kind.name}: train runs on the machine or the cluster it is in; leave "
                         "it out, or use `sparing launch`")
    if config.run.calibrate:
        from orchestrator.train.expected import read_calibration

        read_calibration(config.run.calibrate, routing=False)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from orchestrator.train.rank import train_as_rank

        summary = train_as_rank(config)
    else:
        from orchestrator.cluster.controller import train

        summary = train(config)
    if summary is None:
        return 0
    from orchestrator.train.finish import format_usd, headline

    run_dir = _shown(summary["run_dir"])
    following = (f"{_command()} report {run_dir}" if summary["status"] != "preempted"
                 else f"{_command()} train run.dir={run_dir} resume=auto")
    lines, usd, most = headline(summary), summary["usd_total"], config.budget.max_usd
    if most is not None and usd is not None and usd > most:
        lines.append(f"budget    {format_usd(most)} passed: no run ends before its start, a step and a checkpoint")
    print("\n" + "\n".join([*lines, f"run       {run_dir}", f"next      {following}"]))
    return NotFit.exit_code if summary["checkpoint"]["error"] else EXIT_CODES[summary["status"]]


def _status(arguments: list[str]) -> int:
    from orchestrator.arguments import positional
    from orchestrator.cluster.status import show_status

    show_status(*positional("status", arguments, 1, HELP["status"]))
    return 0


def _report(arguments: list[str]) -> int:
    from orchestrator.arguments import options
    from orchestrator.report import write_report

    named, runs = options("report", arguments, ("out",), HELP["report"])
    print(f"wrote {_shown(write_report(runs, named.get('out')))}")
    return 0


def _export(arguments: list[str]) -> int:
    import shlex

    from orchestrator.arguments import choice, options, positional
    from orchestrator.train.folder import check_new

    named, rest = options("export", arguments, ("dtype",), HELP["export"])
    source, out = positional("export", rest, 2, HELP["export"])
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
    dtype = dtypes[choice(named, "dtype", tuple(dtypes))]
    check_new(out)
    import torch

    from orchestrator.train.export import TOKENIZER, export_checkpoint

    path = export_checkpoint(source, out, dtype=getattr(torch, dtype))
    print(f"wrote {out} from {_shown(path)}\n"
          f"next  AutoModelForCausalLM.from_pretrained({out!r}), or {_command()} import {shlex.quote(out)} CHECKPOINT")
    if not os.path.isfile(os.path.join(out, TOKENIZER)):
        print(f"note  the checkpoint's {TOKENIZER} is not to be found any more: put it into {out}")
    return 0


def _import(arguments: list[str]) -> int:
    import shlex
    from functools import partial

    from orchestrator.arguments import positional
    from orchestrator.train.folder import check_new

    source, out = positional("import", arguments, 2, HELP["import"])
    check_new(out)
    from orchestrator.train.export import TOKENIZER, import_hf
    from orchestrator.train.progress import Progress

    unit = "M parameters, with any MTP module"
    with Progress() as progress:
        path = import_hf(source, out, on_progress=partial(progress.amount, "importing", unit))
    beside = os.path.join(out, TOKENIZER)
    words = [f"model={os.path.join(source, 'config.json')}", f"resume={out}"]
    words += [f"data.tokenizer={beside}"] * os.path.isfile(beside)
    print(f"wrote {_shown(path)}\nnext  {_command()} generate {shlex.quote(out)} prompt=...\n"
          f"next  {_command()} train {shlex.join(words)}")
    if not os.path.isfile(beside):
        print(f"note  {source} has no {TOKENIZER}: generate, evaluate and serve need tokenizer=FILE")
    return 0


def _command() -> str:
    """How this program is called from here."""
    import shutil

    if shutil.which("sparing"):
        return "sparing"
    beside = os.path.join(os.path.dirname(sys.executable), "sparing")
    return _shown(beside) if os.path.exists(beside) else f"{_shown(sys.executable)} -m orchestrator"


def _shown(path: str) -> str:
    """A local path as short as it can be typed from here."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return path if relative.startswith("..") else relative


VERBS = {"train": _train, "status": _status, "report": _report, "export": _export, "import": _import}

if __name__ == "__main__":
    sys.exit(main())
