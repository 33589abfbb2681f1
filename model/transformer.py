"""The DeepSeek-V4 transformer, from tokens to logits and losses. Start reading here.

    embedding -> 4 residual streams -> [mHC(attention) -> mHC(MoE)] x L -> collapse -> norm -> head
                                                                      \\-> MTP block -> collapse -> norm -> head

Parameter and buffer names are those of the released checkpoints, except that routed experts are stacked
(``released.py`` splits them). Shapes: B batch, T tokens, S streams, D hidden, V vocabulary, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.hyper_connection import mhc_head, mhc_post, mhc_post_pre, mhc_pre
from ..kernels.norm import at_least_fp32
from .attention import Attention, AttentionTask, Geometry, IndexerReport
from .cache import Cache, LayerCache
from .config import AttentionMode, ModelConfig, Recompute
from .context import Neighbours, part_bounds
from .layers import Linear, RMSNorm
from .moe import MoE, Routing
from .precision import Gauge
from .recompute import Route, recomputed


class BlockReport(NamedTuple):
    """What one block tells about a batch, besides its output."""

    routing: Routing
    sink: Tensor  # [B, T, H] the sink's share of each softmax
    residuals: tuple[Tensor, Tensor]  # [B, T, S, S] stream mixing at the attention and at the MoE site, detached
    indexer: IndexerReport | None  # of a CSA layer whose indexer trains


class Output(NamedTuple):
    """Streams after the last block and after the MTP block, and every block's report."""

    streams: Tensor  # [B, T, S, D]
    mtp_streams: Tensor | None  # [B, T, S, D]
    reports: dict[str, BlockReport]  # by block name: "layers.0", ..., "mtp.0"


@dataclass
class Origin:
    """What a model remembers of the release it was loaded from, so that unchanged weights are written back bit for bit.

    Attributes:
        scales: by released name of the weight, as they were stored.
        copies: further names in the release, and the weight that each repeats.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)


class Block(nn.Module):
    """Attention and MoE, each reading from and writing to the residual streams through an mHC site (recipe 4)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        streams, hidden = config.hc_mult, config.hidden_size
        self.config = config
        self.attn_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.ffn = MoE(config, hash_routed=layer < min(config.num_hash_layers, config.num_hidden_layers))
        for site in ("attn", "ffn"):
            self.register_parameter(f"hc_{site}_fn", _empty(streams * (streams + 2), streams * hidden))
            self.register_parameter(f"hc_{site}_base", _empty(streams * (streams + 2)))
            self.register_parameter(f"hc_{site}_scale", _empty(3))

    def forward(
        self,
        streams: Tensor,
        tokens: Tensor,
        geometry: Geometry,
        task: AttentionTask,
        route: Route,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, BlockReport]:
        x, mixing = mhc_pre(streams, *self._site("attn"))
        output, sink, indexer = self.attn(self.attn_norm(x), geometry, task, route, cache)
        attention_residual = mixing.residual.detach()
        streams, x, mixing = mhc_post_pre(streams, output, mixing, *self._site("ffn"))
        documents = geometry.documents
        output, routing = self.ffn(self.ffn_norm(x), tokens, documents.first, documents.valid, route, geometry.part)
        streams = mhc_post(streams, output, mixing)
        return streams, BlockReport(routing, sink, (attention_residual, mixing.residual.detach()), indexer)

    def _site(self, site: str) -> tuple[Any, ...]:
        """What ``mhc_pre`` takes besides the streams."""
        weights = (getattr(self, f"hc_{site}_{part}") for part in ("fn", "base", "scale"))
        c = self.config
        return *weights, c.hc_sinkhorn_iters, c.hc_eps, c.rms_norm_eps, c.hc_constraint


class MTPBlock(Block):
    """Multi-token prediction: one more block, fed with the main streams and the next token's embedding (recipe 9)."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__(config, config.num_hidden_layers + depth)
        hidden = config.hidden_size
        self.e_proj = Linear(hidden, hidden)
        self.h_proj = Linear(hidden, hidden)
        self.enorm = RMSNorm(hidden, config.rms_norm_eps)
        self.hnorm = RMSNorm(hidden, config.rms_norm_eps)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        _add_head_parameters(self, config)

    def merge(self, streams: Tensor, next_embedding: Tensor) -> Tensor:
        """Input ``[B, T, S, D]``: projected main streams plus the projected embedding ``[B, T, D]`` of token t+1."""
        following: Tensor = self.e_proj(self.enorm(next_embedding))
        merged: Tensor = self.h_proj(self.hnorm(streams)) + following.unsqueeze(2)
        return merged


class Transformer(nn.Module):
    """DeepSeek-V4. Builds on any device, meta included; ``init_weights`` or ``load_pretrained`` fills it.

    ``compute_dtype`` is that of the residual streams and matrix products; None: that of the parameters. ``recompute``
    says what the blocks keep for the backward pass (``recompute.py``); it changes no result. ``gauge`` counts what
    low-precision products lose, where ``train.precision`` has set such.

    With a ``context``, several processes share each row: all are given whole rows, and each computes its part of them,
    so that T in what it returns is that of the part (``context.py``). Generation takes no notice of it.
    """

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype | None = None, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.recompute = config, compute_dtype, recompute
        self.origin = Origin()
        self.gauge = Gauge()
        self.context: Neighbours | None = None
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        _add_head_parameters(self, config)
        self.mtp = nn.ModuleList(MTPBlock(config, depth) for depth in range(config.num_nextn_predict_layers))

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        attention: AttentionMode = "sparse",
    ) -> Tensor:
        """Logits ``[B, T, V]`` float32.

        Args:
            tokens: ``[B, T]`` int64.
            segments: ``[B, T]`` int, documents packed in a row, -1 for padding; None: each row is one document.
            positions: ``[B, T]`` int, for the rotary embedding; None: they restart with each document.
            attention: "sparse" makes CSA layers attend to the indexer's choice, the others to every visible entry.

        Raises:
            ValueError: the processes of the context cannot share rows of this length.
        """
        output = self.run(tokens, segments, positions, AttentionTask(attention), mtp=False)
        return self.logits(output.streams)

    def run(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        task: AttentionTask | None = None,
        mtp: bool = True,
        experts: Tensor | None = None,
    ) -> Output:
        """Everything but the output head; arguments as in ``forward``.

        Args:
            mtp: run the MTP block as well.
            experts: ``[B, G, T, K]`` what ``choose_experts`` returned; routers that learn follow it instead of
                choosing, and weigh these experts as always.
        """
        task = task or AttentionTask()
        routes = {}
        if experts is not None:
            gates = enumerate(self.learned_gates(mtp))
            routes = {gate: Route(experts=experts[:, g].flatten(0, 1).long()) for g, gate in gates}
        if segments is None:
            segments = torch.zeros_like(tokens)
        geometry = Geometry.of(self.config, segments, positions, self.context)
        own = self.part(tokens)
        embedding, streams = self._begin(own)
        reports: dict[str, BlockReport] = {}
        for index, block in enumerate(self.layers):
            name = f"layers.{index}"
            streams, reports[name] = recomputed(
                self.recompute, block, streams, own, geometry, task, route=routes.get(name)
            )
        mtp_streams = None
        if mtp and self.mtp:
            block = self.mtp[0]
            assert isinstance(block, MTPBlock)
            # The last token of a document has no next one: it becomes padding, and no embedding crosses the border.
            has_next = F.pad(segments[:, 1:] == segments[:, :-1], (0, 1)) & (segments >= 0)
            if geometry.part is None:
                following = F.pad(embedding[:, 1:], (0, 0, 0, 1))
            else:  # the part after begins with the next token; after the last one nothing does, and has_next says so
                after = geometry.part.stop % tokens.shape[1]
                following = torch.cat((embedding[:, 1:], self._embed(tokens[:, after, None])), 1)
            following = following * self.part(has_next).unsqueeze(-1)
            shortened = Geometry.of(self.config, segments.masked_fill(~has_next, -1), positions, self.context)
            mtp_streams = block.merge(streams, following)
            mtp_streams, reports["mtp.0"] = recomputed(
                self.recompute, block, mtp_streams, own, shortened, task, route=routes.get("mtp.0")
            )
        return Output(streams, mtp_streams, reports)

    def learned_gates(self, mtp: bool = True) -> list[str]:
        """Names of the blocks whose routers choose experts by what they have learned."""
        blocks = {f"layers.{index}": block for index, block in enumerate(self.layers)}
        if mtp and self.mtp:
            blocks["mtp.0"] = self.mtp[0]
        return [name for name, block in blocks.items() if block.ffn.gate.tid2eid is None]  # type: ignore[union-attr]

    @torch.no_grad()
    def choose_experts(
        self, tokens: Tensor, segments: Tensor, attention: AttentionMode = "sparse", mtp: bool = True
    ) -> Tensor:
        """What the learned routers choose now for ``tokens [B, T]``, to be followed later: ids ``[B, G, T, K]`` of the
        G ``learned_gates``, int16 (int32 beyond 32,767 experts)."""
        reports = self.run(tokens, segments, task=AttentionTask(attention), mtp=mtp).reports
        dtype = torch.int16 if self.config.n_routed_experts < 2**15 else torch.int32
        chosen = [reports[gate].routing.experts.to(dtype) for gate in self.learned_gates(mtp)]
        k = self.config.num_experts_per_tok
        if not chosen:
            return tokens.new_empty((len(tokens), 0, tokens.shape[1], k), dtype=dtype)
        return torch.stack([ids.view(len(tokens), -1, k) for ids in chosen], 1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache, attention: AttentionMode = "sparse", last: int = 1) -> Tensor:
        """Runs ``tokens``, which follow those in the cache, and adds them to it; one at a time, or a prompt at once.

        The logits are those of ``forward`` on the whole document, up to rounding.

        Args:
            tokens: ``[B, T]`` int64, T >= 1, one document per row; cache: ``Cache(config)``, or one that earlier tokens
                of these documents have been run with.
            attention: as in ``forward``.
            last: how many of the tokens, counted from the last one, get logits.

        Returns:
            logits ``[B, min(last, T), V]`` float32.

        Raises:
            ValueError: there is no token, or the cache holds another number of rows.
        """
        if not tokens.shape[1]:
            raise ValueError("no token to run; a document begins with its begin token")
        if cache.rows not in (None, len(tokens)):
            raise ValueError(f"tokens have {len(tokens)} rows, the cache {cache.rows}; begin another Cache(config)")
        geometry = Geometry.after(self.config, tokens, cache.length)
        _, streams = self._begin(tokens)
        for block, layer in zip(self.layers, cache.layers, strict=True):
            streams, _ = block(streams, tokens, geometry, AttentionTask(attention), Route(), layer)
        cache.rows, cache.length = len(tokens), cache.length + tokens.shape[1]
        return self.logits(streams[:, -last:])

    def _begin(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding ``[B, T, D]`` and the streams ``[B, T, S, D]`` that start from it."""
        embedding = self._embed(tokens)
        return embedding, embedding.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()

    def _embed(self, tokens: Tensor) -> Tensor:
        embedding: Tensor = self.embed(tokens)
        return embedding.to(self.compute_dtype or self.embed.weight.dtype)

    def part(self, rows: Tensor) -> Tensor:
        """Of whole rows ``[B, T, ...]``, what this process computes: all without a context."""
        start, stop = part_bounds(self.config, rows.shape[1], self.context)
        return rows[:, start:stop]

    def hidden(self, streams: Tensor, owner: nn.Module | None = None) -> Tensor:
        """Input of the output head ``[B, T, D]``; ``owner`` (self or an MTP block) has the collapse and the norm."""
        owner, c = owner or self, self.config
        fn, base, scale = (getattr(owner, f"hc_head_{part}") for part in ("fn", "base", "scale"))
        norm: Callable[[Tensor], Tensor] = owner.norm  # type: ignore[assignment]
        return norm(mhc_head(streams, fn, base, scale, c.hc_eps, c.rms_norm_eps))

    def logits(self, streams: Tensor, owner: nn.Module | None = None) -> Tensor:
        """Logits ``[B, T, V]``, formed in float32."""
        return F.linear(at_least_fp32(self.hidden(streams, owner)), at_least_fp32(self.head.weight))

    def row_splits(self) -> dict[str, tuple[int, ...]]:
        """Rows of the logically independent matrices inside stacked parameters, for Muon (recipe 5)."""
        c = self.config
        splits: dict[str, tuple[int, ...]] = {}
        for name, parameter in self.named_parameters():
            rows = parameter.shape[-2] if parameter.dim() > 1 else 0
            if name.endswith(("hc_attn_fn", "hc_ffn_fn")):
                splits[name] = (c.hc_mult, c.hc_mult, c.hc_mult**2)
            elif name.endswith("attn.wo_a.weight"):
                splits[name] = (rows // c.o_groups,) * c.o_groups
        for name, module in self.named_modules():
            if getattr(module, "overlap", False):
                for matrix in ("wkv", "wgate"):
                    half = module.get_submodule(matrix).get_parameter("weight").shape[0] // 2
                    splits[f"{name}.{matrix}.weight"] = (half, half)
        return splits


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def _add_head_parameters(module: nn.Module, config: ModelConfig) -> None:
    """The weights that collapse the streams before an output head."""
    module.register_parameter("hc_head_fn", _empty(config.hc_mult, config.hc_mult * config.hidden_size))
    module.register_parameter("hc_head_base", _empty(config.hc_mult))
    module.register_parameter("hc_head_scale", _empty(1))
