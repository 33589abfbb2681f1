"""How large numbers get on their way through the blocks, without a change to what computes them.

Spikes of a loss come with outliers in the MoE layers, which grow from layer to layer (recipe 7).
Shapes: B batch, T tokens, S streams, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .transformer import Transformer

# Metrics that are maxima over all tokens, of one block where its name follows; all others of a forward pass are means.
MAXIMA = ACTIVATIONS, STREAMS = "moe/activation_max", "stability/stream_max"


class Outliers:
    """The largest absolute numbers of each token: in what a block's MoE puts out (routed experts and shared one
    together), and in the residual streams that leave the block.

    Hooks find them in the forward passes within `watch`; replays of a backward pass come later.
    """

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Tensor]] = {ACTIVATIONS: {}, STREAMS: {}}  # by block: [B, T]

    @contextmanager
    def watch(self, model: Transformer) -> Iterator[None]:
        blocks = {f"layers.{i}": block for i, block in enumerate(model.layers)}
        blocks |= {f"mtp.{i}": block for i, block in enumerate(model.mtp)}
        handles = []
        for name, block in blocks.items():
            for metric, module in ((ACTIVATIONS, block.get_submodule("ffn")), (STREAMS, block)):
                handles.append(module.register_forward_hook(self._keeping(metric, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keeping(self, metric: str, name: str) -> Any:
        @torch.no_grad()
        def keep(module: object, arguments: object, outputs: tuple[Tensor, Any]) -> None:
            self._found[metric][name] = outputs[0].flatten(2).abs().amax(-1)

        return keep

    def maxima(self, valid: Tensor) -> dict[str, Tensor]:
        """Over the tokens that ``valid [B, T]`` marks, of all blocks and of each; 0-dim, 0 if there is no token."""
        maxima: dict[str, Tensor] = {}
        for metric, found in self._found.items():
            each = {f"{metric}/{name}": peaks.where(valid, 0).max() for name, peaks in found.items()}
            maxima |= {metric: torch.stack(list(each.values())).max()} | each
        return maxima
