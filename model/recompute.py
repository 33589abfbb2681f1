"""Activation recomputation: what a block keeps for its backward pass, and what it computes again.

    none       keep what autograd asks for
    selective  keep what each block's projections and experts produced; norms, rotations, mixing, attention come again
    full       keep the input of each block alone

The discrete choices (experts of each token, selected entries) are kept in every case: a replay takes the same route
even where its arithmetic is not bit for bit that of the first pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from .config import Recompute

T = TypeVar("T")

# The heavy operations whose results `selective` keeps; attention is not among them, it has its own replay. Nor are
# products of Triton kernels, which are no operations of torch: on a GPU the experts' come again.
KEPT = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default]


class Route:
    """The discrete choices of one block in one forward pass: made once, remembered when it is replayed.

    ``given`` are choices that others have made before: the block follows them.
    """

    def __init__(self, **given: Any) -> None:
        self.given, self._choices = frozenset(given), given

    def recall(self, name: str, choose: Callable[..., T], *arguments: Any) -> T:
        """``choose(*arguments)`` the first time, and the same result ever after."""
        if name not in self._choices:
            self._choices[name] = choose(*arguments)
        choice: T = self._choices[name]
        return choice


def recomputed(mode: Recompute, function: Callable[..., T], *arguments: Any, route: Route | None = None) -> T:
    """``function(*arguments, route)``, whose activations are kept as ``mode`` says; by default on a route of its own.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in get_args(Recompute):
        raise ValueError(f"recompute={mode!r}: choose one of {', '.join(get_args(Recompute))}")
    route = route or Route()
    if mode == "none" or not torch.is_grad_enabled():
        return function(*arguments, route)
    context = partial(create_selective_checkpoint_contexts, KEPT) if mode == "selective" else noop_context_fn
    keep_rng = _is_random(function)  # a replay must drop the same elements
    result: T = checkpoint(
        function, *arguments, route, use_reentrant=False, preserve_rng_state=keep_rng, context_fn=context
    )
    return result


def _is_random(function: Callable[..., Any]) -> bool:
    """Whether a block draws random numbers, which only the dropout of adapters does."""
    modules = function.modules() if isinstance(function, nn.Module) else ()
    return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in modules)
