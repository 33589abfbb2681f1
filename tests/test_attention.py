"""Chunked attention against its plain reference: output and every gradient, over odd shapes and packings."""

import pytest
import torch
from model_cases import relative_rms
from torch import Tensor

from openv4.kernels.attention import hybrid_attention, hybrid_attention_reference
from openv4.kernels.documents import find_blocks, find_documents
from openv4.kernels.indexer import select_top_k


@pytest.mark.parametrize("length", [1, 2, 31, 33, 63, 100, 131])
@pytest.mark.parametrize("window", [1, 3, 32, 50, 128])
@pytest.mark.parametrize("kind", ["window", "dense", "sparse"])
def test_equals_the_reference(length: int, window: int, kind: str) -> None:
    """Both in float64, where the only difference is the order of sums: 1e-12."""
    generator = torch.Generator().manual_seed(length * window)
    batch, heads, dim, ratio = 2, 3, 6, 4

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    borders = torch.rand(batch, length, generator=generator) < 0.05
    documents = find_documents(borders.long().cumsum(1))
    blocks = find_blocks(documents, ratio)
    q, kv, sink = draw(batch, length, heads, dim), draw(batch, length, dim), draw(heads)
    entries = None if kind == "window" else draw(batch, length // ratio, dim)
    selected = None
    if kind == "sparse":
        scores = torch.randn(batch, length, length // ratio, generator=generator)
        selected = select_top_k(scores, blocks.first, blocks.end, 5)
    inputs = [t for t in (q, kv, sink, entries) if t is not None]
    weight = draw(batch, length, heads, dim).detach()
    results = []
    for function in (hybrid_attention, hybrid_attention_reference):
        out, lse = function(q, kv, sink, documents.first, window, entries, blocks, selected)
        gradients = torch.autograd.grad((out * weight).sum(), inputs)
        results.append((out, lse, *gradients))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert relative_rms(ours, theirs) < 1e-12


def test_probabilities_and_the_sinks_share_sum_to_one() -> None:
    q, kv, sink = torch.randn(1, 40, 2, 8), torch.ones(1, 40, 8), torch.tensor([0.5, -1.0])
    documents = find_documents(torch.zeros(1, 40, dtype=torch.long))
    out, lse = hybrid_attention(q, kv, sink, documents.first, 7)
    torch.testing.assert_close(out[..., 0] + (sink - lse).exp(), torch.ones(1, 40, 2))
