"""Hybrid attention: one module for its three kinds (SWA: window only, CSA: + selected entries, HCA: + all entries).

Shapes: B batch, T tokens, D hidden, H heads, C head dim, N compressed entries, G output groups.
Source: recipe 2; paper 2.3; the official inference code where the two disagree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.attention import hybrid_attention
from ..kernels.compressor import compress_entries
from ..kernels.decode import continue_blocks, continue_documents
from ..kernels.documents import Blocks, Documents, find_blocks, find_documents
from ..kernels.indexer import select_entries
from ..kernels.indexer_loss import Attended, IndexerLoss, indexer_loss, selection_recall
from ..kernels.norm import at_least_fp32
from ..kernels.parts import part_blocks, part_documents
from ..kernels.rope import apply_rope, norm_rope, rope_frequencies, rope_table
from .cache import CompressorCache, LayerCache, pending
from .config import AttentionMode, ModelConfig
from .context import Neighbours, Part
from .layers import GroupedLinear, Linear, RMSNorm
from .recompute import Route

RopeTable = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionTask:
    """What the attention layers do in a forward pass, besides attending (recipe 2.5).

    Attributes:
        mode: "sparse" lets CSA layers attend to the indexer's choice, the others to every visible entry.
        indexer_loss: compute the loss that trains the indexer; its gradient goes to the indexer alone.
        statistics: with it, measure how much attention mass the indexer's choice catches.
    """

    mode: AttentionMode = "sparse"
    indexer_loss: bool = False
    statistics: bool = False


class IndexerReport(NamedTuple):
    """What the indexer of one layer learned from a batch: sums over tokens."""

    loss: IndexerLoss
    recall: tuple[Tensor, Tensor] | None  # sum over sampled tokens and their number


@dataclass(frozen=True)
class Geometry:
    """Everything about a batch that depends on where its tokens stand; built once, shared by all layers."""

    documents: Documents
    window_rope: RopeTable  # for layers without compression
    compressed_rope: RopeTable  # for layers with compression: other base, YaRN
    blocks: dict[int, Blocks]  # by compression ratio
    entry_rope: dict[int, RopeTable]  # by ratio: at the first token of each new entry's own block
    past: int = 0  # tokens of each row's document that are in a cache
    part: Part | None = None  # of rows that several processes share; all else is then of this part

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        segments: Tensor,
        positions: Tensor | None = None,
        neighbours: Neighbours | None = None,
    ) -> "Geometry":
        """From ``segments [B, T]``; ``positions [B, T]`` default to each token's place in its document.

        With neighbours, that of this process's part of these rows.
        """
        documents = find_documents(segments)
        blocks = {ratio: find_blocks(documents, ratio) for ratio in set(config.compress_ratios) - {0}}
        if positions is None:
            positions = documents.position
        if neighbours is None:
            entries = {ratio: positions.gather(1, b.start) for ratio, b in blocks.items()}
            return cls._at(config, documents, blocks, positions, entries)
        part = Part.of(config, neighbours, documents, blocks)
        own = part.start, part.stop
        entries = {ratio: positions.gather(1, share.token) for (ratio, _), share in part.shares.items()}
        blocks = {ratio: part_blocks(b, *own) for ratio, b in blocks.items()}
        return cls._at(config, part_documents(documents, *own), blocks, positions[:, slice(*own)], entries, part=part)

    @classmethod
    def after(cls, config: ModelConfig, tokens: Tensor, past: int) -> "Geometry":
        """Of ``tokens [B, T]``, each row of which goes on with one document after its first ``past`` tokens."""
        documents = continue_documents(tokens, past)
        blocks = {r: continue_blocks(documents, past, r) for r in set(config.compress_ratios) - {0}}
        entries = {ratio: b.start[:, past // ratio :] + past for ratio, b in blocks.items()}
        return cls._at(config, documents, blocks, documents.position, entries, past)

    @classmethod
    def _at(
        cls,
        config: ModelConfig,
        documents: Documents,
        blocks: dict[int, Blocks],
        positions: Tensor,
        entries: dict[int, Tensor],
        past: int = 0,
        part: Part | None = None,
    ) -> "Geometry":
        yarn = config.rope_scaling
        plain = rope_frequencies(config.qk_rope_head_dim, config.rope_theta)
        scaled = rope_frequencies(
            config.qk_rope_head_dim,
            config.compress_rope_theta,
            *((yarn.factor, yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow) if yarn else ()),
        )
        return cls(
            documents,
            rope_table(positions, plain),
            rope_table(positions, scaled),
            blocks,
            {ratio: rope_table(start, scaled) for ratio, start in entries.items()},
            past,
            part,
        )


class Compressor(nn.Module):
    """Turns every ``ratio`` tokens of a document into one key/value entry ``[B, N, dim]`` (recipe 2.2).

    ``simulate``, where ``train.precision`` sets it, rounds the entries as a low-precision cache would hold them.
    """

    def __init__(self, config: ModelConfig, dim: int, ratio: int, overlap: bool) -> None:
        super().__init__()
        width = 2 * dim if overlap else dim
        self.wkv = Linear(config.hidden_size, width)
        self.wgate = Linear(config.hidden_size, width)
        self.ape = nn.Parameter(torch.empty(ratio, width))  # the gate's bias by place within a block
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.ratio, self.overlap = ratio, overlap
        self.simulate: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, geometry: Geometry, cache: CompressorCache | None = None) -> Tensor:
        """Entries of ``x [B, T, D]``; with a cache, of all tokens so far; of a part of its row, to the part's end."""
        wide = at_least_fp32(x)  # pooling runs in float32, as in the official code
        kv, gate, blocks, again = self.wkv(wide), self.wgate(wide), geometry.blocks[self.ratio], 0
        if cache is not None:  # the blocks that x completes, in a row that begins with their earlier tokens
            carried, again = pending(geometry.past, self.ratio, self.overlap)
            keep, _ = pending(geometry.past + x.shape[1], self.ratio, self.overlap)
            kv, gate = cache.kv.extend(kv, keep), cache.gate.extend(gate, keep)
            new = slice(geometry.past // self.ratio - again, None)
            blocks = blocks._replace(start=blocks.start[:, new] + carried, chained=blocks.chained[:, new])
        part, share = geometry.part, None
        if part is not None:  # blocks may begin in the part before
            share = part.shares[self.ratio, self.overlap]
            both, blocks, again = torch.cat((kv, gate), 2), share.blocks, share.skip
            kv, gate = torch.cat((part.neighbours.before(both, share.reach), both), 1).chunk(2, 2)
        norm, rope = self.norm, geometry.entry_rope[self.ratio]
        entries = compress_entries(kv, gate, self.ape, blocks, self.overlap, norm.weight, norm.eps, rope, skip=again)
        entries = entries.to(x.dtype)
        if self.simulate is not None:
            entries = self.simulate(entries)
        if part is not None and share is not None:
            everywhere = part.neighbours.gather(entries).flatten(0, 2)
            entries = everywhere.index_select(0, share.place.flatten()).view(*share.place.shape, -1)
        return entries if cache is None else cache.entries.append(entries)


class Indexer(nn.Module):
    """The lightning indexer: scores the compressed entries of a CSA layer for each query (recipe 2.3).

    The choice of the best is discrete, so the language-model loss sends it no gradient; ``indexer_loss`` trains it.
    ``simulate``, where ``train.precision`` sets it, rounds the queries; the compressor's does so with the keys.
    """

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        self.heads, self.dim, self.top_k = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, self.dim, ratio, overlap=True)
        self.simulate: Callable[[Tensor], Tensor] | None = None

    def forward(
        self, x: Tensor, q_latent: Tensor, geometry: Geometry, cache: CompressorCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, I, J]``, keys ``[B, N, J]`` and head weights ``[B, T, I]`` of the index scores.

        Its inputs, x ``[B, T, D]`` and q_latent ``[B, T, q_lora_rank]``, get no gradient.
        """
        x, q_latent = x.detach(), q_latent.detach()
        q = apply_rope(self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim)), geometry.compressed_rope)
        if self.simulate is not None:
            q = self.simulate(q)
        weights = self.weights_proj(x) * (self.dim**-0.5 * self.heads**-0.5)
        return q, self.compressor(x, geometry, cache), weights


class Attention(nn.Module):
    """One attention layer; ``layer`` indexes ``config.compress_ratios``, an MTP block comes after the main layers.

    ``simulate``, where ``train.precision`` sets it, rounds the window's keys/values as an FP8 cache would hold them.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.dim, self.groups = config.num_attention_heads, config.head_dim, config.o_groups
        self.window, self.ratio, self.eps = config.sliding_window, config.compress_ratios[layer], config.rms_norm_eps
        kind = config.kinds[layer]
        self.attn_sink = nn.Parameter(torch.empty(self.heads))
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.wkv = Linear(config.hidden_size, self.dim)
        self.kv_norm = RMSNorm(self.dim, self.eps)
        self.wo_a = GroupedLinear(self.heads * self.dim // self.groups, self.groups * config.o_lora_rank, self.groups)
        self.wo_b = Linear(self.groups * config.o_lora_rank, config.hidden_size)
        self.compressor = Compressor(config, self.dim, self.ratio, kind == "csa") if self.ratio else None
        self.indexer = Indexer(config, self.ratio) if kind == "csa" else None
        self.simulate: Callable[[Tensor], Tensor] | None = None

    def forward(
        self, x: Tensor, geometry: Geometry, task: AttentionTask, route: Route, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, IndexerReport | None]:
        """Output ``[B, T, D]``, the sink's share of each softmax ``[B, T, H]`` (detached), and the indexer's report.

        With a cache, ``x`` holds the tokens after those in it (``Geometry.after``), attends to them as well, and joins
        them.
        """
        rope = geometry.compressed_rope if self.ratio else geometry.window_rope
        q_latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))
        q = norm_rope(q, None, self.eps, rope)
        kv = norm_rope(self.wkv(x), self.kv_norm.weight, self.eps, rope)
        if self.simulate is not None:
            kv = self.simulate(kv)
        if cache is not None:
            kv = cache.window.extend(kv, self.window - 1)
        if geometry.part is not None:
            kv = torch.cat((geometry.part.neighbours.before(kv, self.window - 1), kv), 1)
        entries = blocks = selected = report = None
        index: tuple[Tensor, Tensor, Tensor] | None = None
        if self.compressor is not None:
            entries = self.compressor(x, geometry, cache and cache.entries)
            blocks = geometry.blocks[self.ratio]
        # A cache gets the indexer's keys in every mode, so that the mode may change from one token to the next.
        indexed = task.mode == "sparse" or task.indexer_loss or cache is not None
        if self.indexer is not None and blocks is not None and indexed:
            with torch.set_grad_enabled(task.indexer_loss):
                index = self.indexer(x, q_latent, geometry, cache and cache.index)
            if task.mode == "sparse":
                selected = route.recall("entries", select_entries, *index, blocks, self.indexer.top_k)
        documents = geometry.documents
        out, lse = hybrid_attention(q, kv, self.attn_sink, documents.first, self.window, entries, blocks, selected)
        if task.indexer_loss and self.indexer is not None and index is not None and entries is not None and blocks:
            attended, recall = Attended(q.detach(), entries.detach(), lse), None
            if task.statistics:
                known = (*index, attended, blocks, documents.valid, self.indexer.top_k, selected)
                recall = route.recall("recall", selection_recall, *known)
            with torch.enable_grad():
                loss = indexer_loss(*index, attended, blocks, documents.valid, selected)
            report = IndexerReport(loss, recall)
        out = apply_rope(out, rope, inverse=True)
        out = self.wo_a(out.flatten(2).unflatten(2, (self.groups, -1)))  # [B, T, G, o_lora_rank]
        return self.wo_b(out.flatten(2)), (self.attn_sink.detach() - lse).exp(), report
