"""Which implementation of an operation runs, and what every Triton kernel imports.

    auto        Triton where the tensors lie on a CUDA device and triton is installed, else torch
    reference   the plain form, written for reading, where an operation has one; else torch
    torch       the fast form in torch operations
    triton      Triton; on a CPU through its interpreter (TRITON_INTERPRET=1 set before the start), which is for tests

The environment's OPENV4_KERNELS chooses for a whole process, ``using`` for a part of it. float64 always runs in torch:
it is for checks.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Choice = Literal["auto", "reference", "torch", "triton"]
Implementation = Literal["reference", "torch", "triton"]

triton: Any = None
tl: Any = None
with suppress(ImportError):  # a CPU build of torch comes without it, and only GPUs and tests need it
    triton, tl = import_module("triton"), import_module("triton.language")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

_choice: Choice | None = None  # what `using` set


def jit(kernel: Callable[..., Any]) -> Any:
    """``triton.jit``; without triton the function as it is, which then nobody calls."""
    return kernel if triton is None else triton.jit(kernel)


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Within, operations run as ``choice`` says; what they do backward is decided when they run forward."""
    global _choice
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def implementation(*tensors: Tensor) -> Implementation:
    """What an operation on these tensors runs as.

    Raises:
        ValueError: OPENV4_KERNELS names no implementation, or asks for Triton where it cannot run.
    """
    choice = _choice or os.environ.get("OPENV4_KERNELS") or "auto"
    if choice not in get_args(Choice):
        raise ValueError(f"OPENV4_KERNELS={choice}: choose one of {', '.join(get_args(Choice))}")
    if choice in ("reference", "torch"):
        return cast(Implementation, choice)
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "torch"
    on_device = all(tensor.is_cuda for tensor in tensors)
    if choice == "auto":
        return "triton" if on_device and triton is not None else "torch"
    if triton is None:
        raise ValueError("OPENV4_KERNELS=triton, but triton is not installed; pip install triton, or choose auto")
    if not on_device and not INTERPRETED:
        raise ValueError(
            f"OPENV4_KERNELS=triton on {tensors[0].device.type}: set TRITON_INTERPRET=1 to interpret kernels, which "
            "is slow, or choose auto"
        )
    return "triton"
