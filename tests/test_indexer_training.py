"""The indexer's training: who gets which gradient, what a run moves, a task with known answers, the KL by hand."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import v4_reference
from model_cases import random_config, random_model, relative_rms
from run_cases import contents, optimizers_of, plan, rows, summary, tiny_config
from safetensors.torch import load_file
from torch import Tensor, nn

import openv4.model.attention as attention_module
from openv4.data.loader import Batch
from openv4.kernels.attention import hybrid_attention
from openv4.kernels.indexer import select_entries
from openv4.kernels.indexer_loss import Attended, indexer_loss, selection_recall
from openv4.model import Transformer
from openv4.model.attention import Geometry, Indexer
from openv4.model.config import AttentionMode
from openv4.model.init import init_weights
from openv4.model.loss import Counts, Losses, training_losses
from openv4.model.released import released_tensors
from openv4.optim.config import OptimConfig
from openv4.optim.groups import build_optimizers
from openv4.optim.schedule import Stage
from openv4.train.config import TrainConfig
from openv4.train.loop import train, training_step

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, where there is one; they are dropped from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def names(model: nn.Module, indexer: bool) -> set[str]:
    """The indexers' parameters, or all others."""
    return {name for name, _ in model.named_parameters() if (".indexer." in name) == indexer}


def assert_bit_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# Who gets which gradient.


def packed_case(case: int) -> tuple[Transformer, Batch]:
    """Random layers; case 3: a CSA layer before and after an HCA layer, and an MTP block that is one, too.

    At least three selected entries: with one, the restricted KL is zero and has no gradient. Two rows: documents of 1
    to 40 tokens with padding behind them, and one document.
    """
    fixed: dict[str, object] = {"index_topk": 3}
    if case == 3:
        fixed |= {"num_hidden_layers": 3, "compress_ratios": (4, 8, 4, 4), "layer_types": (), "num_hash_layers": 1}
    config = random_config(case + 300, **fixed)
    tokens = torch.randint(0, config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(case))
    segments = torch.zeros(2, 60, dtype=torch.long)
    segments[0] = torch.tensor([0, 1, 2, -1]).repeat_interleave(torch.tensor([40, 1, 14, 5]))
    return random_model(config, case), Batch(tokens, segments, ())


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("case", range(4))
def test_the_indexer_and_the_model_learn_from_different_losses(case: int, mode: AttentionMode) -> None:
    """Exactly: a gradient that must not be is None, not zero. The total's gradient is both, bit for bit."""
    model, batch = packed_case(case)
    counts = Counts.of([batch.segments])

    without = training_losses(model, batch.tokens, batch.segments, mode)
    assert not without.indexer.kl.requires_grad and int(without.indexer.tokens) == 0
    without.total(counts, 0.3, 0.1, 0.7).backward()
    model_alone = gradients(model)
    assert set(model_alone) == names(model, indexer=False)

    def losses() -> Losses:  # once for each backward pass: the cross-entropy scales its gradient in place
        return training_losses(model, batch.tokens, batch.segments, mode, indexer=True)

    assert int(losses().indexer.tokens) > 0
    for name in ("main", "mtp", "balance"):
        loss: Tensor = getattr(losses(), name)
        assert torch.equal(loss, getattr(without, name))
        loss.backward()
        reached = gradients(model)
        assert reached and set(reached) <= names(model, indexer=False), name
    (0.7 * losses().indexer.kl / counts.valid).backward()
    indexer_alone = gradients(model)
    assert set(indexer_alone) == names(model, indexer=True)
    for name, gradient in indexer_alone.items():
        assert gradient.isfinite().all() and gradient.any(), name
    losses().total(counts, 0.3, 0.1, 0.7).backward()
    assert_bit_equal(gradients(model), model_alone | indexer_alone)


@pytest.mark.parametrize("case", range(4))
def test_a_warmup_trains_the_indexers_alone(case: int) -> None:
    """By the gradient that the same loss has beside the others under dense attention; the MTP block does not run."""
    model, batch = packed_case(case)
    counts = Counts.of([batch.segments])
    losses = training_losses(model, batch.tokens, batch.segments, "indexer_warmup", statistics=True)
    assert not any(loss.requires_grad for loss in (losses.main, losses.mtp, losses.balance))
    assert not losses.mtp and "mtp.0" not in losses.load
    losses.total(counts, 0.0, 0.0, 1.0).backward()
    ours = gradients(model)
    assert set(ours) == {name for name in names(model, indexer=True) if not name.startswith("mtp.")}

    dense = training_losses(model, batch.tokens, batch.segments, "dense", mtp=False, indexer=True, statistics=True)
    (dense.indexer.kl / counts.valid).backward()
    assert_bit_equal(ours, gradients(model))
    assert torch.equal(losses.main, dense.main)
    for mine, its in zip(losses.indexer, dense.indexer, strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(losses.statistics["attn/indexer_recall"], dense.statistics["attn/indexer_recall"])


@pytest.mark.parametrize("mode", ["indexer_warmup", "sparse"])
def test_documents_too_short_for_an_entry_teach_nothing(mode: AttentionMode) -> None:
    """No token has a choice: zero loss, finite gradients, and a step whose weights stay finite."""
    model, _ = packed_case(3)
    segments = torch.arange(20).div(3, rounding_mode="floor")[None]
    batch = Batch(torch.arange(20)[None], segments, ())
    losses = training_losses(model, batch.tokens, segments, mode, indexer=True, statistics=True)
    assert not losses.indexer.kl and not losses.indexer.uniform and not losses.indexer.tokens
    assert float(losses.statistics["attn/indexer_recall"]) == 0.0
    losses.indexer.kl.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())
    now = plan(attention=mode, indexer_weight=1.0)
    report = training_step(model, optimizers_of(model), [batch], now, 1.0)
    assert float(report.found_inf) == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# A run through all the stages.

DENSE, WARMUP, SPARSE, RESTING = range(4)
LAST_STEPS = [3, 6, 9, 11]  # of each stage
STEPS = LAST_STEPS[-1]


@pytest.fixture(scope="module")
def config(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Three steps dense, three of the indexer alone, three sparse, two sparse without the indexer's loss.

    Two micro-batches a step. Documents of some 25 tokens have six entries, of which two are selected.
    """
    config: TrainConfig = tiny_config(small_data, tmp_path_factory.mktemp("staged") / "run", "model.index_topk=2")
    common = Stage("dense", 3 * 128, 64, 128, lr=6e-3, attention="dense", bias_speed=0.02)
    stages = (
        common,
        replace(common, name="warm-up", lr=1e-2, warmup_steps=2, attention="indexer_warmup"),
        replace(common, name="sparse", attention="sparse"),
        replace(common, name="resting", attention="sparse", indexer_weight=0.0, tokens=2 * 128),
    )
    checkpoint = replace(config.checkpoint, every=1, keep=STEPS)
    return replace(config, stages=stages, micro_batch_tokens=64, checkpoint=checkpoint)


def test_no_recall_is_reported_where_the_indexer_takes_all(config: TrainConfig, tmp_path: Path) -> None:
    """With a top-k beyond the entries of a row there is nothing to measure; the loss is there all the same."""
    model, steps = replace(config.model, index_topk=1000), LAST_STEPS[SPARSE]
    run = train(replace(config, model=model, steps=steps, output=str(tmp_path / "run")))
    row = rows(run)[-1]
    assert row["train/stage"] == SPARSE
    assert {key for key in row if key.startswith("attn/indexer_")} == {"attn/indexer_kl", "attn/indexer_kl_uniform"}


@pytest.fixture(scope="module")
def straight(config: TrainConfig, one_thread: None) -> Path:
    """The folder of that run, never interrupted; not to be written to."""
    return train(config)


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    """Weights, router biases and optimizer state after a step."""
    folder = run / "checkpoints" / f"step_{step}"
    return {
        f"{file}.{name}": tensor
        for file in ("model", "optimizer")
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
        if not name.startswith("rng.")
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """What changed in a bit, or is new."""
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def test_each_stage_moves_what_it_trains_and_nothing_else(config: TrainConfig, straight: Path) -> None:
    """Bit for bit at every step: weights, router biases, momenta, moments, and AdamW's step counts."""
    assert len(rows(straight)) == STEPS
    states = {step: checkpoint(straight, step) for step in range(1, STEPS + 1)}
    stages = {step: row["train/stage"] for step, row in enumerate(rows(straight), 1)}
    assert [max(s for s in stages if stages[s] == stage) for stage in range(4)] == LAST_STEPS
    everything = set(states[STEPS])
    of_indexer = {name for name in everything if ".indexer." in name}
    # A hash layer's table never changes.
    tables = {name for name in everything if name.endswith("tid2eid")}
    biases = {name for name in everything if name.endswith("gate.bias")}
    assert len(of_indexer) == 6 + 4 + 3 * 2 and biases and tables  # weights, momenta, and AdamW's three of two
    for step in range(2, STEPS + 1):
        changed = moved(states[step - 1], states[step])
        if stages[step] == WARMUP:
            assert changed == of_indexer, step
        elif stages[step] == SPARSE:
            assert of_indexer <= changed, step
        else:
            assert not changed & of_indexer, step
        if stages[step] != WARMUP:
            # A bias rests while its expert's load is the mean.
            assert everything - of_indexer - tables - biases <= changed, step
            assert changed & biases, step
    ends = [states[last] for last in LAST_STEPS]
    assert moved(ends[DENSE], ends[WARMUP]) == of_indexer
    assert not any(".indexer." in name for name in states[1] if name.startswith("optimizer."))


def test_the_indexer_starts_from_its_initial_weights(config: TrainConfig, straight: Path) -> None:
    """Also the first step, which has no checkpoint before it, leaves it alone: no decay without a gradient."""
    model = Transformer(config.model)
    init_weights(model, config.seed)
    after = checkpoint(straight, LAST_STEPS[DENSE])
    state = model.state_dict()
    assert [name for name in names(model, indexer=True) if not torch.equal(after[f"model.{name}"], state[name])] == []


def test_rows_report_the_indexer_where_it_trains(straight: Path) -> None:
    for row in rows(straight):
        reported = {key for key in row if key.startswith("attn/indexer_")}
        if row["train/stage"] in (WARMUP, SPARSE):
            assert reported == {"attn/indexer_kl", "attn/indexer_kl_uniform", "attn/indexer_recall"}, row["step"]
            assert 0 <= row["attn/indexer_kl"] < 10 and 0 < row["attn/indexer_kl_uniform"] < math.log(16)
            assert 0 < row["attn/indexer_recall"] <= 1
            assert row["optim/update_rms/indexer"] > 0
        else:
            assert not reported, row["step"]
            assert not row.get("optim/update_rms/indexer", 0.0)
        if row["train/stage"] == WARMUP:
            assert row["train/loss"] > 0 and row["train/grad_norm"] > 0


@pytest.mark.parametrize("stop", [last - 1 for last in LAST_STEPS[:3]])
def test_resumed_in_the_middle_of_a_stage(stop: int, config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(replace(config, output=str(run), steps=stop))
    assert len(rows(run)) == stop
    train(replace(config, output=str(run)))
    for step in range(1, STEPS + 1):
        ours, theirs = (contents(folder / "checkpoints" / f"step_{step}") for folder in (run, straight))
        assert sorted(ours) == sorted(theirs) and [file for file in ours if ours[file] != theirs[file]] == [], step
    assert rows(run) == rows(straight)
    assert summary(run) == summary(straight)


# A task with known answers.

RATIO, TOPICS, ANSWERS, TOP_K = 4, 16, 4, 6
ENTRIES = TOPICS * ANSWERS
LENGTH = ENTRIES * RATIO
HEADS, CHANNELS, HIDDEN, LATENT, WINDOW = 2, 20, 32, 24, 8
TASK = random_config(
    0,
    num_hidden_layers=1,
    compress_ratios=(RATIO, 0),
    layer_types=(),
    num_hash_layers=0,
    hidden_size=HIDDEN,
    q_lora_rank=LATENT,
    num_attention_heads=HEADS,
    o_groups=1,
    head_dim=CHANNELS,
    qk_rope_head_dim=4,
    index_n_heads=8,
    index_head_dim=20,
    index_topk=TOP_K,
    sliding_window=WINDOW,
    rope_scaling=None,
)


Index = tuple[Tensor, Tensor, Tensor]  # queries, keys and head weights


@dataclass(frozen=True)
class Task:
    """Rows of blocks, each about a topic; a token asks for one topic, and attends to the visible blocks about it.

    The topics of blocks and questions are written into x and the query's latent in codes of their own, which an indexer
    has to learn to match; attention knows the answers by orthogonal codes.
    """

    x: Tensor  # [B, T, D]
    latent: Tensor  # [B, T, q_lora_rank]
    geometry: Geometry
    q: Tensor  # [B, T, H, C]
    kv: Tensor  # [B, T, C]
    entries: Tensor  # [B, N, C]
    answers: Tensor  # [B, T, N] bool

    @classmethod
    def draw(cls, codes: int, seed: int, batch: int = 4) -> "Task":
        """``codes`` seeds the codes, the same in training and test; ``seed`` all else."""
        fixed, free = torch.Generator().manual_seed(codes), torch.Generator().manual_seed(seed)
        in_x, in_latent = (torch.randn(TOPICS, size, generator=fixed) for size in (HIDDEN, LATENT))
        in_attention = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=fixed)).Q[:TOPICS]

        def noise(scale: float, *shape: int) -> Tensor:
            return scale * torch.randn(batch, *shape, generator=free)

        topic = torch.stack([torch.randperm(ENTRIES, generator=free) % TOPICS for _ in range(batch)])  # [B, N]
        geometry = Geometry.of(TASK, torch.zeros(batch, LENGTH, dtype=torch.long))
        end = geometry.blocks[RATIO].end
        asked = topic.gather(1, (torch.rand(batch, LENGTH, generator=free) * end).long().clamp(max=ENTRIES - 1))
        # A logit of 10 for each answer and about 0 for all else: exp(10) is four hundred times the other entries' sum.
        q = 10 * CHANNELS**0.5 * in_attention[asked].unsqueeze(2) + noise(0.3, LENGTH, HEADS, CHANNELS)
        visible = torch.arange(ENTRIES) < end.unsqueeze(-1)
        return cls(
            in_x[topic].repeat_interleave(RATIO, 1) + noise(0.3, LENGTH, HIDDEN),
            in_latent[asked] + noise(0.3, LENGTH, LATENT),
            geometry,
            q,
            noise(0.1, LENGTH, CHANNELS),
            in_attention[topic] + noise(0.02, ENTRIES, CHANNELS),
            visible & (topic.unsqueeze(1) == asked.unsqueeze(2)),
        )

    def attended(self, selected: Tensor | None = None) -> Attended:
        first, blocks = self.geometry.documents.first, self.geometry.blocks[RATIO]
        _, lse = hybrid_attention(self.q, self.kv, torch.zeros(HEADS), first, WINDOW, self.entries, blocks, selected)
        return Attended(self.q, self.entries, lse)

    def loss(self, indexer: Indexer, sparse: bool) -> tuple[Tensor, Tensor]:
        """KL per token, and that of a uniform indexer."""
        index: Index = indexer(self.x, self.latent, self.geometry)
        blocks = self.geometry.blocks[RATIO]
        selected = select_entries(*index, blocks, TOP_K) if sparse else None
        loss = indexer_loss(*index, self.attended(selected), blocks, self.geometry.documents.valid, selected)
        return loss.kl / loss.tokens, loss.uniform / loss.tokens

    @torch.no_grad()
    def recall(self, indexer: Indexer, sparse: bool = False) -> float:
        index: Index = indexer(self.x, self.latent, self.geometry)
        blocks = self.geometry.blocks[RATIO]
        selected = select_entries(*index, blocks, TOP_K) if sparse else None
        attended, valid = self.attended(selected), self.geometry.documents.valid
        caught, tokens = selection_recall(*index, attended, blocks, valid, TOP_K, selected)
        assert int(tokens) == int((blocks.end > TOP_K).sum())
        return float(caught / tokens)

    def mass(self) -> tuple[Tensor, Tensor]:
        """Attention probability of each entry, summed over heads, and the number that is visible: a row per token with
        more than TOP_K of them."""
        q, entries, lse = self.attended()
        end = self.geometry.blocks[RATIO].end
        logits = torch.einsum("bthc,bnc->bthn", q, entries) * CHANNELS**-0.5 - lse.unsqueeze(-1)
        mass = logits.exp().sum(2) * (torch.arange(ENTRIES) < end.unsqueeze(-1))
        return mass[end > TOP_K], end[end > TOP_K]


def new_indexer(seed: int) -> Indexer:
    generator = torch.Generator().manual_seed(seed)
    indexer = Indexer(TASK, RATIO)
    with torch.no_grad():
        for name, parameter in indexer.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.ones(()) if name.endswith("norm.weight") else drawn * (not name.endswith("ape")))
    return indexer


def teach(indexer: Indexer, codes: int, steps: int, sparse: bool, lr: float) -> None:
    """Steps of Muon and AdamW, as the recipe has it, on fresh rows each."""
    optimizers = build_optimizers(((f"indexer.{n}", p) for n, p in indexer.named_parameters()), {}, OptimConfig())
    for step in range(steps):
        kl, _ = Task.draw(codes, 1000 * (1 + sparse) + step).loss(indexer, sparse)
        kl.backward()
        optimizers.step(lr, torch.zeros(()))
        optimizers.zero_grad()


def test_the_answers_of_the_task_are_known() -> None:
    """Where there is a choice, 99 % of the entries' mass is on the four answers or fewer, for every token."""
    task = Task.draw(0, 0)
    mass, end = task.mass()
    answers = task.answers[task.geometry.blocks[RATIO].end > TOP_K]
    assert int(answers.sum(1).min()) >= 1 and int(answers.sum(1).max()) == ANSWERS
    assert float(((mass * answers).sum(1) / mass.sum(1)).min()) > 0.99
    assert int(end.max()) == ENTRIES


@pytest.mark.parametrize("seed", range(3))
def test_an_indexer_learns_the_known_answers(seed: int) -> None:
    """Recall on held-out rows: chance before, at least 0.95 after the warm-up, and no less after sparse training.

    Chance: k of n visible entries picked blindly catch k / n of the mass; the recall compares that with what the best k
    hold, nearly all. Here k = 6 and n = 7 to 64, in the mean 0.24. For one indexer the 16 x 16 pairs of topics are 256
    drawings of probability 0.24, not all independent; the mean of eight indexers is well within 0.05 of chance.
    """
    held_out = Task.draw(seed, 1)
    mass, end = held_out.mass()
    chance = float((TOP_K / end * mass.sum(1) / mass.topk(TOP_K).values.sum(1)).mean())
    assert 0.22 < chance < 0.26
    blind = [held_out.recall(new_indexer(other)) for other in range(8)]
    assert sum(blind) / len(blind) == pytest.approx(chance, abs=0.05)
    assert max(blind) < 0.4

    indexer = new_indexer(seed)
    teach(indexer, seed, 120, sparse=False, lr=0.02)
    dense = held_out.recall(indexer)
    assert dense >= 0.95
    kl, uniform = held_out.loss(indexer, sparse=False)
    assert kl < 0.1 * uniform

    before, _ = held_out.loss(indexer, sparse=True)
    teach(indexer, seed, 60, sparse=True, lr=0.002)
    after, _ = held_out.loss(indexer, sparse=True)
    sparse = held_out.recall(indexer, sparse=True)
    print(f"seed {seed}: chance {chance:.3f}, untrained {sum(blind) / 8:.3f}, dense {dense:.4f}, sparse {sparse:.4f}")
    assert sparse >= 0.95 and sparse > dense - 0.005
    assert after < before


def test_sparse_training_improves_a_half_trained_indexer() -> None:
    """What it selects wrongly it pushes down, so that better entries come up from outside its choice."""
    held_out, indexer = Task.draw(5, 1), new_indexer(5)
    teach(indexer, 5, 30, sparse=False, lr=0.02)
    before = held_out.recall(indexer, sparse=True)
    teach(indexer, 5, 100, sparse=True, lr=0.02)
    after = held_out.recall(indexer, sparse=True)
    print(f"half-trained {before:.3f}, then {after:.3f}")
    assert 0.4 < before < 0.9 < after


# The KL divergence by hand, in float64.


def divergences(
    cfg: v4_reference.Config, w: v4_reference.Weights, x: Tensor, ratio: int, seen: list[list[int]]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By token: KL of the indexer's softmax from the heads' summed and normalised attention, over the entries seen; and
    that of a uniform indexer. Recipe 2.3 to 2.5, one token and one head at a time."""
    heads, c, eps, window = cfg["num_attention_heads"], cfg["head_dim"], cfg["rms_norm_eps"], cfg["sliding_window"]
    index_heads, j = cfg["index_n_heads"], cfg["index_head_dim"]
    theta = v4_reference.frequencies(cfg, ratio)
    own = v4_reference.under(w, "indexer.")
    keys = v4_reference.compress(cfg, v4_reference.under(own, "compressor."), x, ratio, j, True, theta)
    with torch.no_grad():
        latent = v4_reference.rms_norm(x @ w["wq_a.weight"].T, w["q_norm.weight"], eps)
        kv = v4_reference.rms_norm(x @ w["wkv.weight"].T, w["kv_norm.weight"], eps)
        near = torch.stack([v4_reference.rotate(kv[t], t, theta) for t in range(len(x))])
        far = v4_reference.compress(cfg, v4_reference.under(w, "compressor."), x, ratio, c, True, theta)
    found, uniform = {}, {}
    for t, entries in enumerate(seen):
        if not entries:
            continue
        with torch.no_grad():
            attended = torch.cat((near[max(0, t - window + 1) : t + 1], far[entries]))
            q = v4_reference.rms_norm((w["wq_b.weight"] @ latent[t]).view(heads, c), None, eps)
            mass = x.new_zeros(len(entries))
            for h in range(heads):
                logits = attended @ v4_reference.rotate(q[h], t, theta) / math.sqrt(c)
                exponentials = torch.cat((logits, w["attn_sink"][h : h + 1])).exp()
                mass += (exponentials / exponentials.sum())[-1 - len(entries) : -1]
            target = mass / mass.sum()
        index_q = v4_reference.rotate((own["wq_b.weight"] @ latent[t]).view(index_heads, j), t, theta)
        weight = own["weights_proj.weight"] @ x[t] / math.sqrt(j * index_heads)
        scores = torch.stack([(weight * (index_q @ keys[s]).relu()).sum() for s in entries])
        probability = scores.exp() / scores.exp().sum()
        found[t] = (target * (target.log() - probability.log())).sum()
        uniform[t] = (target * (target * len(entries)).log()).sum()
    return found, uniform


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of every ``indexer_loss`` of the model."""
    recorded: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> Any:
        recorded.append(arguments)
        return indexer_loss(*arguments)

    monkeypatch.setattr(attention_module, "indexer_loss", record)
    return recorded


def by_token(arguments: tuple[Any, ...]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The package's KL, and that of a uniform indexer, of single tokens of a row, where they count: all others are
    declared padding."""
    queries, keys, weights, attended, blocks, valid, selected = arguments
    found, uniform = {}, {}
    for t in valid[0].nonzero().flatten().tolist():
        alone = torch.zeros_like(valid)
        alone[0, t] = True
        loss = indexer_loss(queries, keys, weights, attended, blocks, alone, selected)
        if int(loss.tokens):
            found[t], uniform[t] = loss.kl.detach(), loss.uniform.detach()
    return found, uniform


@pytest.mark.parametrize("mode", ["indexer_warmup", "dense", "sparse"])
@pytest.mark.parametrize("case", range(4))
def test_the_kl_is_that_of_a_plain_computation(
    case: int, mode: AttentionMode, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each token of each layer, over a packed row with padding; and its gradient.

    The whole model runs in float64 beside it, so that a layer's inputs are off by float32's rounding of all layers
    before: 6e-8 an operation, some 1e-6 after a few layers, on logits of order one and therefore on a KL and on the
    gradient as a whole (measured: 1e-6 on each). The bound is ten times that.
    """
    model, _ = packed_case(case)
    lengths = [13, 1, 2, 22, 5]
    generator = torch.Generator().manual_seed(case)
    tokens = torch.randint(0, model.config.vocab_size, (1, 46), generator=generator)
    segments = torch.full((1, 46), -1)
    segments[0, :43] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    losses = training_losses(model, tokens, segments, mode, indexer=True)
    losses.indexer.kl.backward()
    trained = gradients(model)
    recorded = list(calls)

    weights = {name: t.detach().double() for name, t in released_tensors(model)}
    for name in trained:
        weights[name].requires_grad_()
    config = model.config.to_json() | {"rope_scaling": model.config.to_json().get("rope_scaling")}
    kinds = zip(model.config.compress_ratios, model.config.kinds, strict=True)
    config["csa_ratio"] = next(ratio for ratio, kind in kinds if kind == "csa")
    plain = v4_reference.attention_layer
    seen_by: list[tuple[v4_reference.Weights, Tensor, list[list[int]]]] = []  # by CSA layer

    def remember(cfg: Any, w: Any, x: Tensor, ratio: int, attention: str) -> Any:
        output, seen = plain(cfg, w, x, ratio, attention)
        if seen is not None:
            seen_by.append((w, x.detach(), seen))
        return output, seen

    monkeypatch.setattr(v4_reference, "attention_layer", remember)
    with_mtp = mode != "indexer_warmup"
    ours = [by_token(arguments) for arguments in recorded]
    kl = uniform = torch.zeros((), dtype=torch.float64)
    count = 0
    start = 0
    for length in lengths:
        seen_by.clear()
        document = tokens[0, start : start + length].tolist()
        with torch.no_grad():
            attention = "sparse" if mode == "sparse" else "dense"
            v4_reference.forward(config, weights, document, attention=attention, mtp=with_mtp)
        # The MTP block, the last of the layers, does not run on a document of one token.
        assert len(seen_by) == len(recorded) or length == 1
        for (w, x, seen), (own, own_uniform) in zip(seen_by, ours, strict=False):
            theirs, their_uniform = divergences(config, w, x, config["csa_ratio"], seen)
            assert sorted(t - start for t in own if start <= t < start + length) == sorted(theirs)
            for t, value in theirs.items():
                assert float(own[start + t]) == pytest.approx(float(value.detach()), abs=1e-5)
                assert float(own_uniform[start + t]) == pytest.approx(float(their_uniform[t]), abs=1e-5)
                kl, uniform, count = kl + value, uniform + their_uniform[t], count + 1
        start += length
    assert count == int(losses.indexer.tokens) > 20
    assert relative_rms(losses.indexer.kl, kl) < 1e-5
    assert relative_rms(losses.indexer.uniform, uniform) < 1e-5
    kl.backward()
    pairs = [(trained[name], weights[name].grad) for name in sorted(trained)]
    squares = [((g - o).square().sum(), g.square().sum()) for o, g in pairs if g is not None]
    assert len(squares) == len(trained)
    error, size = (float(torch.stack(column).sum().sqrt()) for column in zip(*squares, strict=True))
    assert error < 1e-5 * size
