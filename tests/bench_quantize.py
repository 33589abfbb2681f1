"""What the benchmark of FP4 fake quantisation compares: matrices of an expert, float32 to what FP8 holds of FP4.

python tests/bench_quantize.py      prints the times on two threads
"""

from collections.abc import Callable

import torch
from bench_protocol import OURS, alternate, duration
from torch import Tensor

from openv4.kernels.fp4 import fp4_weight
from openv4.kernels.quantize import dequantize, fp4_to_fp8, quantize_fp4

BLOCKS, GROUPS, PACKED = "torch, block by block", "torch, group by group", "packed and unpacked"
COPY, CLONE = "copy", "copy to new memory"


def expert(rows: int, columns: int = 4096) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def fp4_passes(rows: int, columns: int = 4096) -> dict[str, Callable[[], Tensor]]:
    """Of one matrix; a loop over its groups of 32 only if it has few rows, for that takes half a second for 128."""
    weight = expert(rows, columns)
    target = torch.empty_like(weight)
    passes = {
        OURS: lambda: fp4_weight(weight, torch.float32)[0],
        BLOCKS: lambda: by_pieces(weight, 128, 128),
        PACKED: lambda: dequantize(*fp4_to_fp8(*quantize_fp4(weight))[:2], torch.float32),
        COPY: lambda: target.copy_(weight),
        CLONE: weight.clone,
    }
    return passes | ({GROUPS: lambda: by_pieces(weight, 1, 32)} if rows <= 128 else {})


def by_pieces(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The rule as it is written down, one piece after the other; FP8 holds such weights exactly, so it is left out."""
    out = torch.empty_like(weight)
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            groups = weight[top : top + rows, left : left + columns].unflatten(1, (-1, 32))
            mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True) / 6)
            scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
            size = (groups / scale).abs()
            step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
            values = (size / step).round() * step * groups.sign() * scale
            out[top : top + rows, left : left + columns] = values.flatten(1)
    return out


def check(passes: dict[str, Callable[[], Tensor]]) -> None:
    """All give the same numbers."""
    wanted = passes[OURS]()
    for name, run in passes.items():
        assert name in (COPY, CLONE) or torch.equal(run(), wanted), name


def main() -> None:
    torch.set_num_threads(2)
    for rows in (128, 2048):
        passes = fp4_passes(rows)
        check(passes)
        times = alternate(passes, rehearse=True)
        for name, timing in times.items():
            ratio = timing.median_s / times[OURS].median_s
            print(f"{rows} x 4096, {name}: {duration(timing)}, {ratio:.2f} of ours{', noisy' if timing.noisy else ''}")


if __name__ == "__main__":
    main()
