"""Models and packed rows that one process computes whole, and several in parts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from model_cases import random_config, random_model
from torch import Tensor

from openv4.kernels.dispatch import Choice, using
from openv4.model import Transformer
from openv4.model.config import AttentionMode, Recompute
from openv4.model.loss import Counts, token_losses, training_losses
from openv4.train.context import ContextGroup

LENGTH = 80  # parts of 20 or 40 tokens: no window or block of a random config reaches over more

# Documents that end exactly where a part does (20, 40), that have one token, that go on in two parts or in all.
MIXED = ((13, 1, 6, 20, 1, 1, 30, 3), (80,))
# Nothing to compress; parts that hold padding alone, and padding between documents.
SPARSE = ((1,) * 80, (25, 7), (19, -22, 30))


@dataclass(frozen=True)
class Case:
    """``rows`` are the lengths of the documents of each row, negative ones of padding; more padding follows."""

    seed: int
    rows: tuple[tuple[int, ...], ...] = MIXED
    attention: AttentionMode = "sparse"
    recompute: Recompute = "none"
    dtype: torch.dtype = torch.float64
    streams: torch.dtype | None = None  # None: the same
    indexer: bool = True
    kernels: Choice = "auto"
    length: int = LENGTH
    changed: int | None = None  # the document of each row that gets other tokens
    fixed: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Transformer:
        config = random_config(self.seed + 700, **{"index_topk": 3, "num_hash_layers": 1} | self.fixed)
        model = random_model(config, self.seed).to(self.dtype)
        model.recompute, model.compute_dtype = self.recompute, self.streams
        return model

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, segments, and which tokens are trained on, ``[B, T]`` each."""
        generator, vocabulary = torch.Generator().manual_seed(self.seed), self.model().config.vocab_size
        tokens = torch.randint(0, vocabulary, (len(self.rows), self.length), generator=generator)
        segments = torch.full_like(tokens, -1)
        for row, lengths in enumerate(self.rows):
            names = torch.tensor([number if length > 0 else -1 for number, length in enumerate(lengths)])
            found = names.repeat_interleave(torch.tensor(lengths).abs())
            segments[row, : len(found)] = found
        if self.changed is not None:
            tokens = torch.where(segments == self.changed, (tokens + 7) % vocabulary, tokens)
        return tokens, segments, torch.rand(tokens.shape, generator=generator) < 0.8


def random_case(seed: int) -> Case:
    rng = random.Random(seed)

    def row() -> tuple[int, ...]:
        lengths: list[int] = []
        while sum(map(abs, lengths)) < LENGTH - 30:
            lengths.append(rng.choice([1, 2, rng.randint(3, 12), rng.randint(8, 30), -rng.randint(1, 25)]))
        return (*lengths, LENGTH - sum(map(abs, lengths))) if rng.random() < 0.7 else tuple(lengths)

    return Case(
        seed,
        tuple(row() for _ in range(rng.randint(1, 3))),
        rng.choice(["sparse", "sparse", "dense", "indexer_warmup"]),
        rng.choice(["none", "selective", "full"]),
        indexer=rng.random() < 0.7,
        kernels=rng.choice(["torch", "torch", "reference"]),
        fixed={"num_hash_layers": rng.choice([0, 1]), "num_nextn_predict_layers": 1},
    )


def compute(case: Case, context: ContextGroup | None = None) -> dict[str, Any]:
    """All that evaluation and a training step ask of a model, of this process's part of the rows."""
    model = case.model()
    model.context = context
    tokens, segments, trained = case.batch()
    with using(case.kernels):
        with torch.no_grad():
            output = model.run(tokens, segments)
            logits = model(tokens, segments, attention="dense" if case.attention == "dense" else "sparse")
            tokenwise, _ = token_losses(model, tokens, segments, case.attention)
        before = 0 if context is None else context.sent
        losses = training_losses(model, tokens, segments, case.attention, True, case.indexer, True, trained)
        losses.total(Counts.of([segments], [trained]), 0.3, 0.1, 0.7).backward()
    sums = {name: getattr(losses, name).detach() for name in ("main", "mtp", "balance")}
    return {
        "parts": {"logits": logits, "token losses": tokenwise, "mtp streams": output.mtp_streams},
        "sums": sums | {f"indexer {name}": value.detach() for name, value in losses.indexer._asdict().items()},
        "load": losses.load,
        "statistics": losses.statistics,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "sent": 0 if context is None else context.sent - before,
    }


def compute_shared(cases: Sequence[Case], sizes: Sequence[int]) -> dict[tuple[int, int], dict[str, Any]]:
    """In a process of a world: cases by groups of each size, which take turns; by size and case, this process's."""
    results = {}
    for size in sizes:
        groups = [dist.new_group(list(range(low, low + size))) for low in range(0, dist.get_world_size(), size)]
        mine = dist.get_rank() // size
        context = ContextGroup(groups[mine])
        for number, case in enumerate(cases):
            if number % len(groups) == mine:
                results[size, number] = compute(case, context)
    return results


def touched_embeddings(case: Case, document: int) -> list[int]:
    """In a process of a world: tokens that the streams of one document of row 0 depend on, its gradient says."""
    model = case.model()
    model.context = ContextGroup(dist.group.WORLD)
    tokens, segments, _ = case.batch()
    output = model.run(tokens, segments)
    own = model.part(segments) == document
    own[1:] = False
    sum(streams[own].sum() for streams in (output.streams, output.mtp_streams)).backward()  # type: ignore[union-attr]
    gradient = model.embed.weight.grad
    dist.all_reduce(gradient)
    return gradient.abs().sum(1).nonzero().flatten().tolist()


def compute_quick(cases: Sequence[Case], leaking: Case, document: int) -> tuple[dict[tuple[int, int], Any], list[int]]:
    torch.use_deterministic_algorithms(True)  # as a run does
    return compute_shared(cases, [2, 4]), touched_embeddings(leaking, document)


def changed(case: Case, document: int) -> Case:
    return replace(case, changed=document)
