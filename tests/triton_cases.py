"""What the tests of Triton kernels share: forcing an implementation, poisoned outputs, comparison of every gradient.

On a machine without a GPU the kernels run through Triton's interpreter (conftest.py asks for it), on one with a GPU
natively: DEVICE is where test tensors belong.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from openv4.kernels.dispatch import using

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, fresh memory holds NaN, or an absurd integer, so that a tile that no kernel writes shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return tensor.fill_(torch.nan)
        return tensor if tensor.dtype.is_floating_point else tensor.fill_(111)

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
        mock.patch.object(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k))),
    ):
        yield


def outputs_and_gradients(
    operation: Callable[..., Any], inputs: Mapping[str, Any], upstream: int = 0
) -> dict[str, Tensor]:
    """The float outputs of ``operation(**inputs)`` as "out 0", ..., and the gradient of each float input by its name,
    under random gradients of the outputs that ``upstream`` seeds. Integer outputs come as they are."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    results = operation(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    found = {f"out {i}": r.detach() for i, r in enumerate(results) if isinstance(r, Tensor)}
    generator = torch.Generator().manual_seed(upstream)
    moved = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
    # Numbers that bfloat16 holds, so that every dtype gets the same.
    slopes = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in moved]
    if moved:
        torch.autograd.backward(moved, slopes)
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor) and leaf.grad is not None:
            found[f"gradient of {name}"] = leaf.grad
    return found


def run_as(implementation: str, operation: Callable[..., Any], inputs: Mapping[str, Any], upstream: int = 0) -> Any:
    """``outputs_and_gradients`` with that implementation, fresh memory poisoned."""
    with using(implementation), poisoned():  # type: ignore[arg-type]
        return outputs_and_gradients(operation, inputs, upstream)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root of the mean squared difference over that of what is wanted; NaN if anything is NaN."""
    difference = (found.double() - wanted.double()).square().mean().sqrt()
    return float(difference / wanted.double().square().mean().sqrt().clamp(min=1e-30))


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Every named tensor, by relative RMS error; integers bit for bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        if value.is_floating_point():
            error = relative_error(found[name], value)
            assert error <= tolerance, f"{name}: relative error {error:.2e}"
        else:
            assert torch.equal(found[name], value), name


def assert_same_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
