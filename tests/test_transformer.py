"""The model against the float64 loop reference, and its invariances under packing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import v4_reference
from model_cases import random_config, random_model, relative_rms
from torch import Tensor

from openv4.model import ModelConfig, Transformer
from openv4.model.init import init_weights
from openv4.model.loss import Counts, shifted_targets, token_losses, training_losses
from openv4.model.released import released_tensors


def reference_config(config: ModelConfig) -> dict[str, Any]:
    csa = [ratio for ratio, kind in zip(config.compress_ratios, config.kinds, strict=True) if kind == "csa"]
    return config.to_json() | {"rope_scaling": config.to_json().get("rope_scaling"), "csa_ratio": csa[0] if csa else -1}


def pack(lengths: list[int], width: int, vocab: int, seed: int) -> tuple[Tensor, Tensor, list[list[int]]]:
    """One row of documents with the given lengths and padding after them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (1, width), generator=generator)
    segments = torch.full((1, width), -1)
    documents, start = [], 0
    for number, length in enumerate(lengths):
        segments[0, start : start + length] = number
        documents.append(tokens[0, start : start + length].tolist())
        start += length
    return tokens, segments, documents


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("seed", "attention"),
    [(0, "sparse"), (1, "sparse"), (2, "sparse"), (3, "sparse"), (4, "dense")]
    + [pytest.param(seed, ("sparse", "dense")[seed % 2], marks=pytest.mark.slow) for seed in range(5, 15)],
)
def test_losses_and_gradients_of_packed_documents_equal_the_reference(seed: int, attention: str) -> None:
    """Main, MTP and balance losses, and the gradient of their weighted sum, over a packed row with padding.

    float32 against float64: 1e-5 on sums, 1e-4 on the whole gradient (float32 rounding 6e-8, amplified by the
    normalisations of a few layers).
    """
    config = random_config(seed, hc_sinkhorn_iters=3, hc_eps=1e-2) if seed % 2 else random_config(seed)
    model = random_model(config, seed)
    tokens, segments, documents = pack([13, 1, 2, 22, 5], 46, config.vocab_size, seed)
    counts = Counts.of([segments])
    ours = training_losses(model, tokens, segments, attention)  # type: ignore[arg-type]
    ours.total(counts, 0.3, 0.05).backward()

    weights = {name: t.detach().double() for name, t in released_tensors(model)}
    trained = {name: t.requires_grad_() for name, t in weights.items() if t.is_floating_point()}
    main = mtp = balance = torch.zeros((), dtype=torch.float64)
    main_count = mtp_count = 0
    for document in documents:
        theirs = v4_reference.losses(reference_config(config), weights, document, attention=attention, mtp=True)
        main, mtp = main + theirs.main_sum, mtp + theirs.mtp_sum
        main_count, mtp_count = main_count + theirs.main_count, mtp_count + theirs.mtp_count
        for name, value in theirs.balance.items():
            balance = balance + value * (len(document) - name.startswith("mtp"))
    assert (main_count, mtp_count, 43) == (int(counts.main), int(counts.mtp), int(counts.valid))
    assert relative_rms(ours.main, main) < 1e-5
    assert relative_rms(ours.mtp, mtp) < 1e-5
    assert relative_rms(ours.balance, balance) < 1e-5

    (main / main_count + 0.3 * mtp / mtp_count + 0.05 * balance / 43).backward()
    squared = [0.0, 0.0]
    for name, grad in gradients(model).items():
        prefix, stacked, matrix = name.rpartition(".experts.")
        if stacked:
            names = [f"{prefix}.experts.{e}.{matrix}.weight" for e in range(len(grad))]
            zero = torch.zeros_like(grad[0], dtype=torch.float64)
            theirs_grad = torch.stack([zero if (g := trained[n].grad) is None else g for n in names])
        else:
            found = trained[name].grad
            theirs_grad = torch.zeros_like(grad, dtype=torch.float64) if found is None else found
        squared[0] += float((grad.double() - theirs_grad).square().sum())
        squared[1] += float(theirs_grad.square().sum())
    assert (squared[0] / squared[1]) ** 0.5 < 1e-4


@pytest.mark.parametrize("heads", [1, 2])
def test_indexer_ties_go_to_the_lowest_entry(heads: int) -> None:
    """With one or two indexer heads many scores are exactly zero; the choice must still be the reference's."""
    config = random_config(11, index_n_heads=heads, index_topk=3)
    model = random_model(config, 11)
    tokens, segments, (document,) = pack([41], 41, config.vocab_size, 0)
    weights = dict(released_tensors(model))
    expected = v4_reference.forward(reference_config(config), weights, document)
    assert relative_rms(model(tokens, segments)[0], expected.logits) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_packed_equals_separate(seed: int) -> None:
    """Logits and gradients of documents in one row are those of each document alone, to float32 rounding."""
    config = random_config(seed + 100)
    model = random_model(config, seed)
    lengths = [7, 19, 1, 33, 4]
    tokens, segments, documents = pack(lengths, 70, config.vocab_size, seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(70, config.vocab_size, generator=generator)
    packed = model(tokens, segments)[0]
    (packed * weight)[: sum(lengths)].sum().backward()
    together = gradients(model)
    model.zero_grad()
    start = 0
    for document in documents:
        alone = model(torch.tensor([document]))[0]
        span = slice(start, start + len(document))
        assert relative_rms(packed[span], alone) < 1e-5
        (alone * weight[span]).sum().backward()
        start += len(document)
    apart = gradients(model)
    total = torch.stack([grad.norm() for grad in apart.values()]).norm()
    for name, grad in apart.items():  # a gradient that cancels to zero is rounding of the whole: hence the second term
        assert (together[name] - grad).norm() < 1e-4 * grad.norm() + 1e-6 * total, name


@pytest.mark.parametrize("seed", range(4))
def test_nothing_crosses_a_document_border(seed: int) -> None:
    """Other tokens in one document change no other document's logits, MTP input, losses or statistics: bit for bit."""
    config = random_config(seed + 200)
    model = random_model(config, seed)
    tokens, segments, _ = pack([15, 23, 9], 50, config.vocab_size, seed)
    changed = tokens.clone()
    changed[segments == 1] = (changed[segments == 1] + 7) % config.vocab_size
    changed[segments == -1] = 3
    others = (segments == 0) | (segments == 2)
    before, after = model.run(tokens, segments), model.run(changed, segments)
    assert before.mtp_streams is not None and after.mtp_streams is not None
    assert torch.equal(before.streams[others], after.streams[others])
    assert torch.equal(before.mtp_streams[others], after.mtp_streams[others])

    model.zero_grad()
    model.embed.weight.grad = None
    embedded = model.run(tokens, segments)
    assert embedded.mtp_streams is not None
    sum(s[segments == 0].sum() for s in (embedded.streams, embedded.mtp_streams)).backward()  # type: ignore[union-attr]
    touched = model.embed.weight.grad.abs().sum(1).nonzero().flatten().tolist()  # type: ignore[union-attr]
    assert set(touched) <= set(tokens[segments == 0].tolist())


def test_balance_statistics_of_a_document_do_not_depend_on_its_neighbours() -> None:
    config = random_config(7, num_hash_layers=0)
    model = random_model(config, 7)
    tokens, segments, documents = pack([12, 20], 32, config.vocab_size, 7)
    together = training_losses(model, tokens, segments).balance
    apart = sum(
        training_losses(model, torch.tensor([d]), torch.zeros(1, len(d), dtype=torch.long)).balance for d in documents
    )
    assert relative_rms(together, torch.as_tensor(apart)) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 127, 128, 129])
def test_short_and_bordering_lengths_train(length: int) -> None:
    config = random_config(3, compress_ratios=(0, 4, 128, 0), layer_types=(), num_hidden_layers=3, num_hash_layers=1)
    model = random_model(config, 3)
    tokens, segments = torch.arange(length).remainder(config.vocab_size)[None], torch.zeros(1, length, dtype=torch.long)
    losses = training_losses(model, tokens, segments, statistics=True)
    losses.total(Counts.of([segments]), 0.3, 1e-4).backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert all(torch.isfinite(s).all() for s in losses.statistics.values())
    assert {int(load.sum()) for load in losses.load.values()} <= {
        n * config.num_experts_per_tok for n in (length, length - 1)
    }


def test_a_row_of_padding_alone_contributes_nothing() -> None:
    config = random_config(4)
    model = random_model(config, 4)
    tokens, segments = torch.zeros(1, 20, dtype=torch.long), torch.full((1, 20), -1)
    losses = training_losses(model, tokens, segments)
    losses.total(Counts.of([segments]), 0.3, 1e-4).backward()
    assert not any(loss.detach().any() for loss in (losses.main, losses.mtp, losses.balance))
    assert all(not g.any() for g in gradients(model).values())
    assert all(not load.any() for load in losses.load.values())


def test_shifted_targets_stay_in_their_document() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, -1]])
    assert shifted_targets(tokens, segments, 1).tolist() == [[11, 12, -100, -100, 15, -100, -100]]
    assert shifted_targets(tokens, segments, 2).tolist() == [[12, -100, -100, -100, -100, -100, -100]]
    assert shifted_targets(tokens, segments, 9).tolist() == [[-100] * 7]


def test_explicit_positions_shift_the_rotary_embedding_only() -> None:
    """Attention is relative: all positions moved by a constant change nothing but rounding."""
    config = random_config(21, rope_scaling=None)
    model = random_model(config, 21)
    tokens = torch.arange(30)[None] % config.vocab_size
    positions = torch.arange(30)[None]
    assert torch.equal(model(tokens), model(tokens, positions=positions))
    assert relative_rms(model(tokens, positions=positions + 1000), model(tokens)) < 1e-4
    assert relative_rms(model(tokens, positions=positions * 3), model(tokens)) > 1e-3


def test_token_losses_sum_to_the_training_loss() -> None:
    config = random_config(8)
    model = random_model(config, 8)
    tokens, segments, _ = pack([9, 14], 25, config.vocab_size, 8)
    losses, targets = token_losses(model, tokens, segments, "sparse")
    assert not losses[targets < 0].any()
    assert relative_rms(losses.sum(), training_losses(model, tokens, segments).main) < 1e-6


def test_bfloat16_streams_follow_float32() -> None:
    """bfloat16 has 8 bits of mantissa: 4e-3 a rounding; choices are fixed here by keeping every entry and expert."""
    config = random_config(9, index_topk=100, num_hash_layers=1)
    config = random_config(9, index_topk=100, num_experts_per_tok=config.n_routed_experts)
    model = random_model(config, 9)
    tokens = torch.arange(40)[None] % config.vocab_size
    exact = model(tokens)
    model.compute_dtype = torch.bfloat16
    rounded = model(tokens)
    assert rounded.dtype == torch.float32
    assert 1e-4 < relative_rms(rounded, exact) < 5e-2


def test_init_does_not_depend_on_order_and_hash_tables_are_balanced() -> None:
    config = random_config(2, vocab_size=97, n_routed_experts=7, num_experts_per_tok=3, num_hash_layers=1)
    one, two = Transformer(config), Transformer(config)
    init_weights(one, 5)
    torch.manual_seed(123)
    init_weights(two, 5)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    init_weights(two, 6)
    assert not torch.equal(one.embed.weight, two.embed.weight)
    table = one.layers[0].ffn.gate.tid2eid  # type: ignore[union-attr]
    assert all(len(set(row)) == 3 for row in table.tolist())  # type: ignore[operator, union-attr]
    uses = torch.bincount(table.flatten(), minlength=7)  # type: ignore[operator, union-attr, arg-type]
    assert uses.max() - uses.min() <= 1


def test_identity_init_keeps_streams_apart() -> None:
    for style, low, high in (("identity", 0.85, 1.0), ("zero", 0.2, 0.3)):
        config = random_config(2, hc_init=style, hc_mult=4)
        model = Transformer(config)
        init_weights(model)
        report = model.run(torch.arange(6)[None]).reports["layers.0"]
        diagonal = report.residuals[0].diagonal(dim1=-2, dim2=-1)
        assert low < float(diagonal.min()) <= float(diagonal.max()) < high


def test_config_round_trip(tmp_path: Path) -> None:
    for seed in range(20):
        config = random_config(seed)
        (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
        assert ModelConfig.from_json(tmp_path) == config
