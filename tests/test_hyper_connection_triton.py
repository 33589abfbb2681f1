"""mHC in Triton against torch in float64: outputs and every gradient, through the interpreter or on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, assert_close, assert_same_bits, outputs_and_gradients, run_as

from openv4.kernels.dispatch import using
from openv4.kernels.hyper_connection import Mixing, mhc_head, mhc_post, mhc_post_pre, mhc_pre

pytestmark = pytest.mark.usefixtures("one_thread")

ITERATIONS = 20
# float32: sums of some hundred terms, each off by 6e-8, through twenty contracting iterations; a gate's gradient sums
# terms of both signs over all tokens, which may leave a tenth of their size. bfloat16: streams, and gradients of
# streams, are rounded once, to 2^-9; the pair rounds the new streams and all that follows from them.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3}
PAIR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# [B, T, S, D]; of the last rows are longer than a block of columns, and there are several parts of them.
SHAPES = [(1, 1, 4, 40), (2, 9, 4, 64), (1, 5, 2, 33), (1, 17, 3, 130), (1, 6, 5, 24), (1, 3, 4, 700), (1, 70, 4, 16)]


def pre(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    x, mixing = mhc_pre(streams, fn, base, scale, ITERATIONS, 1e-6, 1e-6)
    return x, *mixing


def head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> Tensor:
    count = streams.shape[2]
    return mhc_head(streams, fn[:count], base[:count], scale[:1], 1e-6, 1e-6)


def post(streams: Tensor, output: Tensor, post: Tensor, residual: Tensor) -> Tensor:
    return mhc_post(streams, output, Mixing(post, residual))


def post_pre(
    streams: Tensor, output: Tensor, post: Tensor, residual: Tensor, fn: Tensor, base: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    new, x, mixing = mhc_post_pre(streams, output, Mixing(post, residual), fn, base, scale, ITERATIONS, 1e-6, 1e-6)
    return new, x, *mixing


OPERATIONS: list[Callable[..., Any]] = [pre, head, post, post_pre]


def draw(operation: Callable[..., Any], shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    batch, length, streams, hidden = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    rows = streams * (streams + 2)
    drawn = {
        "streams": normal(*shape).to(dtype),
        "output": normal(batch, length, hidden).to(dtype),
        "post": normal(batch, length, streams).exp(),
        "residual": normal(batch, length, streams, streams).softmax(-1),
        "fn": normal(rows, streams * hidden) * (streams * hidden) ** -0.5,
        "base": normal(rows) / 2,
        "scale": normal(3),
    }
    names = operation.__code__.co_varnames[: operation.__code__.co_argcount]
    return {name: drawn[name].to(DEVICE) for name in names}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_outputs_and_gradients(
    operation: Callable[..., Any], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = draw(operation, shape, dtype)
    found = run_as("triton", operation, inputs)
    with using("torch"):
        wanted = outputs_and_gradients(operation, {name: x.double() for name, x in inputs.items()})
    assert all(found[name].dtype == inputs[name.removeprefix("gradient of ")].dtype for name in found if "of" in name)
    tolerance = (PAIR if operation is post_pre else TOLERANCE)[dtype]
    same = {name: value.to(found[name].dtype) if dtype == torch.float32 else value for name, value in wanted.items()}
    for name, value in same.items():
        # One number, or a few: no mean over many to even out how far their terms cancel.
        few = value.numel() <= 3
        assert_close({name: found[name].double()}, {name: value.double()}, tolerance * (5 if few else 1))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_runs_are_equal_to_the_bit(operation: Callable[..., Any]) -> None:
    inputs = draw(operation, (2, 33, 4, 48), torch.bfloat16)
    assert_same_bits(run_as("triton", operation, inputs), run_as("triton", operation, inputs))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_tokens(operation: Callable[..., Any]) -> None:
    found = run_as("triton", operation, draw(operation, (1, 0, 4, 32), torch.float32))
    for name in ("gradient of fn", "gradient of base", "gradient of scale"):
        assert name not in found or bool((found[name] == 0).all())


def test_the_pair_is_its_parts() -> None:
    """In torch bit for bit, which is what a model on a CPU computes."""
    inputs = draw(post_pre, (2, 7, 4, 24), torch.float32)
    with using("torch"):
        new, x, *mixing = post_pre(**inputs)
        parts = post(*(inputs[name] for name in ("streams", "output", "post", "residual")))
        after = pre(parts, *(inputs[name] for name in ("fn", "base", "scale")))
    assert all(torch.equal(a, b) for a, b in zip((new, x, *mixing), (parts, *after), strict=True))


def test_unconstrained_and_many_streams_run_in_torch() -> None:
    """Not refused: equal to torch to the bit."""
    inputs = draw(pre, (1, 5, 9, 16), torch.float32)
    assert_same_bits(run_as("triton", pre, inputs), run_as("torch", pre, inputs))
    free = draw(pre, (1, 5, 4, 16), torch.float32)

    def unconstrained(**arguments: Tensor) -> tuple[Tensor, ...]:
        x, mixing = mhc_pre(*arguments.values(), ITERATIONS, 1e-6, 1e-6, "none")
        return x, *mixing

    assert_same_bits(run_as("triton", unconstrained, free), run_as("torch", unconstrained, free))
