"""The compressors' Triton kernels against the plain form: outputs and every gradient, documents in every position."""

from typing import Any

import pytest
import torch
from compressor_cases import PACKINGS, draw, existing
from torch import Tensor
from triton_cases import DEVICE, assert_same_bits, relative_error, run_as

from openv4.kernels import compressor
from openv4.kernels.compressor import compress, compress_entries
from openv4.kernels.decode import continue_blocks, continue_documents
from openv4.kernels.dispatch import using
from openv4.model.cache import pending

pytestmark = pytest.mark.usefixtures("one_thread")

# Against the plain form in float64 on the same numbers. In float32, exponentials and sums of some hundred terms, each
# off by a few roundings of 6e-8. In bfloat16 results are rounded once, by at most 2^-9 of themselves, and so are the
# gradients that come in.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2 * 2**-9}
OF_COMPRESS = ("kv", "gate", "position_bias", "blocks", "overlap")


def pooled(**arguments: Any) -> Tensor:
    """The entries that exist; of the others, zeros."""
    arguments = {name: arguments[name] for name in OF_COMPRESS}
    return compress(**arguments) * existing(arguments["blocks"])


def entries(**arguments: Any) -> Tensor:
    return compress_entries(**arguments) * existing(arguments["blocks"])[:, arguments.get("skip", 0) :]


def move(value: Any) -> Any:
    """Tensors, and those in a tuple, on the device of the tests."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if not isinstance(value, tuple):
        return value
    parts = map(move, value)
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def check(operation: Any, arguments: dict[str, Any], implementation: str = "triton") -> dict[str, Tensor]:
    """Against the reference; the results."""
    arguments = {name: move(value) for name, value in arguments.items()}
    found: dict[str, Tensor] = run_as(implementation, operation, arguments)
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    wanted = run_as("reference", operation, exact)
    for name, value in wanted.items():
        if "of" in name:
            assert found[name].dtype == arguments[name.removeprefix("gradient of ")].dtype, name
        assert found[name].shape == value.shape, name
        if value.numel():
            error = relative_error(found[name], value)
            assert error <= TOLERANCE[arguments["kv"].dtype], f"{name}: {error:.2e}"
    assert "gradient of kv" in found
    return found


@pytest.mark.parametrize(("ratio", "overlap", "dtype"), [(4, True, torch.float32), (3, False, torch.bfloat16)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_compress_equals_the_plain_form(packing: str, ratio: int, overlap: bool, dtype: torch.dtype) -> None:
    """Tokens of no block, and what nobody takes of a block, get a gradient of zero: memory was poisoned before."""
    arguments = draw(PACKINGS[packing], ratio, 7, overlap, dtype)
    found = check(pooled, arguments)
    assert found["out 0"].dtype == torch.float32  # the position bias is


@pytest.mark.parametrize(("ratio", "overlap", "dtype"), [(3, True, torch.float32), (4, True, torch.bfloat16)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_entries_equal_the_plain_form(packing: str, ratio: int, overlap: bool, dtype: torch.dtype) -> None:
    channels = 9 if packing == "short" else 8  # an odd number shifts the tiles
    found = check(entries, draw(PACKINGS[packing], ratio, channels, overlap, dtype))
    assert found["out 0"].dtype == dtype


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(("lengths", "ratio", "overlap"), [([150], 128, False), ([11, 13], 5, True)])
def test_long_blocks(
    lengths: list[int], ratio: int, overlap: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More slots times channels than a program holds: channels in parts, norm and rotation on their own."""
    monkeypatch.setattr(compressor, "HELD", 128)
    arguments = draw(lengths, ratio, 20, overlap, torch.float32, pairs=4)
    check(pooled, arguments, implementation)
    check(entries, arguments, implementation)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("held", [32, 4096])
def test_skipped_entries(implementation: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressor, "HELD", held)
    arguments = draw([9, 6], 4, 8, True, torch.float32)
    arguments["table"] = tuple(part[:, 1:] for part in arguments["table"])
    check(entries, arguments | {"skip": 1}, implementation)


@pytest.mark.parametrize(("past", "overlap"), [(0, True), (3, True), (6, True), (8, True), (10, False)])
def test_documents_that_go_on(past: int, overlap: bool) -> None:
    """As the model does with a cache: tokens before the row are carried, a block of theirs is pooled again."""
    ratio, new = 4, 7
    documents = continue_documents(torch.zeros(2, new), past)
    carried, again = pending(past, ratio, overlap)
    blocks, fresh = continue_blocks(documents, past, ratio), slice(past // ratio - again, None)
    blocks = blocks._replace(start=blocks.start[:, fresh] + carried, chained=blocks.chained[:, fresh])
    arguments = draw([carried + new], ratio, 8, overlap, torch.float32) | {"blocks": blocks, "skip": again}
    count = blocks.start.shape[1] - again
    for name in ("kv", "gate"):
        arguments[name] = arguments[name][:2]
    arguments["table"] = tuple(part[:2, :1].expand(-1, count, -1) for part in arguments["table"])
    check(compress_entries, arguments)


@pytest.mark.parametrize(("channels", "overlap"), [(8, True), (20, False)])
def test_two_runs_are_equal(channels: int, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs with several entries each, whatever runs first."""
    slots = 8 if overlap else 4
    monkeypatch.setattr(compressor, "PARTS", 2 * slots * (8 if overlap else 32))
    arguments = draw([13, 7, 5], 4, channels, overlap, torch.float32)
    found = check(entries, arguments)
    again = run_as("triton", entries, {name: move(value) for name, value in arguments.items()})
    assert_same_bits(found, again)


def test_missing_entries_are_finite_and_pass_no_gradient_on() -> None:
    arguments = {name: move(value) for name, value in draw([6, -10], 4, 8, True, torch.float32).items()}
    kv = arguments["kv"].requires_grad_()
    with using("triton"):
        result = compress_entries(**arguments)
    assert result.isfinite().all()
    (result * ~existing(arguments["blocks"])).sum().backward()
    assert kv.grad is not None and not kv.grad.any()
