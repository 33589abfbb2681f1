"""What the benchmarks of single parts compare: functions of the same tensors, and the float64 judge of Muon."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from bench_protocol import OURS, PEER, gate, peak_mb_of, relative_error, resident_mb
from torch import Tensor, nn
from torch.nn import Parameter

from openv4.optim.muon import NEWTON_SCHULZ_COEFFICIENTS, Muon

COMPILED, TORCH, CHUNKED, PLAIN = "torch.compile", "torch", "torch chunked", "plain float32"
# One forward and backward pass: the output, and the gradients in the same order on both sides.
Pass = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]
JORDAN_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 10  # torch.optim.Muon takes one triple for all its steps
MUON_SHAPES = ((48, 128, 256), (256, 4096), (256, 4096), (512, 2048), (512, 2048))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def passes(forward: Callable[[], Tensor], leaves: Sequence[Tensor], cotangent: Tensor) -> Pass:
    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        output = forward()
        return output.detach(), torch.autograd.grad(output, leaves, cotangent)

    return run


def compare(ours: Pass, theirs: Pass) -> dict[str, float]:
    """The correctness gate of a block; also the first, untimed run of both."""
    (output, gradients), (expected, expected_gradients) = ours(), theirs()
    return gate((output, expected), zip(gradients, expected_gradients, strict=True))


def hyper_connection_passes(tokens: int, hidden: int) -> dict[str, Pass]:
    """One mHC site around a sublayer that returns its input."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    from openv4.kernels.hyper_connection import mhc_post, mhc_pre

    config = DeepseekV4Config(hidden_size=hidden)
    site = DeepseekV4HyperConnection(config)
    for seed, (parameter, scale) in enumerate(((site.fn, 0.02), (site.base, 0.5), (site.scale, 0.5))):
        parameter.data = randn(*parameter.shape, seed=seed) * scale
    streams = randn(1, tokens, config.hc_mult, hidden, seed=3).requires_grad_()

    def ours() -> Tensor:
        numbers = (config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)
        x, mixing = mhc_pre(streams, site.fn, site.base, site.scale, *numbers)
        result: Tensor = mhc_post(streams, x, mixing)
        return result

    def theirs() -> Tensor:
        post, residual, x = site(streams)  # then as in DeepseekV4DecoderLayer
        result: Tensor = post[..., None] * x[..., None, :] + torch.matmul(residual.transpose(-1, -2), streams)
        return result

    forwards = {OURS: ours, PEER: theirs, COMPILED: torch.compile(theirs, dynamic=False)}
    leaves = [streams, site.fn, site.base, site.scale]
    return {name: passes(forward, leaves, randn(*streams.shape, seed=4)) for name, forward in forwards.items()}


def choose_experts(tokens: int, experts: int, count: int, zipf: bool) -> Tensor:
    """``[tokens, count]`` distinct experts of each token, drawn with equal odds, or with odds 1, 1/2, 1/3, ..."""
    odds = 1 / torch.arange(1.0, experts + 1) if zipf else torch.ones(experts)
    return torch.multinomial(odds.expand(tokens, -1), count, generator=torch.Generator().manual_seed(0))


def expert_passes(ids: Tensor, experts: int, hidden: int, inner: int) -> dict[str, Pass]:
    """The routed experts; gradients of tokens, routing weights, down, gate, up."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    from openv4.kernels.moe import routed_experts

    config = DeepseekV4Config(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        n_routed_experts=experts,
        num_experts_per_tok=ids.shape[1],
        experts_implementation="grouped_mm",
    )
    module = DeepseekV4Experts(config)
    module.gate_up_proj.data = randn(experts, 2 * inner, hidden, seed=1) * hidden**-0.5
    module.down_proj.data = randn(experts, hidden, inner, seed=2) * inner**-0.5
    # Ours holds gate and up apart: the same numbers in its own layout.
    gate_up, down = module.gate_up_proj, module.down_proj
    w1, w3 = (Parameter(w.contiguous()) for w in gate_up.detach().chunk(2, 1))
    x = randn(len(ids), hidden, seed=3).requires_grad_()
    weights = randn(*ids.shape, seed=4).softmax(-1).requires_grad_()
    cotangent = randn(len(ids), hidden, seed=5)

    def ours() -> Tensor:
        return routed_experts(x, ids, weights, w1, w3, down, config.swiglu_limit)[0]

    theirs = passes(lambda: module(x, ids, weights), [x, weights, down, gate_up], cotangent)

    def theirs_split() -> tuple[Tensor, tuple[Tensor, ...]]:
        output, (*gradients, both) = theirs()
        return output, (*gradients, *both.chunk(2, 1))

    return {OURS: passes(ours, [x, weights, down, w1, w3], cotangent), PEER: theirs_split}


def cross_entropy_passes(tokens: int, hidden: int, vocabulary: int) -> dict[str, Pass]:
    """The summed loss of an output head; gradients of the hidden states and of the head."""
    from openv4.kernels.cross_entropy import linear_cross_entropy

    x = randn(tokens, hidden).requires_grad_()
    head = (randn(vocabulary, hidden, seed=1) * hidden**-0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    forwards = {
        OURS: lambda: linear_cross_entropy(x, head, targets),
        TORCH: lambda: F.cross_entropy(F.linear(x, head), targets, reduction="sum"),
        CHUNKED: lambda: F.linear_cross_entropy(
            x, head, targets, reduction="sum", options=nn.LinearCrossEntropyOptions()
        ),
    }
    return {name: passes(forward, [x, head], torch.ones(())) for name, forward in forwards.items()}


def cross_entropy_peak_mb(name: str, tokens: int, hidden: int, vocabulary: int) -> float:
    """Peak memory of one pass above what was resident before it; to be run in a process of its own.

    The gradients that the pass returns count. A pass over a small vocabulary goes first, so that the libraries' own
    buffers do not.
    """
    cross_entropy_passes(64, hidden, 256)[name]()
    run = cross_entropy_passes(tokens, hidden, vocabulary)[name]
    before = resident_mb()
    return peak_mb_of(run) - before


def muon_parameters() -> list[Parameter]:
    """The experts of a layer as one stack, and two pairs of projections, with gradients."""
    parameters = [Parameter(randn(*shape, seed=seed)) for seed, shape in enumerate(MUON_SHAPES)]
    for seed, parameter in enumerate(parameters):
        parameter.grad = randn(*parameter.shape, seed=100 + seed)
    return parameters


def single_matrices(parameters: Sequence[Parameter]) -> list[Parameter]:
    """The same with every expert a parameter of its own, as torch's Muon wants it."""
    matrices = []
    for parameter in parameters:
        assert parameter.grad is not None
        shape = (-1, *parameter.shape[-2:])
        for weight, gradient in zip(parameter.detach().view(shape), parameter.grad.view(shape), strict=True):
            matrices.append(Parameter(weight.clone()))
            matrices[-1].grad = gradient.clone()
    return matrices


def plain_iteration(matrix: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """Newton-Schulz on one matrix, in its dtype, as the formula stands."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm()
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class PlainMuon(torch.optim.Optimizer):
    """Our Muon's rule, one matrix after the other, in float32."""

    def __init__(self, parameters: Sequence[Parameter], lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.95).add_(parameter.grad)
                direction = plain_iteration(parameter.grad + 0.95 * momentum, NEWTON_SCHULZ_COEFFICIENTS)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction, alpha=group["lr"] * 0.18 * math.sqrt(max(parameter.shape)))


MUONS: dict[str, Callable[[list[Parameter], float, float], torch.optim.Optimizer]] = {
    OURS: lambda parameters, lr, decay: Muon(parameters, lr=lr, weight_decay=decay),
    TORCH: lambda parameters, lr, decay: torch.optim.Muon(
        single_matrices(parameters), lr=lr, weight_decay=decay, ns_steps=10
    ),
    PLAIN: lambda parameters, lr, decay: PlainMuon(single_matrices(parameters), lr, decay),
}


def muon_error(name: str, condition: float) -> float:
    """Relative error of one step's direction against the same iteration in float64, the worst of three shapes.

    The gradient's singular values fall evenly, on a logarithmic scale, from 1 to 1 / ``condition``. From zero weights,
    without decay, the step leaves minus the direction times a constant, which is divided out.
    """
    coefficients = JORDAN_COEFFICIENTS if name == TORCH else NEWTON_SCHULZ_COEFFICIENTS
    errors = []
    for rows, columns in sorted({shape[-2:] for shape in MUON_SHAPES}):
        left, _, right = torch.linalg.svd(randn(rows, columns, seed=7).double(), full_matrices=False)
        gradient = ((left * torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64)) @ right).float()
        parameter = Parameter(torch.zeros(rows, columns))
        parameter.grad = gradient
        optimizer = MUONS[name]([parameter], 1.0, 0.0)
        optimizer.step()
        (moved,) = optimizer.param_groups[0]["params"]
        scale = 1.0 if name == TORCH else 0.18 * math.sqrt(columns)
        errors.append(relative_error([(moved.detach() / -scale, plain_iteration(gradient.double(), coefficients))]))
    return max(errors)
