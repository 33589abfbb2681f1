"""Counts the operations of the loop reference with torch's own counter, forward and backward.

``v4_reference`` visits one token and one key after the other and computes exactly what is visible, so nothing has to be
subtracted. Two things are in torch's counter's way:

- It knows products of matrices, not those of a matrix and a vector, of which the loops are made: ``Columns`` makes the
  vector a matrix of one column.
- A sum of products that is written element by element escapes it. ``counted_forms`` states the three places where the
  reference does so (mixing of streams, index scores) as products, with the same results, and adds the indexer's loss,
  which the reference does not have, from the package's plain one: a token at a time, with the entries it looks at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import v4_reference as v4
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from openv4.kernels.documents import Blocks
from openv4.kernels.indexer_loss import Attended, indexer_loss_reference
from openv4.model import ModelConfig
from openv4.model.shapes import tensor_shapes


class Columns(TorchFunctionMode):
    """``matrix @ vector``, ``vector @ matrix`` and ``vector @ vector`` as products of matrices."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.matmul or min(x.dim() for x in args) > 1:
            return function(*args, **(kwargs or {}))
        left, right = args
        result = function(left if left.dim() > 1 else left[None], right if right.dim() > 1 else right[:, None])
        result = result if left.dim() > 1 else result.squeeze(-2)
        return result if right.dim() > 1 else result.squeeze(-1)


collapse_by_loops, update_by_loops, attention_by_loops = v4.collapse, v4.update, v4.attention_layer
selection_by_loops = v4.index_selection


def collapse(A: Tensor, X: Tensor) -> Tensor:
    result = torch.einsum("tj,tjd->td", A, X)
    torch.testing.assert_close(result, collapse_by_loops(A, X))
    return result


def update(C: Tensor, K: Tensor, y: Tensor, X: Tensor) -> Tensor:
    joined = torch.einsum("tjk,tjd->tkd", torch.cat((K, C[:, None]), 1), torch.cat((X, y[:, None]), 1))
    with patch.object(v4, "collapse", collapse_by_loops):
        torch.testing.assert_close(joined, update_by_loops(C, K, y, X))
    return joined


@dataclass
class CountedIndexer:
    """What the indexers of one forward pass do, as products; ``losses`` are to be differentiated with the others."""

    loss: bool
    losses: list[Tensor] = field(default_factory=list)

    def project(self, cfg: v4.Config, w: v4.Weights, x: Tensor, cq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, dim = cfg["index_n_heads"], cfg["index_head_dim"]
        ratio = cfg["csa_ratio"]
        x, cq = x.detach(), cq.detach()
        keys = v4.compress(cfg, v4.under(w, "compressor."), x, ratio, dim, True, v4.frequencies(cfg, ratio))
        queries = (cq @ w["wq_b.weight"].T).view(len(x), heads, dim)
        theta = v4.frequencies(cfg, ratio)
        queries = torch.stack([v4.rotate(q, t, theta) for t, q in enumerate(queries)])
        return queries, keys, x @ w["weights_proj.weight"].T * (dim**-0.5 * heads**-0.5)

    def learn(self, cfg: v4.Config, projected: tuple[Tensor, Tensor, Tensor], visible: list[list[int]]) -> None:
        """The loss of each token over the entries that it sees. What attention made of them is a stand-in: it has no
        gradient, and the number of operations does not depend on it."""
        queries, keys, weights = projected
        heads, c = cfg["num_attention_heads"], cfg["head_dim"]
        for t, seen in enumerate(visible):
            if seen:
                n = len(seen)
                place = torch.zeros(1, 1, dtype=torch.long)
                blocks = Blocks(torch.zeros(1, n, dtype=torch.long), torch.ones(1, n).bool(), place, place + n, 1)
                stand_in = Attended(torch.rand(1, 1, heads, c), torch.rand(1, n, c), torch.zeros(1, 1, heads))
                stand_in = Attended(*(x.double() for x in stand_in))
                own = queries[t].view(1, 1, *queries.shape[1:]), keys[seen].unsqueeze(0), weights[t].view(1, 1, -1)
                valid = torch.ones(1, 1, dtype=torch.bool)
                self.losses.append(indexer_loss_reference(*own, stand_in, blocks, valid).kl)

    def selection(
        self, cfg: v4.Config, w: v4.Weights, x: Tensor, cq: Tensor, ratio: int, theta: Tensor
    ) -> list[list[int]]:
        with torch.set_grad_enabled(self.loss):
            queries, keys, weights = projected = self.project(cfg, w, x, cq)
        selection: list[list[int]] = []
        with torch.no_grad():
            for t in range(len(x)):
                scores = weights[t] @ torch.relu(queries[t] @ keys[: (t + 1) // ratio].T)
                selection.append(sorted(v4.best(scores.tolist(), cfg["index_topk"])))
        with Uncounted():
            assert selection == selection_by_loops(cfg, w, x, cq, ratio, theta)
        if self.loss:
            self.learn(cfg, projected, selection)
        return selection

    def attention(
        self, cfg: v4.Config, w: v4.Weights, x: Tensor, ratio: int, mode: str
    ) -> tuple[Tensor, list[list[int]] | None]:
        result, visible = attention_by_loops(cfg, w, x, ratio, mode)
        if self.loss and visible is not None and mode == "dense":
            with torch.enable_grad():
                cq = torch.rand(len(x), cfg["q_lora_rank"], dtype=x.dtype)
                self.learn(cfg, self.project(cfg, v4.under(w, "indexer."), x, cq), visible)
        return result, visible


class Uncounted(torch.utils._python_dispatch.TorchDispatchMode):
    """Below this mode products are not seen by the counter around it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


@contextmanager
def counted_forms(indexer: CountedIndexer) -> Iterator[None]:
    with (
        patch.object(v4, "collapse", collapse),
        patch.object(v4, "update", update),
        patch.object(v4, "index_selection", indexer.selection),
        patch.object(v4, "attention_layer", indexer.attention),
    ):
        yield


def reference_config(config: ModelConfig) -> dict[str, Any]:
    ratios = {ratio for kind, ratio in zip(config.kinds, config.compress_ratios, strict=True) if kind == "csa"}
    return asdict(config) | {"csa_ratio": max(ratios, default=4)}


def counted_flops(
    config: ModelConfig, length: int, attention: str, mtp: bool, indexer_loss: bool = False, frozen: bool = False
) -> int:
    """Operations of a training step on one document; ``frozen``: no weight but the embedding gets a gradient."""
    generator = torch.Generator().manual_seed(length)
    warmup = attention == "indexer_warmup"
    weights: dict[str, Tensor] = {}
    for s in tensor_shapes(config):
        for name in s.names():
            if s.stored == "int64":
                rows = torch.rand(s.shape[0], config.n_routed_experts, generator=generator)
                weights[name] = rows.argsort(1)[:, : s.shape[1]]
            else:
                value = torch.randn(s.shape, generator=generator, dtype=torch.float64) * s.shape[-1] ** -0.5
                learns = ".indexer." in name if warmup else not frozen or name == "embed.weight"
                weights[name] = value.requires_grad_(learns and s.trained)
    tokens = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
    indexer = CountedIndexer(indexer_loss or warmup)
    counter = FlopCounterMode(display=False)
    with counter, Columns(), counted_forms(indexer), torch.set_grad_enabled(not warmup):
        mode = "sparse" if attention == "sparse" else "dense"
        found = v4.losses(reference_config(config), weights, tokens, attention=mode, mtp=mtp and not warmup)
        with torch.enable_grad():
            total = torch.zeros((), dtype=torch.float64) + sum(indexer.losses)
            if not warmup:
                total = total + found.main_sum + found.mtp_sum + sum(found.balance.values())
        if total.requires_grad:  # the warm-up of a document that has no entry yet has nothing to learn
            total.backward()
    return counter.get_total_flops()
