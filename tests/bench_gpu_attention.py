"""The benchmarks of indexer and core attention on a GPU (D5 to D7), at the dims of V4-Flash."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gpu_floors as floors
import torch
import torch.nn.functional as F
from gpu_passes import Draw, Passes, directions, extra_mb, operation, share_of_floor
from gpu_protocol import Benchmark, Case, NotHereError, Place, Target
from torch import Tensor

from openv4.kernels.documents import Blocks, find_blocks, find_documents

# The indexer (D5).


def one_document(place: Place, tokens: int, ratio: int) -> tuple[Tensor, Blocks]:
    documents = find_documents(torch.zeros(1, tokens, dtype=torch.long, device=place.device))
    return documents.first, find_blocks(documents, ratio)


def select_entries(
    place: Place, tokens: int, dtype: torch.dtype, heads: int = 64, dim: int = 128, k: int = 512
) -> Case:
    select, scores_of = (operation("kernels.indexer", name) for name in ("select_entries", "index_scores"))
    draw = Draw(place)
    queries, keys = draw.normal(1, tokens, heads, dim), draw.normal(1, tokens // 4, dim)
    weights = draw.normal(1, tokens, heads, scale=(heads * dim) ** -0.5)
    _, blocks = one_document(place, tokens, 4)
    queries, keys = queries.to(dtype), keys.to(dtype)
    passes = Passes(select, {"queries": queries, "keys": keys, "weights": weights, "blocks": blocks, "k": k})
    if dtype != torch.bfloat16:
        try:
            passes.forward(place.ours)
        except (RuntimeError, TypeError, ValueError):
            raise NotHereError("not run: select_entries takes no FP8 operands") from None

    def check() -> str:
        """Of some tokens: each chosen entry's exact score is, but for rounding, among the best k visible ones'."""
        (found,) = passes.forward(place.ours)
        token = torch.linspace(0, tokens - 1, min(256, tokens), device=place.device).long()
        exact = scores_of(queries[:, token].double(), keys.double(), weights[:, token].double())[0]
        entry = torch.arange(keys.shape[1], device=place.device)
        exact.masked_fill_(entry >= blocks.end[0, token].unsqueeze(-1), -torch.inf)
        count = blocks.end[0, token].clamp(max=found.shape[2])
        chosen = found[0, token]
        assert torch.equal((chosen >= 0).sum(-1), count), "not as many entries as there are, or k"
        assert (chosen[:, 1:] > chosen[:, :-1])[chosen[:, 1:] >= 0].all(), "entries are not ascending"
        best = exact.topk(found.shape[2]).values.gather(1, (count - 1).clamp(min=0).unsqueeze(-1))
        theirs = exact.gather(1, chosen.clamp(min=0))
        slack = 1e-5 * exact[exact.isfinite()].abs().max()  # sums of thousands of products in float32
        assert (theirs >= best - slack)[chosen >= 0].all(), "an entry was chosen that others beat"
        caught = (theirs >= best)[chosen >= 0].double().mean()
        return f"recall {caught:.4%}, exact up to rounding"

    width = floors.BF16 if dtype == torch.bfloat16 else floors.FP8
    case = passes.case(place, False, floors.select_entries(tokens, k, heads, dim, width))
    case.check = check
    case.values = lambda _: {"extra MB": extra_mb(place, partial(passes.forward, place.ours))}
    return case


# Core attention (D6, D7).


def attention_inputs(place: Place, tokens: int, ratio: int, k: int | None, heads: int, dim: int) -> dict[str, Any]:
    """One document; a token's k entries are drawn from all it sees, which is the hardest on the caches."""
    draw = Draw(place)
    first, blocks = one_document(place, tokens, ratio)
    inputs = {
        "q": draw.normal(1, tokens, heads, dim),
        "kv": draw.normal(1, tokens, dim),
        "sink": draw.float32(heads),
        "first": first,
        "window": 128,
        "entries": draw.normal(1, tokens // ratio, dim),
        "blocks": blocks,
        "selected": None,
    }
    if k is not None:
        scores = draw.float32(1, tokens, tokens // ratio)
        inputs["selected"] = operation("kernels.indexer", "select_top_k")(scores, blocks.first, blocks.end, k)
    return inputs


def attended(inputs: Mapping[str, Any]) -> Tensor:
    """Which of window and entries each token attends to, ``[T, T + N]`` bool."""
    tokens, entries = inputs["q"].shape[1], inputs["entries"].shape[1]
    token = torch.arange(tokens, device=inputs["q"].device)
    distance = token[:, None] - token
    window = (distance >= 0) & (distance < inputs["window"])
    if inputs["selected"] is None:
        far = torch.arange(entries, device=token.device) < inputs["blocks"].end[0].unsqueeze(-1)
    else:
        far = operation("kernels.entries", "is_selected")(inputs["selected"], entries)[0]
    return torch.cat((window, far), 1)


def flex(inputs: Mapping[str, Any]) -> Callable[..., Any]:
    """FlexAttention over window and entries; the sink scales its output by what the denominator lacks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sees, made = torch.compile(flex_attention, dynamic=False), attended(inputs)
    length, width = made.shape
    mask = create_block_mask(lambda b, h, i, j: made[i, j], None, None, length, width, device=made.device)

    def call(q: Tensor, kv: Tensor, entries: Tensor, sink: Tensor, **_: Any) -> Tensor:
        keys = torch.cat((kv, entries), 1).unsqueeze(1)
        out, lse = sees(q.transpose(1, 2), keys, keys, block_mask=mask, enable_gqa=True, return_lse=True)
        kept = torch.sigmoid(lse - sink.view(1, -1, 1)).unsqueeze(-1)
        result: Tensor = (out * kept).to(q.dtype).transpose(1, 2)
        return result

    return call


def masked(inputs: Mapping[str, Any]) -> Callable[..., Any]:
    """scaled_dot_product_attention with a mask; it knows no sink, which is left out."""
    mask = attended(inputs)

    def call(q: Tensor, kv: Tensor, entries: Tensor, **_: Any) -> Tensor:
        keys = torch.cat((kv, entries), 1).unsqueeze(1).expand(-1, q.shape[2], -1, -1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, keys, attn_mask=mask)
        return out.transpose(1, 2)

    return call


def attention(
    place: Place, tokens: int, ratio: int, k: int | None, backward: bool, heads: int = 64, dim: int = 512
) -> Case:
    core = operation("kernels.attention", "hybrid_attention")
    inputs = attention_inputs(place, tokens, ratio, k, heads, dim)

    def output(**arguments: Any) -> Tensor:  # the logarithm of the denominator has no gradient
        result: Tensor = core(**arguments)[0]
        return result

    others: dict[str, Callable[..., Any]] = {}
    if place.device.type == "cuda":
        others["FlexAttention"] = _when_called(partial(flex, inputs))
        if k is None:
            others["SDPA + mask, no sink"] = _when_called(partial(masked, inputs))
    floor = floors.attention(tokens, ratio, k, backward, heads, dim)
    return Passes(output, inputs, ("q", "kv", "sink", "entries")).case(place, backward, floor, others)


def _when_called(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """A function that is made when it is first called, so that one that cannot be made costs its own arm only."""
    made: list[Callable[..., Any]] = []

    def call(**arguments: Any) -> Any:
        made.extend([] if made else [make()])
        return made[0](**arguments)

    return call


def _all() -> list[Benchmark]:
    found = []
    for tokens in (4096, 16384, 65536):
        for label, dtype in (("bf16", torch.bfloat16), ("FP8", torch.float8_e4m3fn)):
            build = partial(select_entries, tokens=tokens, dtype=dtype)
            few = Target("extra MB", 3 * 8e-6 * tokens * 512, False)  # nothing of size T^2 / 4
            name = f"D5 indexer scores + top-512, {label}"
            targets = share_of_floor(0.6, few)
            found.append(Benchmark(name, f"T {tokens}", "indexer", build, targets, ("DeepGEMM", "Automodel")))
    csa = partial(attention, tokens=16384, ratio=4, k=512)
    found += directions("D6 CSA core", "T 16384", "csa", csa, (0.6, 0.4), ("FlashMLA", "Automodel"))
    for tokens in (4096, 16384):
        hca = partial(attention, tokens=tokens, ratio=128, k=None)
        found += directions("D7 HCA core", f"T {tokens}", "hca", hca, (0.75, 0.75), ("FlashAttention-3",))
    return found


BENCHMARKS = _all()
