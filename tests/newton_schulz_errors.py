"""Errors of Newton-Schulz by form and by the numbers that are multiplied, against the same ten iterations in float64.

    python tests/newton_schulz_errors.py

writes docs/results/newton_schulz.json and .md: some minutes on two cores. What a GPU rounds is rounded here in torch.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from newton_schulz_cases import float16, hard_spectra, random, split_gram_form, with_spectrum
from torch import Tensor

from openv4.kernels.dispatch import using
from openv4.kernels.newton_schulz import (
    NEWTON_SCHULZ_COEFFICIENTS,
    RESTART,
    SEGMENTS,
    newton_schulz,
    newton_schulz_reference,
)

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SIZES = ((128, 1024), (512, 1024))
EXPERT, Q_B = (2048, 4096), (1024, 32768)
# Dense TFLOP/s of an H100 that docs/results count with; three products of a format take three times as long.
RATE = {"BF16": 800.0, "FP16": 800.0, "TF32": 350.0, "FP32": 60.0}


def bfloat16(x: Tensor, _: float = 1.0) -> Tensor:
    return x.bfloat16().float()


def tf32(x: Tensor, _: float = 1.0) -> Tensor:
    """As a tensor core reads float32: cut off after 10 bits."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def product(a: Tensor, b: Tensor, narrow: Callable[[Tensor], Tensor], terms: int) -> Tensor:
    p, q = narrow(a), narrow(b)
    return p @ q if terms == 1 else (narrow(a - p) @ q).add(p @ narrow(b - q)).add(p @ q)


def standard(matrices: Tensor) -> Tensor:
    """The paper's form, everything held and multiplied in BF16, as common implementations do."""
    x = bfloat16(matrices / torch.linalg.matrix_norm(matrices, keepdim=True))
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        gram = bfloat16(x @ x.mT)
        polynomial = bfloat16(b * gram + c * (gram @ gram))
        x = bfloat16(a * x + polynomial @ x)
    return x


def gram_form(
    matrices: Tensor, segments: tuple[int, ...], narrow: Callable[[Tensor], Tensor], terms: int = 1
) -> Tensor:
    """Of whole matrices P = a I + b G + c G^2, as on a CPU, with rounded factors."""
    multiply = partial(product, narrow=narrow, terms=terms)
    x, done = matrices / torch.linalg.matrix_norm(matrices, keepdim=True), 0
    for count in segments:
        gram, factor = multiply(x, x.mT), torch.eye(len(x))
        for index, (a, b, c) in enumerate(NEWTON_SCHULZ_COEFFICIENTS[done : done + count]):
            polynomial = b * gram + c * multiply(gram, gram)
            polynomial.diagonal().add_(a)
            factor = multiply(factor, polynomial) if index else polynomial
            gram = multiply(multiply(gram, polynomial), polynomial)
        x = multiply(factor, x)
        done += count
    return x


class Arm(NamedTuple):
    """A form, the iterations of its segments, and what is multiplied."""

    form: str
    segments: tuple[int, ...]
    format: str
    terms: int
    run: Callable[[Tensor], Tensor]

    def milliseconds(self, n: int, m: int) -> float:
        """Floor on an H100; of products with a symmetric result one half is computed."""
        flops = sum(3 * n * n * m + (4 * count - 3) * n**3 for count in self.segments)
        return self.terms * flops / RATE[self.format] / 1e9


ONES = (1,) * 10
HALVES = (RESTART, len(NEWTON_SCHULZ_COEFFICIENTS) - RESTART)


def arms() -> list[Arm]:
    def fp32(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def on_torch(matrices: Tensor) -> Tensor:
            with using("torch"):
                return run(matrices)

        return on_torch

    found = [
        Arm("standard", ONES, "BF16", 1, standard),
        Arm("standard", ONES, "FP32", 1, fp32(newton_schulz_reference)),
        Arm("Gram", HALVES, "FP32", 1, fp32(newton_schulz)),
        Arm("Gram", HALVES, "TF32", 3, lambda x: gram_form(x, HALVES, tf32, 3)),
        Arm("Gram", HALVES, "BF16", 3, lambda x: gram_form(x, HALVES, bfloat16, 3)),
        Arm("Gram", HALVES, "BF16", 1, lambda x: gram_form(x, HALVES, bfloat16)),
        Arm("Gram", (2,) * 5, "BF16", 1, lambda x: gram_form(x, (2,) * 5, bfloat16)),
    ]
    for segments in (ONES, (2,) * 5, SEGMENTS, (2, 3, 3, 2), (4, 3, 3), HALVES):
        found.append(Arm("split", segments, "FP16", 1, partial(split_gram_form, segments=segments)))
    found.append(Arm("split", SEGMENTS, "TF32", 1, partial(split_gram_form, narrow=tf32)))
    found.append(Arm("split", SEGMENTS, "BF16", 1, partial(split_gram_form, narrow=bfloat16)))
    found.append(Arm("split", SEGMENTS, "FP16", 3, partial(split_gram_form, terms=3, narrow=float16)))
    return found


def inputs(n: int, m: int) -> dict[str, Tensor]:
    hard = {name: with_spectrum(spectrum, n, m) for name, spectrum in hard_spectra(n).items()}
    return {name: x.float() for name, x in ({"normal": random(n, m, dtype=torch.float64)} | hard).items()}


def measure() -> list[dict[str, object]]:
    rows = []
    for n, m in SIZES:
        matrices = inputs(n, m)
        exact = {name: newton_schulz_reference(x.double()) for name, x in matrices.items()}
        for arm in arms():
            errors = {
                name: float(torch.linalg.matrix_norm(arm.run(x) - exact[name]) / torch.linalg.matrix_norm(exact[name]))
                for name, x in matrices.items()
            }
            times = {"expert ms": arm.milliseconds(*EXPERT), "q_b ms": arm.milliseconds(*Q_B)}
            chosen = arm.form == "split" and arm.segments == SEGMENTS and arm.format == "FP16"
            rows.append({"size": [n, m], **arm._asdict(), "chosen": chosen, "errors": errors, **times})
            del rows[-1]["run"]
    return rows


def segments_of(row: Mapping[str, object]) -> str:
    segments = row["segments"]
    assert isinstance(segments, tuple)
    return f"{len(segments)} of {segments[0]}" if len(set(segments)) == 1 else ", ".join(map(str, segments))


def page(rows: list[dict[str, object]]) -> str:
    lines = [
        "# Newton-Schulz: what its products need",
        "",
        "Written by `python tests/newton_schulz_errors.py`, on a CPU, with a GPU's roundings in torch. Frobenius",
        "error of the result of ten iterations against float64, relative to the norm of the result. *standard* is the",
        "paper's form, *Gram* multiplies polynomials of X X^T, *split* does so without ever multiplying the identity",
        "(`kernels/newton_schulz.py`). Segments: iterations from one X X^T to the next; of more than three, FP16 does",
        "not hold K. FP16 x 3: both halves of a pair of FP16, by three products. Times: floors of one matrix on an",
        "H100 (FP16 and BF16 800, TF32 350, FP32 60 TFLOP/s), with half of symmetric products. In bold what runs on a",
        "GPU: three products below 128 rows, else one.",
    ]
    for n, m in SIZES:
        chosen = [row for row in rows if row["size"] == [n, m]]
        errors = chosen[0]["errors"]
        assert isinstance(errors, dict)
        lines += [
            "",
            f"## {n} x {m}",
            "",
            f"| form | segments | multiplied | {' | '.join(errors)} | expert, ms | q_b, ms |",
            "|---" * (len(errors) + 5) + "|",
        ]
        for row in chosen:
            values = row["errors"]
            assert isinstance(values, dict)
            shown = [f"{error:.0e}" if error < 1e3 else "inf" for error in values.values()]
            shown = [cell if error == error else "NaN" for cell, error in zip(shown, values.values(), strict=True)]
            cells = [
                str(row["form"]),
                segments_of(row),
                f"{row['format']}{' x 3' if row['terms'] == 3 else ''}",
                *shown,
                f"{row['expert ms']:.2f}",
                f"{row['q_b ms']:.2f}",
            ]
            lines.append("| " + " | ".join(f"**{cell}**" if row["chosen"] else cell for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    found = measure()
    (RESULTS / "newton_schulz.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "newton_schulz.md").write_text(page(found))
