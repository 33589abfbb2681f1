"""Inputs of the output head's cross-entropy, and its calls at V4-Flash's dims."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from openv4.kernels import cross_entropy
from openv4.kernels.cross_entropy import IGNORED


def head(
    tokens: int, vocabulary: int, width: int, weight: torch.dtype = torch.float32, ignored: float = 0.2, seed: int = 0
) -> dict[str, Tensor]:
    """bfloat16 hidden states, logits of size 2, and targets of which a share is ignored."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return {
        "hidden": torch.randn(tokens, width, generator=generator).bfloat16(),
        "weight": (2 * width**-0.5 * torch.randn(vocabulary, width, generator=generator)).to(weight),
        "targets": targets.masked_fill(torch.rand(tokens, generator=generator) < ignored, IGNORED),
    }


def flash_calls() -> dict[str, Callable[[], object]]:
    """A head that is trained, in float32 as in a run and in bfloat16 as released, a frozen one, and no gradient at all.

    Of the vocabulary a part: all of it would only repeat the same tiles.
    """

    def call(weight: torch.dtype, learns: bool = True) -> None:
        hidden = torch.zeros(256, 4096, dtype=torch.bfloat16, requires_grad=True)
        head = torch.zeros(2048, 4096, dtype=weight, requires_grad=learns)
        with mock.patch.object(cross_entropy, "TRITON_ELEMENTS", 128 * 2048):  # two chunks
            loss = cross_entropy.linear_cross_entropy(hidden, head, torch.zeros(256, dtype=torch.int64))
        loss.backward()  # type: ignore[no-untyped-call]

    hidden, head = torch.zeros(256, 4096, dtype=torch.bfloat16), torch.zeros(2048, 4096)
    return {
        "float32 head": partial(call, torch.float32),
        "bfloat16 head": partial(call, torch.bfloat16),
        "frozen head": partial(call, torch.bfloat16, learns=False),
        "losses": partial(cross_entropy.token_cross_entropy, hidden, head, torch.zeros(256, dtype=torch.int64)),
    }
