"""A checkpoint in less memory than it takes: this project's experts on disk beside transformers' own offloading.

    sparing train model=mini model.dim=256 model.n_layers=6 model.n_routed_experts=64 model.inter_dim=768 \\
        train.steps=150 train.seq_len=256 run.dir=runs/wide     # 72M parameters, 63M of them in experts
    python benchmarks/small_memory.py runs/wide

For 100%, 50% and 25% of the checkpoint's fp32 bytes: resident memory above what imports take (the process's own peak),
tokens per second of greedy decoding, and bits per byte on held-out text. Every row is a process of its own, all on the
same files of one Hugging Face export; transformers gets `max_memory` and an offload folder (accelerate).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARES = (1.0, 0.5, 0.25)
PROMPT = "import os\n\n\ndef walk(top):\n    "
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(**json.loads(arguments.row))))
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "orchestrator", "export", arguments.checkpoint, f"{folder}/hf"],
                       check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        whole = sum(file.stat().st_size for file in Path(folder, "hf").glob("*.safetensors"))
        print(f"{whole / GIB:.3f} GiB in fp32; limit is of weights, resident is above imports\n")
        print(f"{'':30}{'limit MiB':>10}{'resident MiB':>14}{'tokens/s':>10}{'bits/byte':>11}{'experts hit':>13}")
        for share in SHARES:
            rows = [("transformers", "fp32")] + [("sparing", form) for form in
                                                 (("fp32",) if share == 1 else ("fp32", "bf16", "fp8", "int4"))]
            for software, form in rows:
                asked = {"software": software, "form": form, "limit": int(whole * share), "folder": folder,
                         "tokens": arguments.tokens}
                done = subprocess.run([sys.executable, __file__, "--row", json.dumps(asked)], capture_output=True,
                                      text=True, cwd=ROOT)
                name = f"{share:.0%} {software}, {form}"
                if done.returncode:
                    print(f"{name:30}{whole * share / 2**20:>10.0f}  failed: {done.stderr.splitlines()[-1][:90]}")
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                hits = "" if found["hits"] is None else f"{found['hits']:>12.0%}"
                print(f"{name:30}{whole * share / 2**20:>10.0f}{found['resident'] / 2**20:>14.0f}"
                      f"{found['tokens_per_s']:>10.2f}{found['bits_per_byte']:>11.4f}{hits}", flush=True)


def measure(*, software: str, form: str, limit: int, folder: str, tokens: int) -> dict:
    """One row, in this process."""
    warnings.simplefilter("ignore")
    import torch

    torch.set_grad_enabled(False)
    text = held_out()
    run = {"transformers": _transformers, "sparing": _sparing}[software]
    return run(torch, text, form=form, limit=limit, folder=folder, tokens=tokens)


def held_out() -> bytes:
    """Four windows of the standard library's tests, which the default corpus leaves out."""
    import test.test_textwrap

    return Path(test.test_textwrap.__file__).read_bytes()[:2048]


def _sparing(torch, text, *, form, limit, folder, tokens) -> dict:
    from model.generate import Decoder, generate
    from orchestrator.cold_weights import experts_of, load_within

    _load_imports(form)
    before = _reset_peak()
    loaded = load_within(f"{folder}/hf", max_gib=limit / GIB, form=form, tokenizer="byte",
                         cache_dir=f"{folder}/experts")
    prompt = list(PROMPT.encode())
    decoder, begun = Decoder(loaded.model, slots=1, capacity=len(prompt) + tokens), time.perf_counter()
    made = sum(1 for _ in generate(decoder, [prompt], max_tokens=tokens))
    seconds = time.perf_counter() - begun
    hot = experts_of(loaded.model)[0].hot
    hits = hot.hits / (hot.hits + hot.misses)
    bits = _bits(torch, text, lambda ids: loaded.model(ids))
    return {"resident": _peak() - before, "tokens_per_s": made / seconds, "bits_per_byte": bits, "hits": hits}


def _transformers(torch, text, *, form, limit, folder, tokens) -> dict:
    import transformers

    transformers.logging.set_verbosity_error()
    from accelerate import dispatch_model  # noqa: F401  imported before memory is counted
    from transformers import AutoModelForCausalLM

    before = _reset_peak()
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32, device_map="auto",
                                                 max_memory={"cpu": limit}, offload_folder=f"{folder}/offload")
    prompt = torch.tensor([list(PROMPT.encode())])
    begun = time.perf_counter()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                         eos_token_id=None, pad_token_id=0)
    seconds = time.perf_counter() - begun
    bits = _bits(torch, text, lambda ids: model(ids).logits)
    return {"resident": _peak() - before, "tokens_per_s": (out.shape[1] - prompt.shape[1]) / seconds,
            "bits_per_byte": bits, "hits": None}


def _bits(torch, text: bytes, logits_of) -> float:
    windows = torch.tensor(list(text)).view(4, -1)
    total = 0.0
    for window in windows:
        logits = logits_of(window[None])[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / math.log(2) / (windows.numel() - len(windows))


def _load_imports(form: str) -> None:
    """What packing needs is imported before memory is counted."""
    import torch

    from model.packed import pack

    pack(torch.ones(128, 128), form)


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Bytes: the most that was resident since the last reset, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
