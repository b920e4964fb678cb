"""`sparing serve`: a checkpoint behind an OpenAI-compatible API. From words to a server; the rest is serve_*.py."""

import ipaddress
import os
import signal
import socket
import sys

from orchestrator.arguments import choice, memory_limit, number, options, positional, tokenizer_named
from orchestrator.errors import BadRequest, NotFit
from orchestrator.train.finish import format_usd

HELP = """\
usage: sparing serve CHECKPOINT [KEY=VALUE ...]

  sparing serve runs/mine                             http://127.0.0.1:8000/v1, for any OpenAI client
  sparing serve runs/mine port=8080 slots=16 context=2048
  SPARING_API_TOKEN=... sparing serve runs/mine host=0.0.0.0

CHECKPOINT is a run directory, a checkpoint in it, or a Hugging Face directory.
  host=127.0.0.1     an address that others reach needs SPARING_API_TOKEN set, which clients send as their API key
  port=8000          0 takes a free one
  name=NAME          what clients call the model; the directory's name by default
  slots=8            sequences decoded at once; others wait, up to waiting=64, then are sent away (429)
  context=N          most tokens of prompt and answer; the model's by default, at most 4,096
  max_tokens=1024    most tokens of an answer
  timeout_s=120      most seconds of an answer
  speculative=false  true drafts with the model's MTP module
  hardware=auto      entry of conf/hardware whose price the bill takes
  tokenizer=FILE     a tokenizer.json or `byte`, where the checkpoint names none
  memory.max_gib=N   most memory for weights, keys and values: experts stay on disk, the hottest in memory
  weights=fp32       of experts on disk: fp32, bf16, fp8 or int4
GET /v1/usage tells tokens, seconds and dollars per million input and output tokens so far. Ctrl-C ends it."""
OPTIONS = ("host", "port", "name", "slots", "waiting", "context", "max_tokens", "timeout_s", "speculative", "hardware",
           "tokenizer", "memory.max_gib", "weights")
TOKEN = "SPARING_API_TOKEN"


def run(arguments: list[str]) -> int:
    named, rest = options("serve", arguments, OPTIONS, HELP)
    (path,) = positional("serve", rest, 1, HELP)
    if named.get("name") == "":
        raise BadRequest("name=: is empty; give what clients are to call the model, or leave it out")
    host, token = _host(named.get("host", "127.0.0.1")), os.environ.get(TOKEN)
    slots, waiting = int(number(named, "slots", 8, 1, 1024)), int(number(named, "waiting", 64, 0, 100_000))
    speculative = choice(named, "speculative", ("false", "true")) == "true"
    most, timeout_s = int(number(named, "max_tokens", 1024, 1)), number(named, "timeout_s", 120, 0.1, whole=False)
    memory, tokenizer = memory_limit(named), tokenizer_named(named)
    listener = _listen(host, int(number(named, "port", 8000, 0, 65535)))
    try:
        import uvicorn

        from orchestrator.serve_api import Limits, Server, build_app
        from orchestrator.serve_engine import Engine
    except ImportError as error:
        raise NotFit(f"serve: needs the package {error.name}; pip install 'sparing[serve]'") from None
    import torch

    from orchestrator.config import HardwareConfig
    from orchestrator.inference import beyond_training, load, look, uses_gpu
    from orchestrator.plan.hardware import hardware_named, resolve_hardware

    asked, device = named.get("hardware", "auto"), torch.cuda.get_device_name() if uses_gpu(memory) else None
    hardware = (hardware_named(asked) if asked != "auto" else
                resolve_hardware(HardwareConfig(name="auto"), device))
    weights, _ = look(path, tokenizer=tokenizer)
    window = weights.config.max_seq_len
    if speculative and not weights.config.n_mtp_layers:
        raise BadRequest(f"speculative=true: {path} has no MTP module to draft with; use speculative=false")
    capacity = int(number(named, "context", min(4096, window), 2, window))
    if notice := beyond_training(weights.trained_len, capacity):
        print(notice, file=sys.stderr, flush=True)
    loaded = load(path, memory, tokenizer=tokenizer, cache_tokens=slots * (capacity + 1))
    engine = Engine(loaded, slots=slots, capacity=capacity, max_waiting=waiting, speculative=speculative)
    name = named.get("name") or os.path.basename(os.path.abspath(path))
    app = build_app(engine, name=name, limits=Limits(most, timeout_s), token=token, usd_per_h=hardware.usd_per_h)
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3,
                                   limit_concurrency=connections(slots, waiting)), engine)
    listener.listen()  # who reads the line below may connect at once
    address, port = listener.getsockname()[:2]
    address = f"[{address}]" if ":" in address else address
    print(f"serving {name} at http://{address}:{port}/v1 ({slots} slots of {capacity} tokens, "
          f"{'token asked for' if token else 'no token asked for'}); Ctrl-C ends it", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
    print(summary(engine.usage.report(hardware.usd_per_h), hardware.name), file=sys.stderr)
    return 0


def connections(slots: int, waiting: int) -> int:
    """Most clients at a time; more are sent away (503). As many again as may have something to do here: clients keep
    idle connections."""
    return 2 * (slots + waiting) + 32


def summary(usage: dict, device: str) -> str:
    """What serving cost, in a line."""
    line = (f"{usage['requests']:,} requests, {usage['input_tokens']:,} tokens in, {usage['output_tokens']:,} out, "
            f"up {usage['up_s']:,.0f} s")
    if usage["charged_usd"] is None:
        return f"{line}; no price is known for {device}"
    prices = ", ".join(f"{format_usd(usage[key])} per million {kind} tokens" for key, kind in
                       (("usd_per_million_input", "input"), ("usd_per_million_output", "output"))
                       if usage[key] is not None)
    return f"{line}, {format_usd(usage['charged_usd'])} at ${usage['usd_per_h']:g} an hour ({device})" + (
        f"; at work {prices}" if prices else "")


def _host(host: str) -> str:
    """An address to listen on; one that others reach wants a token."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise BadRequest(f"host={host}: must be an IP address; use host=127.0.0.1, or host=0.0.0.0 to be reached from "
                         "elsewhere") from None
    if not address.is_loopback and not os.environ.get(TOKEN):
        raise BadRequest(f"host={host}: others reach that address; set the environment variable {TOKEN} to a secret "
                         "that clients send as their API key, or use host=127.0.0.1")
    return str(address)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) where the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise BadRequest(f"port={port}: cannot be listened on at {host} ({error.strerror}); use another, or port=0 for "
                         "a free one") from None
    return listener
