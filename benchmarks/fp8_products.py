"""Speed of FP8 products at the shapes of DeepSeek-V3's experts: the Triton kernels here beside torch's blockwise
`scaled_mm` (one weight for all rows), bf16 matmul (likewise) and bf16 `grouped_mm`, which is what FP8 has to beat.

    python benchmarks/fp8_products.py --experts 8 --rows 2048

Ways take turns, so that a GPU whose clock drifts slows all; times are medians of one run, ratios to `grouped_mm`.
`quantised` counts the quantisation of the rows, too; a weight is quantised once a step. Without a GPU that has FP8
tensor cores (Ada, Hopper or newer) it says so and ends.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {"w13": (4096, 7168), "w2": (7168, 2048)}
"""Outputs and inputs."""


def ways(outputs: int, inputs: int, experts: int, rows: int) -> dict[str, Callable[[], Tensor]]:
    """Products of experts x rows tokens, all of the same number of operations."""
    from model import fp8_kernels as kernels

    device = torch.device("cuda")
    x = torch.randn(experts * rows, inputs, device=device, dtype=torch.bfloat16)
    grad = torch.randn(experts * rows, outputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(experts, outputs, inputs, device=device, dtype=torch.bfloat16)
    counts = torch.full((experts,), rows, device=device)
    offsets = counts.cumsum(0).to(torch.int32)
    q, w = kernels.act_quant(x), kernels.weight_quant(weight)
    return {
        "bf16 grouped_mm": lambda: F.grouped_mm(x, weight.mT, offs=offsets),
        "bf16 matmul": lambda: x @ weight[0].mT,
        "torch scaled_mm": lambda: scaled_mm(*q, w.data[0], w.scale[0]),
        "Triton": lambda: kernels.rows_product(q, w, counts, torch.bfloat16),
        "Triton, quantised": lambda: kernels.rows_product(kernels.act_quant(x), w, counts, torch.bfloat16),
        "weight gradient, bf16 grouped_mm": lambda: F.grouped_mm(grad.mT, x, offs=offsets),
        "weight gradient, Triton, quantised": lambda: kernels.weight_gradient(grad, x, counts, False, False,
                                                                              torch.bfloat16),
    }


def scaled_mm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x [R, K] in 1x128 tiles times weight [N, K] in 128x128 blocks, transposed, K a multiple of 512. cuBLAS wants the
    tiles' scales with rows innermost, and Hopper."""
    return F.scaled_mm(x, weight.t(), x_scale.t().contiguous().t(), F.ScalingType.BlockWise1x128, weight_scale.t(),
                       F.ScalingType.BlockWise128x128, output_dtype=torch.bfloat16)


def seconds(way: Callable[[], Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2048, help="of each expert")
    parser.add_argument("--turns", type=int, default=20)
    asked = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() < (8, 9):
        print("needs a GPU with FP8 tensor cores (Ada, Hopper or newer); nothing was measured")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.experts} x {asked.rows} rows")
    for name, (outputs, inputs) in SHAPES.items():
        found, refused = ways(outputs, inputs, asked.experts, asked.rows), {}
        for label, way in list(found.items()):
            try:
                way()
                torch.cuda.synchronize()
            except (RuntimeError, NotImplementedError, ValueError) as error:
                refused[label] = str(error).splitlines()[0]
                del found[label]
        turns = [{label: seconds(way) for label, way in found.items()} for _ in range(asked.turns)]
        operations = 2 * asked.experts * asked.rows * outputs * inputs
        print(f"\n{name}: {outputs} outputs, {inputs} inputs")
        for label in found:
            took = statistics.median(turn[label] for turn in turns)
            base = "weight gradient, bf16 grouped_mm" if label.startswith("weight") else "bf16 grouped_mm"
            ratio = (f"{statistics.median(turn[base] / turn[label] for turn in turns):.2f}x" if base in found else "")
            print(f"  {label:36} {took * 1e3:8.3f} ms  {operations / took / 1e12:7.1f} TFLOP/s  {ratio}")
        for label, why in refused.items():
            print(f"  {label:36} refused: {why}")


if __name__ == "__main__":
    main()
