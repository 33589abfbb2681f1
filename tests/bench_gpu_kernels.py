"""The benchmarks of single operations on a GPU (D1 to D4, D8 to D10), at the dims of V4-Flash: what `make gpu` times.

Ours is the Triton path; "torch" is the same operation in our own torch path, "compiled" a plain version through
torch.compile(mode="max-autotune-no-cudagraphs").
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_floors as floors
import torch
import torch.nn.functional as F
from gpu_passes import TOLERANCE, Draw, Numbers, Passes, compiled, directions, extra_mb, operation, share_of_floor
from gpu_protocol import Benchmark, Case, Place, Target, Timer, agreement, relative_rms
from torch import Tensor

from openv4.kernels.dispatch import Choice, using

EPS = 1e-6


# Hyper-connections (D1 to D3).


def site(draw: Draw, tokens: int, hidden: int, streams: int = 4) -> dict[str, Tensor]:
    rows = streams * (streams + 2)
    return {
        "streams": draw.normal(1, tokens, streams, hidden),
        "output": draw.normal(1, tokens, hidden),
        "post": draw.float32(1, tokens, streams).exp_(),
        "residual": draw.float32(1, tokens, streams, streams).softmax(-1),
        "fn": draw.float32(rows, streams * hidden, scale=(streams * hidden) ** -0.5),
        "base": draw.float32(rows),
        "scale": draw.float32(3),
    }


def plain_post_pre(
    streams: Tensor, output: Tensor, post: Tensor, residual: Tensor, fn: Tensor, base: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """As the formulas stand, for torch.compile (recipe 4)."""
    count = streams.shape[2]
    mixed = torch.einsum("btjk,btjd->btkd", residual, streams.float())
    new = (mixed + post.unsqueeze(-1) * output.float().unsqueeze(2)).to(streams.dtype)
    wide = new.float().flatten(2)
    logits = F.linear(wide, fn) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    gates = logits * scale.repeat_interleave(torch.tensor([count, count, count**2], device=scale.device)) + base
    pre = torch.sigmoid(gates[..., :count]) + EPS
    matrix = gates[..., 2 * count :].unflatten(-1, (count, count)).softmax(-1) + EPS
    matrix = matrix / (matrix.sum(-2, keepdim=True) + EPS)
    for _ in range(19):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + EPS)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + EPS)
    x = (pre.unsqueeze(-1) * new.float()).sum(2).to(streams.dtype)
    return new, x, 2 * torch.sigmoid(gates[..., count : 2 * count]), matrix


def mhc_post_pre(place: Place, tokens: int, backward: bool, hidden: int = 4096) -> Case:
    fused, mixing = (operation("kernels.hyper_connection", name) for name in ("mhc_post_pre", "Mixing"))

    def ours(streams: Tensor, output: Tensor, post: Tensor, residual: Tensor, **projection: Tensor) -> Any:
        return fused(streams, output, mixing(post, residual), **projection, iterations=20, eps=EPS, norm_eps=EPS)

    inputs = site(Draw(place), tokens, hidden)
    floor = (floors.mhc_post_pre_backward if backward else floors.mhc_post_pre)(tokens, hidden)
    return Passes(ours, inputs, list(inputs)).case(place, backward, floor, {"compiled": compiled(plain_post_pre)})


def sinkhorn_inside(place: Place, tokens: int, hidden: int = 4096) -> Case:
    """What 19 of Sinkhorn's 20 iterations add to the kernel that they are part of."""
    pre = operation("kernels.hyper_connection", "mhc_pre")
    inputs = {name: x for name, x in site(Draw(place), tokens, hidden).items() if name in ("streams", "fn", "base")}
    inputs["scale"] = torch.ones(3, device=place.device)
    many, one = (Passes(partial(pre, iterations=n, eps=EPS, norm_eps=EPS), inputs) for n in (20, 1))

    def values(timer: Timer) -> Numbers:
        times = [timer(partial(passes.forward, place.ours)) for passes in (many, one)]
        return {"marginal us": (times[0] - times[1]) * 1e6}

    return many.case(place, False, floors.mhc_pre(tokens, hidden), values=values)


# Roundings (D4).


def rms_norm_fp8(place: Place, tokens: int, hidden: int = 4096) -> Case:
    draw = Draw(place)
    inputs = {"x": draw.normal(tokens, hidden), "weight": draw.float32(hidden), "eps": EPS}
    passes = Passes(operation("kernels.norm", "rms_norm_fp8"), inputs)  # the normed rows are written as well
    case = passes.case(place, False, floors.fp8_rows(tokens, hidden, wide=2))
    case.check = partial(rounded_rows_agree, place, passes)
    return case


def rounded_rows_agree(place: Place, passes: Passes) -> str:
    """Of rows and what they are in FP8: the rows within rounding, the codes bit for bit what torch makes of them."""
    rows, codes, scale = passes.forward(place.ours)
    wanted, _, _ = passes.forward("torch")
    told = agreement({"rows": rows}, {"rows": wanted}, TOLERANCE, "torch")
    with using("torch"):
        values = operation("kernels.fp8", "round_rows")(rows)
    found = (codes.float().unflatten(-1, (-1, 128)) * scale.float().unsqueeze(-1)).flatten(-2).to(rows.dtype)
    return f"rows {told}, codes {agreement({'codes': found}, {'codes': values}, 0, 'torch')}"


def swiglu_fp8(place: Place, rows: int, inner: int = 2048) -> Case:
    draw = Draw(place)
    inputs = {"gate": draw.normal(rows, inner, scale=4), "up": draw.normal(rows, inner, scale=4), "limit": 10.0}
    passes = Passes(operation("kernels.fp8", "swiglu_fp8"), inputs)
    return passes.case(place, False, floors.fp8_rows(rows, inner, wide=2), tolerance=0.0)


def fp4_weight(place: Place, matrices: int, rows: int = 2048, columns: int = 4096) -> Case:
    """Fake quantisation: float32 masters to what FP4 holds of them, in bf16 for the product."""
    weight = Draw(place).float32(matrices, rows, columns, scale=0.02)
    inputs = {"weight": weight, "dtype": torch.bfloat16}
    passes = Passes(operation("kernels.fp4", "fp4_weight"), inputs)
    return passes.case(place, False, floors.fp4_weight(matrices, rows, columns, floors.BF16), tolerance=0.0)


# Experts (D8).


def choose(draw: Draw, tokens: int, experts: int, k: int, zipf: bool) -> Tensor:
    """``[tokens, k]`` distinct experts, with equal odds, or with odds 1, 1/2, 1/3, ..."""
    odds = torch.ones(experts, device=draw.device)
    odds = 1 / odds.cumsum(0) if zipf else odds
    return torch.multinomial(odds.expand(tokens, -1), k, generator=draw.generator)


def experts(
    place: Place, tokens: int, zipf: bool, backward: bool, count: int = 32, hidden: int = 4096, inner: int = 2048
) -> Case:
    moe, draw, active = operation("kernels.moe", "routed_experts"), Draw(place), 6
    inputs = {
        "x": draw.normal(tokens, hidden),
        "ids": choose(draw, tokens, count, active, zipf),
        "weights": draw.float32(tokens, active).softmax(-1),
        "w1": draw.normal(count, inner, hidden, scale=hidden**-0.5),
        "w3": draw.normal(count, inner, hidden, scale=hidden**-0.5),
        "w2": draw.normal(count, hidden, inner, scale=inner**-0.5),
        "limit": 10.0,
    }

    def output(**arguments: Any) -> Tensor:
        result: Tensor = moe(**arguments)[0]
        return result

    passes = Passes(output, inputs, ("x", "weights", "w1", "w3", "w2"))

    def values(_: Timer) -> Numbers:
        if place.device.type != "cuda":
            return {}
        before = torch.cuda.memory_allocated()
        kept = passes.forward(place.ours)
        saved = (torch.cuda.memory_allocated() - before) / 1e6
        del kept
        return {"kept for backward MB": saved}

    floor = floors.experts(tokens, count, active, backward, hidden, inner)
    return passes.case(place, backward, floor, values=values)


def router(place: Place, tokens: int, hidden: int = 4096, count: int = 256) -> Case:
    score, best = (operation("kernels.router", name) for name in ("router_scores", "top_experts"))
    draw = Draw(place)
    inputs = {"x": draw.normal(tokens, hidden), "weight": draw.float32(count, hidden, scale=hidden**-0.5)}

    def scores(**arguments: Any) -> Tensor:
        result: Tensor = score(**arguments)
        return result

    def both(**arguments: Any) -> tuple[Tensor, Tensor]:
        found = score(**arguments)
        return found, best(found, 6)

    case = Passes(both, inputs).case(place, False, floors.router(tokens, count, hidden))
    # Scores equal up to rounding may trade places, so that only the scores are compared.
    case.check = lambda: Passes(scores, inputs).agree(place, False)
    return case


# Muon (D9).


def newton_schulz(place: Place, matrices: int, rows: int, columns: int) -> Case:
    ours, exact = (operation("kernels.newton_schulz", n) for n in ("newton_schulz", "newton_schulz_reference"))
    draw = Draw(place)
    gradient = draw.float32(matrices, rows, columns)
    passes = Passes(ours, {"matrices": gradient})

    def conditioned(n: int, m: int, condition: float) -> Tensor:
        left = torch.linalg.qr(draw.float32(n, n).double())[0]
        right = torch.linalg.qr(draw.float32(m, n).double())[0]
        fall = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64, device=place.device)
        return ((left * fall) @ right.mT).float()

    def check() -> str:
        n, m = sorted((rows, columns))
        (found,) = passes.forward(place.ours)
        wide = found[0] if rows <= columns else found[0].mT
        off = relative_rms(wide.float() @ wide.float().mT, torch.eye(n, device=place.device))
        assert off < 0.05, f"O O^T is off the unit matrix by {off:.1e}"
        small = conditioned(min(n, 512), min(m, 1024), 1e4).unsqueeze(0)
        with using(place.ours):
            error = relative_rms(ours(small).double(), exact(small.double()))
            hard = ours(conditioned(n, m, 1e6).unsqueeze(0))
        assert error < 0.05, f"off by {error:.1e} from float64 at condition 1e4"
        assert hard.isfinite().all(), "not finite at condition 1e6"
        return f"{error:.0e} from float64 at condition 1e4, finite at 1e6"

    def torchs() -> None:
        from torch.optim._muon import _zeropower_via_newtonschulz

        for matrix in gradient:
            _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 10, 1e-7)

    case = passes.case(place, False, floors.newton_schulz(matrices, rows, columns))
    case.check, case.peers = check, {**case.peers, "torch.optim.Muon": torchs}
    return case


# The output head (D10).


def cross_entropy(place: Place, tokens: int, weight: torch.dtype, vocabulary: int = 129280, hidden: int = 4096) -> Case:
    loss, draw = operation("kernels.cross_entropy", "linear_cross_entropy"), Draw(place)
    inputs = {
        "hidden": draw.normal(tokens, hidden),
        "weight": draw.normal(vocabulary, hidden, scale=hidden**-0.5, dtype=weight),
        "targets": draw.integers(vocabulary, tokens),
    }
    passes = Passes(loss, inputs, ("hidden", "weight"))

    def both(passes: Passes, choice: Choice) -> Callable[[], object]:
        return lambda: passes.gradients(passes.forward(choice))

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), targets, reduction="sum")

    arms = {"all logits": plain, "torch chunked": _torch_chunked}
    peers = {"torch": both(passes, "torch")}
    peers |= {name: both(Passes(arm, inputs, passes.learned), "torch") for name, arm in arms.items()}

    def values(_: Timer) -> Numbers:
        gradients = sum(inputs[name].nbytes for name in passes.learned) / 1e6
        return {"extra MB": extra_mb(place, both(passes, place.ours)) - gradients}

    floor = floors.cross_entropy(tokens, vocabulary, hidden)
    return Case(lambda: passes.agree(place, True), both(passes, place.ours), peers, floor, values)


def _torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    result: Tensor = F.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="sum", options=options)
    return result


def _all() -> list[Benchmark]:
    found: list[Benchmark] = []
    mhc = ("TileKernels", "Liger")
    for backward, name, least, at_4k, over in (
        (False, "D1 mHC post + next pre, forward", 0.85, 0.132, Target("over Liger", 1.4)),
        (True, "D2 mHC post + next pre, backward", 0.75, 0.225, Target("over TileKernels", 3)),
    ):
        for tokens in (4096, 16384):
            targets = share_of_floor(least, *([Target("ms", at_4k, False)] if tokens == 4096 else []), over)
            build = partial(mhc_post_pre, tokens=tokens, backward=backward)
            found.append(Benchmark(name, f"T {tokens}", "mhc", build, targets, mhc))
    found.append(
        Benchmark(
            "D3 Sinkhorn inside mHC pre, forward",
            "T 4096",
            "mhc",
            partial(sinkhorn_inside, tokens=4096),
            (Target("marginal us", 3, False),),
        )
    )
    rounding: tuple[tuple[str, str, Callable[..., Case]], ...] = (
        ("D4 RMSNorm + FP8", "T 16384, D 4096", partial(rms_norm_fp8, tokens=16384)),
        ("D4 clamped SwiGLU + FP8", "24576 rows, F 2048", partial(swiglu_fp8, rows=24576)),
        ("D4 FP4 fake quantisation", "32 of 2048 x 4096", partial(fp4_weight, matrices=32)),
    )
    for name, size, build in rounding:
        found.append(Benchmark(name, size, "rounding", build, share_of_floor(0.88), ("TileKernels", "torchao")))
    for tokens in (4096, 16384):
        for zipf in (False, True):
            moe = partial(experts, tokens=tokens, zipf=zipf)
            size = f"T {tokens}, 32 experts, {'Zipf' if zipf else 'uniform'}"
            least = (0.65, 0.65) if zipf else (0.75, 0.75)
            found += directions("D8 routed experts, bf16", size, "moe", moe, least, ("SonicMoE", "megablocks"))
    found.append(Benchmark("D8 router + top-6", "T 4096, 256 experts", "moe", partial(router, tokens=4096)))
    for matrices, rows, columns, more in (
        (32, 2048, 4096, ()),
        (1, 1024, 32768, (Target("over torch.optim.Muon", 4),)),
    ):
        build = partial(newton_schulz, matrices=matrices, rows=rows, columns=columns)
        size = f"{matrices} of {rows} x {columns}"
        found.append(
            Benchmark("D9 Newton-Schulz, 10 steps", size, "muon", build, share_of_floor(0.8, *more), ("quack",))
        )
    for tokens in (4096, 16384):
        build = partial(cross_entropy, tokens=tokens, weight=torch.bfloat16)
        targets = share_of_floor(0.85, Target("extra MB", 256, False))
        found.append(
            Benchmark(
                "D10 head + cross-entropy, both ways", f"T {tokens}, V 129280", "head", build, targets, ("Liger", "CCE")
            )
        )
    build = partial(cross_entropy, tokens=4096, weight=torch.float32)
    found.append(Benchmark("D10 the same, float32 head as in training", "T 4096, V 129280", "head", build))
    return found


BENCHMARKS = _all()
