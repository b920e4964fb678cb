"""What FP8 does to the loss and the gradient at the same weights, where no two runs can part ways by chance.

    python benchmarks/fp8_gradient.py

`tiny` without its MTP module learns the standard library's source for some steps in fp32. Then the loss and the
gradient of further batches are computed twice, in fp32 and in emulated FP8: relative difference of the loss, relative
error of the whole gradient, its projection onto the fp32 one (1 is no bias), and, beside them, how far the fp32
gradients of two batches are apart.
"""

import argparse
import copy
import statistics
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import to_fp8
from model.init import initial_rows
from model.transformer import Transformer
from orchestrator.compose import compose_config

FILES = ("argparse.py", "typing.py", "inspect.py", "doctest.py", "datetime.py", "subprocess.py")
SEQUENCES, LENGTH = 4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batches", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = compose_config(["model=tiny", "model.n_mtp_layers=0"]).model
    library = Path(sysconfig.get_paths()["stdlib"])
    text = torch.tensor(list(b"".join((library / name).read_bytes() for name in FILES)))
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        parameter.data = initial_rows(name, tuple(parameter.shape), config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(args.steps):
        gradient(model, text, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 10)
        optimizer.step()
    eight = copy.deepcopy(model)
    to_fp8(eight)
    rows, before = [], None
    for batch in range(900, 900 + args.batches):
        (loss, plain), (loss8, found) = gradient(model, text, batch), gradient(eight, text, batch)
        apart = (plain - before).norm() / plain.norm() if before is not None else torch.tensor(float("nan"))
        rows.append([loss8 / loss - 1, ((found - plain).norm() / plain.norm()).item(),
                     ((found @ plain) / (plain @ plain)).item(), apart.item()])
        before = plain
    print(f"{args.batches} batches of {SEQUENCES * LENGTH} tokens after {args.steps} steps; mean (standard error)")
    for name, values in zip(("loss, FP8 against fp32", "gradient, relative error", "gradient, projection",
                             "gradients of two batches, relative distance"), zip(*rows, strict=True), strict=True):
        values = [value for value in values if value == value]
        error = statistics.stdev(values) / len(values) ** 0.5
        print(f"{name:44}{statistics.mean(values):+.5f} ({error:.5f})")


def gradient(model: Transformer, text: Tensor, seed: int) -> tuple[float, Tensor]:
    """Loss of a batch and all gradients in one vector, which the parameters keep, too."""
    starts = torch.randint(0, len(text) - LENGTH - 1, (SEQUENCES,), generator=torch.Generator().manual_seed(seed))
    tokens = torch.stack([text[start : start + LENGTH + 1] for start in starts])
    model.zero_grad()
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
