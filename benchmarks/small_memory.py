"""A checkpoint in less memory than it takes: this project's experts on disk beside transformers' own offloading.

    sparing train model=mini model.dim=256 model.n_layers=6 model.n_routed_experts=64 model.inter_dim=768 \\
        train.steps=80 train.seq_len=256 run.dir=runs/wide      # 79M parameters, 72M of them in experts
    python benchmarks/small_memory.py runs/wide

For 100%, 50% and 25% of the checkpoint's fp32 bytes: resident memory above what a tiny model takes (the
process's own peak, mapped files included), tokens per second of greedy decoding, by the clock and by CPU seconds for a
machine that is shared (medians over three prompts), and bits per byte on held-out text. Every row is a process of its
own, of one thread, all on the same files of one Hugging Face export; transformers gets `max_memory` and an offload
folder (accelerate).
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARES = (1.0, 0.5, 0.25)
PROMPTS = ("import os\n\n\ndef walk(top):\n    ", "class Wrapper:\n    \"\"\"", "    for name in sorted(")
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
        write_tiny(Path(folder, "hf"), Path(folder, "tiny"))
        whole = sum(file.stat().st_size for file in Path(folder, "hf").glob("*.safetensors"))
        print(f"{whole / GIB:.3f} GiB in fp32; limit is of weights, resident is above a tiny model's\n")
        print(f"{'':30}{'limit MiB':>10}{'resident MiB':>14}{'tokens/s':>10}{'per CPU s':>11}{'bits/byte':>11}"
              f"{'experts hit':>13}")
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
                      f"{found['tokens_per_s']:>10.1f}{found['tokens_per_cpu_s']:>11.1f}{found['bits_per_byte']:>11.4f}"
                      f"{hits}", flush=True)


def write_tiny(like: Path, path: Path) -> None:
    """A model of the same kind and next to no size, of random weights."""
    from model import hf
    from model.transformer import Transformer

    config, _ = hf.load(like)
    config = dataclasses.replace(config, dim=64, n_layers=2, n_dense_layers=1, inter_dim=64, n_routed_experts=8,
                                 moe_inter_dim=64)
    hf.export(path, config, Transformer(config).state_dict())


def measure(*, software: str, form: str, limit: int, folder: str, tokens: int) -> dict:
    """One row, in this process."""
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    text = held_out()
    run = {"transformers": _transformers, "sparing": _sparing}[software]
    return run(torch, text, form=form, limit=limit, folder=folder, tokens=tokens)


def held_out() -> bytes:
    """Four windows of the standard library's tests, which the default corpus leaves out."""
    import test.test_textwrap

    return Path(test.test_textwrap.__file__).read_bytes()[:2048]


def _sparing(torch, text, *, form, limit, folder, tokens) -> dict:
    from model.decode import Decoder
    from model.generate import generate
    from orchestrator.cold_weights import experts_of, load_within

    def load(path: str, limit: int):
        return load_within(path, max_gib=limit / GIB, form=form, tokenizer="byte", cache_dir=f"{path}-experts",
                           cache_tokens=128 + tokens)

    def say(model, prompt: list[int], tokens: int) -> None:
        decoder = Decoder(model, slots=1, capacity=len(prompt) + tokens)
        assert sum(1 for _ in generate(decoder, [prompt], max_tokens=tokens)) == tokens

    say(load(f"{folder}/tiny", GIB).model, [1, 2], 2)
    before = _reset_peak()
    loaded = load(f"{folder}/hf", limit)
    rates = _rates(lambda prompt: say(loaded.model, prompt, tokens), tokens)
    hot = experts_of(loaded.model)[0].hot
    hits = hot.hits / (hot.hits + hot.misses)
    bits = _bits(torch, text, lambda ids: loaded.model(ids))
    return {"resident": _peak() - before, **rates, "bits_per_byte": bits, "hits": hits}


def _transformers(torch, text, *, form, limit, folder, tokens) -> dict:
    import transformers

    transformers.logging.set_verbosity_error()
    from accelerate import dispatch_model  # noqa: F401  imported before memory is counted
    from transformers import AutoModelForCausalLM

    def load(path: str, limit: int):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="auto",
                                                    max_memory={"cpu": limit}, offload_folder=f"{path}-offload")

    def say(model, prompt: list[int], tokens: int) -> None:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                             eos_token_id=None, pad_token_id=0)
        assert out.shape[1] == len(prompt) + tokens

    say(load(f"{folder}/tiny", GIB), [1, 2], 2)
    before = _reset_peak()
    model = load(f"{folder}/hf", limit)
    rates = _rates(lambda prompt: say(model, prompt, tokens), tokens)
    bits = _bits(torch, text, lambda ids: model(ids).logits)
    return {"resident": _peak() - before, **rates, "bits_per_byte": bits, "hits": None}


def _rates(say, tokens: int) -> dict[str, float]:
    """Tokens a second and a CPU second, prompt included: of the three prompts the middle one."""
    walls, cpus = [], []
    for prompt in PROMPTS:
        wall, cpu = time.perf_counter(), time.process_time()
        say(list(prompt.encode()))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"tokens_per_s": tokens / statistics.median(walls), "tokens_per_cpu_s": tokens / statistics.median(cpus)}


def _bits(torch, text: bytes, logits_of) -> float:
    windows = torch.tensor(list(text)).view(4, -1)
    total = 0.0
    for window in windows:
        logits = logits_of(window[None])[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / math.log(2) / (windows.numel() - len(windows))


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Bytes: the most that was resident since the last reset, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
