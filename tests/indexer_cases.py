"""Arguments of the lightning indexer and of its loss, for their tests and for compiling the indexer's kernels."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from attention_cases import pack
from torch import Tensor

from openv4.kernels.attention import hybrid_attention
from openv4.kernels.decode import continue_blocks, continue_documents
from openv4.kernels.documents import Blocks, find_blocks, find_documents
from openv4.kernels.indexer import index_scores, select_entries, select_top_k
from openv4.kernels.indexer_loss import Attended


class Case(NamedTuple):
    """Arguments of the loss, float64; ``dense_lse`` is what attention to every entry has for a denominator."""

    queries: Tensor
    keys: Tensor
    weights: Tensor
    attention: Attended
    blocks: Blocks
    valid: Tensor
    selected: Tensor | None
    dense_lse: Tensor


def draw(
    length: int,
    packing: str = "random",
    ratio: int = 4,
    k: int | None = None,
    batch: int = 2,
    heads: int = 5,
    dim: int = 3,
    seed: int = 0,
    attention: tuple[int, int] = (2, 4),
) -> Case:
    """``k`` None: dense. The softmax's denominator is that of real attention, so that masses are probabilities.

    ``attention``: its number of heads and their dim.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    documents = find_documents(pack(packing, batch, length, generator))
    blocks = find_blocks(documents, ratio)
    count, (attention_heads, wide) = length // ratio, attention
    queries, keys, weights = normal(batch, length, heads, dim), normal(batch, count, dim), normal(batch, length, heads)
    q, kv, sink = normal(batch, length, attention_heads, wide), normal(batch, length, wide), normal(attention_heads)
    entries = 2 * normal(batch, count, wide)
    selected = None if k is None else select_entries(queries, keys, weights, blocks, k)
    _, dense_lse = hybrid_attention(q, kv, sink, documents.first, 3, entries, blocks)
    _, lse = hybrid_attention(q, kv, sink, documents.first, 3, entries, blocks, selected)
    return Case(queries, keys, weights, Attended(q, entries, lse), blocks, documents.valid, selected, dense_lse)


def after_a_cache(tokens: int, entries: int, batch: int = 1) -> Blocks:
    """Of rows that go on with a document, so that few tokens see that many entries, each one more."""
    documents = continue_documents(torch.zeros(batch, tokens, dtype=torch.long), entries - tokens)
    return continue_blocks(documents, entries - tokens, 1)


def select(dtype: torch.dtype, k: int) -> None:
    """Choice and scores at the dims of V4-Flash (k 512) or V4-Pro (1024)."""
    blocks = after_a_cache(256, 8192)
    queries, weights = torch.zeros(1, 256, 64, 128, dtype=dtype), torch.zeros(1, 256, 64, dtype=dtype)
    keys = torch.zeros(1, 8192, 128, dtype=dtype)
    select_entries(queries, keys, weights, blocks, k)
    select_top_k(index_scores(queries, keys, weights), blocks.first, blocks.end, k)


def flash_calls() -> dict[str, Callable[[], None]]:
    return {
        f"{k} entries, {dtype}": partial(select, dtype, k)
        for dtype in (torch.bfloat16, torch.float32)
        for k in (512, 1024)
    }
