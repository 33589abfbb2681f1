"""Arguments of the core attention, for its tests, its benchmark, and compiling its kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openv4.kernels.attention import hybrid_attention
from openv4.kernels.dispatch import using
from openv4.kernels.documents import find_blocks, find_documents
from openv4.kernels.indexer import select_top_k

KINDS = ["window", "dense", "sparse"]
PACKINGS = ["one document", "random", "single tokens", "padded"]


def pack(packing: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Segments ``[B, T]``; "padded" has padding at the end, in the middle, and one row of nothing else."""
    if packing == "one document":
        return torch.zeros(batch, length, dtype=torch.long)
    if packing in ("single tokens", "short documents"):
        return (torch.arange(length) // (1 if packing == "single tokens" else 5)).expand(batch, -1).contiguous()
    segments = (torch.rand(batch, length, generator=generator) < 0.05).long().cumsum(1)
    if packing == "padded":
        segments[:, length - length // 4 :] = -1
        segments[0, length // 3 : length // 2] = -1
        segments[-1] = -1 if batch > 1 else segments[-1]
    return segments


def draw(
    kind: str,
    packing: str,
    length: int,
    window: int,
    ratio: int = 4,
    k: int = 5,
    batch: int = 2,
    heads: int = 3,
    dim: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Arguments of ``hybrid_attention``; the sink is at least float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    documents = find_documents(pack(packing, batch, length, generator))
    arguments: dict[str, Any] = {
        "q": normal(batch, length, heads, dim).to(dtype),
        "kv": normal(batch, length, dim).to(dtype),
        "sink": normal(heads).to(torch.promote_types(dtype, torch.float32)),
        "first": documents.first,
        "window": window,
    }
    if kind != "window":
        blocks = find_blocks(documents, ratio)
        arguments |= {"entries": normal(batch, length // ratio, dim).to(dtype), "blocks": blocks}
        if kind == "sparse":
            scores = torch.rand(batch, length, length // ratio, generator=generator)
            arguments["selected"] = select_top_k(scores, blocks.first, blocks.end, k)
    return arguments


def attend(kind: str, ratio: int, dtype: torch.dtype) -> None:
    """Forward and backward at the dims of V4-Flash."""
    with using("torch"):
        arguments = draw(kind, "one document", 256, 128, ratio, batch=1, heads=64, dim=512, dtype=dtype)
    if kind == "sparse":
        chosen = arguments["selected"]
        arguments["selected"] = F.pad(chosen, (0, 512 - chosen.shape[2]), value=-1)
    leaves = {name: arguments[name].requires_grad_() for name in ("q", "kv", "sink", "entries") if name in arguments}
    hybrid_attention(**(arguments | leaves))[0].sum().backward()


def flash_calls() -> dict[str, Callable[[], None]]:
    """Sliding windows, HCA, and CSA dense and sparse."""
    return {
        f"{kind}, ratio {ratio}, {dtype}": partial(attend, kind, ratio, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for kind, ratio in (("window", 0), ("dense", 128), ("dense", 4), ("sparse", 4))
    }
