"""The cache: token by token, in pieces or at once, the same logits; how large it is, and what a token costs."""

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from model_cases import CSA, HCA, SWA, random_config, random_model, relative_rms
from test_memory import Meter
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openv4.kernels import attention, indexer
from openv4.kernels.attention import hybrid_attention, hybrid_attention_reference
from openv4.kernels.decode import continue_blocks, continue_documents
from openv4.kernels.documents import find_blocks, find_documents
from openv4.kernels.indexer import select_entries
from openv4.model import ModelConfig, Transformer
from openv4.model.cache import Cache, Growing
from openv4.model.config import AttentionMode

pytestmark = pytest.mark.usefixtures("one_thread")

# Float64 leaves no room for a bug: sums of a few hundred terms of size 1 in another order differ by some 1e-14.
EXACT = 1e-10


def pattern(ratios: tuple[int, int], window: int, top_k: int) -> ModelConfig:
    """One layer of each kind."""
    return random_config(
        0,
        num_hidden_layers=3,
        layer_types=(SWA, CSA, HCA),
        compress_ratios=(0, *ratios),
        sliding_window=window,
        index_topk=top_k,
        num_hash_layers=1,
        hc_sinkhorn_iters=3,  # 20 are most of the time of a small model's step
    )


# Windows of one token, of a block, of several; V4's ratios, the presets'; more and fewer entries than top-k.
CASES = {
    "window 1": (pattern((2, 5), 1, 2), 23),
    "window of a block": (pattern((4, 16), 4, 3), 36),
    "nano": (pattern((4, 16), 16, 8), 50),
    "large top-k": (pattern((3, 7), 8, 50), 24),
    "top-k 1": (pattern((2, 3), 5, 1), 22),
    "V4's ratios": (pattern((4, 128), 20, 5), 131),
    "blocks of one token": (pattern((1, 2), 3, 4), 20),
    "block longer than all": (pattern((4, 64), 128, 2), 30),
}
cases = pytest.mark.parametrize(("config", "length"), CASES.values(), ids=CASES)


def model_and_tokens(config: ModelConfig, length: int, batch: int = 2, seed: int = 0) -> tuple[Transformer, Tensor]:
    model = random_model(config, seed).double()
    generator = torch.Generator().manual_seed(seed)
    return model, torch.randint(config.vocab_size, (batch, length), generator=generator)


def in_pieces(
    model: Transformer, tokens: Tensor, sizes: Sequence[int], attention: AttentionMode = "sparse"
) -> tuple[Tensor, Cache]:
    """Logits of every token, fed in pieces of these sizes."""
    cache = Cache(model.config)
    logits = [model.decode(piece, cache, attention, last=piece.shape[1]) for piece in tokens.split(list(sizes), 1)]
    return torch.cat(logits, 1), cache


def splits(length: int, seed: int) -> Iterator[int]:
    """Piece sizes from one token to a third of the text."""
    rng = random.Random(seed)
    while length:
        size = min(length, rng.choice([1, 1, 2, 3, rng.randint(1, 12), rng.randint(1, length // 3 + 1)]))
        yield size
        length -= size


def tensors(cache: Cache) -> Iterator[Tensor]:
    """Everything that the cache keeps alive."""
    for layer in cache.layers:
        compressors = [c for c in (layer.entries, layer.index) if c is not None]
        for held in (layer.window.rows, *(t for c in compressors for t in (c.kv.rows, c.gate.rows, c.entries.buffer))):
            if held is not None:
                yield held


def expected_elements(config: ModelConfig, length: int) -> int:
    """Of one row, by the description in recipe 10: window, entries, keys, and what is yet to be compressed."""
    total = 0
    for kind, ratio in zip(config.kinds[: config.num_hidden_layers], config.compress_ratios, strict=False):
        total += min(length, config.sliding_window - 1) * config.head_dim
        if kind == "hca":
            total += length // ratio * config.head_dim + length % ratio * 2 * config.head_dim
        if kind == "csa":
            pending = length % ratio + (ratio if length >= ratio else 0)
            for dim in (config.head_dim, config.index_head_dim):
                total += length // ratio * dim + pending * 2 * 2 * dim
    return total


# Logits.


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "sparse") for name in CASES), ("nano", "dense"), ("large top-k", "dense")]
)
@torch.no_grad()
def test_token_by_token_equals_the_whole(name: str, mode: AttentionMode) -> None:
    """And at every length the cache is as large as recipe 10 has it."""
    config, length = CASES[name]
    model, tokens = model_and_tokens(config, length)
    expected = model(tokens, attention=mode)
    cache = Cache(config)
    assert cache.bytes == 0 and cache.bytes_per_token == 0
    for t in range(length):
        found = model.decode(tokens[:, t : t + 1], cache, mode)
        assert found.shape == (2, 1, config.vocab_size)
        assert (found - expected[:, t : t + 1]).abs().max() < EXACT, t
        assert cache.length == t + 1 and cache.bytes == 2 * 8 * expected_elements(config, t + 1), t
        # Spare room is at most as much again, and no view keeps a larger tensor alive.
        assert sum(held.untyped_storage().nbytes() for held in tensors(cache)) <= 2 * cache.bytes


@pytest.mark.parametrize("name", ["window of a block", "large top-k", "blocks of one token"])
@torch.no_grad()
def test_every_step_equals_recomputation(name: str) -> None:
    """What generation did before it had a cache: the model over all tokens so far, for each new one."""
    config, length = CASES[name]
    model, tokens = model_and_tokens(config, length, batch=1)
    cache = Cache(config)
    for stop in range(1, length + 1):
        found = model.decode(tokens[:, stop - 1 : stop], cache)
        assert (found - model(tokens[:, :stop])[:, -1:]).abs().max() < EXACT, stop


@cases
@torch.no_grad()
def test_a_prompt_of_any_length(config: ModelConfig, length: int) -> None:
    """The rest in one piece: its first tokens look back across the split."""
    model, tokens = model_and_tokens(config, length)
    expected = model(tokens)
    for split in range(1, length) if length < 100 else (1, 3, 4, 5, 19, 20, 21, 126, 127, 128, 129, 130):
        cache = Cache(config)
        prompt = model.decode(tokens[:, :split], cache)
        assert sum(held.untyped_storage().nbytes() for held in tensors(cache)) == cache.bytes, "a prompt leaves no room"
        rest = model.decode(tokens[:, split:], cache, last=length)
        assert prompt.shape == (2, 1, config.vocab_size) and cache.length == length
        assert (prompt - expected[:, split - 1 : split]).abs().max() < EXACT, split
        assert (rest - expected[:, split:]).abs().max() < EXACT, split


@pytest.mark.parametrize("seed", range(9))
@torch.no_grad()
def test_random_models_in_random_pieces(seed: int) -> None:
    config = random_config(seed) if seed else pattern((4, 128), 128, 16)  # V4's
    model, tokens = model_and_tokens(config, 30 + 7 * seed if seed else 400, batch=1 + seed % 3, seed=seed)
    modes: tuple[AttentionMode, ...] = ("sparse", "dense")
    for mode in modes:
        found, _ = in_pieces(model, tokens, list(splits(tokens.shape[1], seed)), mode)
        assert (found - model(tokens, attention=mode)).abs().max() < EXACT


@torch.no_grad()
def test_the_mode_may_change_on_the_way() -> None:
    """The indexer's keys are kept in a dense stretch, too. In one layer, entries do not depend on the mode."""
    config = random_config(3, num_hidden_layers=1, layer_types=(CSA,), compress_ratios=(3,), index_topk=2)
    model, tokens = model_and_tokens(config, 40)
    cache = Cache(config)
    modes: tuple[AttentionMode, ...] = ("dense", "sparse", "dense", "sparse")
    for start, mode in zip(range(0, 40, 10), modes, strict=True):
        found = model.decode(tokens[:, start : start + 10], cache, mode, last=10)
        expected = model(tokens, attention=mode)[:, start : start + 10]
        assert (found - expected).abs().max() < EXACT
    assert relative_rms(model(tokens), model(tokens, attention="dense")) > 1e-3, "the modes differ at all"


def no_choice(config: ModelConfig) -> ModelConfig:
    """All experts, all entries: where nothing is chosen, no rounding can flip a choice."""
    return ModelConfig(**{**vars(config), "index_topk": 1000, "num_experts_per_tok": config.n_routed_experts})


@pytest.mark.parametrize("name", ["window 1", "nano", "large top-k"])
@torch.no_grad()
def test_float32(name: str) -> None:
    """The error is that of float32 sums in another order: of the size of the full pass's own, against float64.

    The factor covers that thin products are summed in another order by BLAS, with more or less luck.
    """
    config, length = CASES[name]
    exact, tokens = model_and_tokens(no_choice(config), length)
    expected = exact(tokens)
    model = random_model(exact.config, 0)
    own = relative_rms(model(tokens), expected)
    found, _ = in_pieces(model, tokens, [1] * length)
    assert found.dtype == torch.float32
    assert own < 2e-6 and relative_rms(found, expected) < 3 * own


@torch.no_grad()
def test_bfloat16_streams() -> None:
    """As above, with the streams and the cached keys in bfloat16; what compressors have pending stays float32."""
    config = no_choice(pattern((4, 16), 16, 8))
    exact, tokens = model_and_tokens(config, 60)
    model = random_model(config, 0)
    model.compute_dtype = torch.bfloat16
    own = relative_rms(model(tokens), exact(tokens))
    found, cache = in_pieces(model, tokens, [7] + [1] * 53)
    assert relative_rms(found, exact(tokens)) < 1.5 * own < 0.1
    layer = cache.layers[1]
    assert layer.window.rows is not None and layer.window.rows.dtype == torch.bfloat16
    assert layer.entries is not None and layer.entries.kv.rows is not None and layer.entries.entries.buffer is not None
    assert layer.entries.kv.rows.dtype == torch.float32 and layer.entries.entries.buffer.dtype == torch.bfloat16


@torch.no_grad()
def test_rows_do_not_mix() -> None:
    config = pattern((4, 16), 8, 3)
    model, tokens = model_and_tokens(config, 36, batch=3)
    together, _ = in_pieces(model, tokens, [20, 5, *[1] * 11])
    for row in range(3):
        alone, _ = in_pieces(model, tokens[row : row + 1], [20, 5, *[1] * 11])
        assert (together[row : row + 1] - alone).abs().max() < EXACT


def test_decoding_leaves_no_graph() -> None:
    model, tokens = model_and_tokens(pattern((4, 16), 8, 3), 20)
    found, cache = in_pieces(model, tokens, [10, 10])
    assert not found.requires_grad
    assert all(t.grad_fn is None for t in tensors(cache))


def test_another_batch_is_refused() -> None:
    """Rows would be repeated without a word, if anything of the cache broadcast."""
    model, tokens = model_and_tokens(pattern((2, 3), 1, 3), 20)
    cache = Cache(model.config)
    model.decode(tokens[:, :6], cache)
    with pytest.raises(ValueError, match="tokens have 1 rows, the cache 2"):
        model.decode(tokens[:1, 6:], cache)
    with pytest.raises(ValueError, match="no token to run"):
        model.decode(tokens[:, :0], cache)


# Sizes.


@torch.no_grad()
def test_bytes_per_token_is_what_is_added() -> None:
    config = pattern((4, 16), 8, 3)
    model, tokens = model_and_tokens(config, 96)
    cache = Cache(config)
    model.decode(tokens[:, :32], cache)
    before = cache.bytes
    model.decode(tokens[:, 32:], cache)
    assert cache.bytes_per_token == (cache.bytes - before) / 64  # whole blocks of every ratio
    half = random_model(config, 0)
    half.compute_dtype = torch.bfloat16
    _, smaller = in_pieces(half, tokens, [96])
    assert smaller.bytes_per_token == cache.bytes_per_token / 4


def test_appending_copies_little() -> None:
    """A buffer moves when it is full and then doubles: all moves together copy fewer rows than there are."""
    rows, copied, room = Growing(), 0, 0
    generator = torch.Generator().manual_seed(0)
    added = torch.randn(2, 1000, 3, generator=generator)
    for index in range(1000):
        found = rows.append(added[:, index : index + 1])
        assert rows.buffer is not None
        if rows.buffer.shape[1] != room:
            copied, room = copied + index, rows.buffer.shape[1]
    assert torch.equal(found, added)
    assert copied < 1100 and room == 1024


# Costs.


def flops(model: Transformer, tokens: Tensor, cache: Cache) -> int:
    with FlopCounterMode(display=False) as counter:
        model.decode(tokens, cache)
    return counter.get_total_flops()


@torch.no_grad()
def test_what_a_token_costs() -> None:
    """Counted products: index scores and HCA's entries alone grow with the context, by 1 / ratio (recipe 12)."""
    config = pattern((4, 16), 16, 8)
    model, tokens = model_and_tokens(config, 2048, batch=1)
    model.float()
    cache, found = Cache(config), {}
    for stop in (256, 1024, 2048):
        model.decode(tokens[:, cache.length : stop - 1], cache)
        found[stop] = flops(model, tokens[:, stop - 1 : stop], cache)
    per_index = 2 * config.index_n_heads * (config.index_head_dim + 1)  # products, and their sum over the heads
    per_entry = 4 * config.num_attention_heads * config.head_dim
    for stop in (1024, 2048):
        grown = (stop - 256) // 4 * per_index + (stop - 256) // 16 * per_entry
        assert found[stop] - found[256] == grown
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, :1024])
    assert found[1024] < 3 * counter.get_total_flops() / 1024, "a token's share of a full pass, but for thin products"


@torch.no_grad()
def test_a_piece_after_a_long_past_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of its tokens and all entries never exist at once."""
    monkeypatch.setattr(attention, "CPU_ELEMENTS", 2**13)
    monkeypatch.setattr(indexer, "CPU_ELEMENTS", 2**13)
    model, tokens = model_and_tokens(pattern((2, 16), 8, 4), 1024 + 256, batch=1)
    largest = []
    for past in (256, 1024):
        _, cache = in_pieces(model, tokens[:, :past], [past])
        with Meter() as meter:
            model.decode(tokens[:, past : past + 256], cache)
        largest.append(meter.largest)
    assert largest[1] == largest[0] < 256 * 640, "256 tokens see 640 entries"


@pytest.mark.slow
@torch.no_grad()
def test_32k() -> None:
    """A prompt of 32,768 tokens and eight more, against one pass over all of them; memory linear in the length."""
    config = random_config(
        0,
        num_hidden_layers=3,
        layer_types=(SWA, CSA, HCA),
        compress_ratios=(0, 4, 128),
        index_n_heads=2,  # many scores are exactly zero in both passes; ties have an order
        index_topk=8,
        sliding_window=16,
        n_routed_experts=3,
        num_experts_per_tok=1,
    )
    model, tokens = model_and_tokens(config, 32768 + 8, batch=1)
    peak = {}
    for length in (4096, 32768):
        cache = Cache(config)
        with Meter() as meter:
            first = model.decode(tokens[:, :length], cache)
        peak[length] = meter.peak
    assert peak[32768] < 8.2 * peak[4096]
    found = [first, *(model.decode(tokens[:, t : t + 1], cache) for t in range(32768, 32776))]
    expected = model.logits(model.run(tokens, mtp=False).streams[:, -9:])
    assert (torch.cat(found, 1) - expected).abs().max() < EXACT
    assert cache.bytes == 8 * expected_elements(config, 32776)
    with Meter() as meter:
        model.decode(tokens[:, :1], cache)
    assert meter.peak < peak[32768] / 50, "one token's step makes nothing of the size of a prompt's"


# The operations, on rows that go on with a document.


@pytest.mark.parametrize("past", [0, 1, 2, 5, 6, 7, 12, 13])
def test_geometry_is_the_tail_of_the_whole_documents(past: int) -> None:
    length = 17
    whole = find_documents(torch.zeros(2, length, dtype=torch.long))
    tail = continue_documents(torch.zeros(2, length - past, dtype=torch.long), past)
    assert torch.equal(tail.position, whole.position[:, past:]) and torch.equal(
        tail.first, whole.first[:, past:] - past
    )
    assert tail.valid.all()
    for ratio in (1, 2, 3, 6, 16, 20):
        blocks, later = find_blocks(whole, ratio), continue_blocks(tail, past, ratio)
        assert torch.equal(later.start, blocks.start - past) and torch.equal(later.chained, blocks.chained)
        assert torch.equal(later.first, blocks.first[:, past:]) and torch.equal(later.end, blocks.end[:, past:])
        for start in range(length - past):
            for stop in range(start + 1, length - past + 1):
                low, high = later.span(start, stop)
                assert low == 0 and int(later.end[:, start:stop].max()) <= high <= later.start.shape[1]


@pytest.mark.parametrize("window", [1, 4, 9, 40])
@pytest.mark.parametrize("kind", [SWA, CSA, HCA])
def test_attention_over_earlier_keys(window: int, kind: str) -> None:
    """Output and gradients are those of the whole row's last tokens; the plain reference agrees."""
    generator = torch.Generator().manual_seed(window)
    whole, past, ratio = 45, 26, 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, kv, sink, entries = draw(2, whole, 3, 6), draw(2, whole, 6), draw(3), draw(2, whole // ratio, 6)
    upper = draw(2, whole, 3, 6)
    upper[:, :past] = 0
    documents = find_documents(torch.zeros(2, whole, dtype=torch.long))
    blocks = None if kind == SWA else find_blocks(documents, ratio)
    tail = continue_documents(torch.zeros(2, whole - past, dtype=torch.long), past)
    later = None if kind == SWA else continue_blocks(tail, past, ratio)
    selected = None
    if kind == CSA and blocks is not None:
        selected = select_entries(draw(2, whole, 5, 4), draw(2, whole // ratio, 4), draw(2, whole, 5), blocks, 4)
    cached = min(past, window - 1)

    def gradients(function: object, part: bool) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (q, kv, sink, entries)]
        at, begin = (past, past - cached) if part else (0, 0)
        chosen = None if selected is None else selected[:, at:]
        first, seen = (tail.first, later) if part else (documents.first, blocks)
        known = (first, window, None if kind == SWA else leaves[3], seen, chosen)
        out, lse = function(leaves[0][:, at:], leaves[1][:, begin:], leaves[2], *known)  # type: ignore[operator]
        out.backward(upper[:, at:])
        return out[:, past - at :].detach(), lse[:, past - at :], *(t.grad for t in leaves if t.grad is not None)

    expected = gradients(hybrid_attention, part=False)
    for function in (hybrid_attention, hybrid_attention_reference):
        for ours, theirs in zip(gradients(function, part=True), expected, strict=True):
            assert relative_rms(ours, theirs) < 1e-12


@pytest.mark.parametrize("elements", [2**4, 2**9, 2**20])
def test_selection_of_a_tail(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In portions of any size, the choice of later tokens is the one they have in the whole row."""
    monkeypatch.setattr(indexer, "CPU_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(1)
    whole, ratio = 61, 3
    queries, keys, weights = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        for shape in ((whole, 24, 4), (whole // ratio, 4), (whole, 24))
    )
    blocks = find_blocks(find_documents(torch.zeros(2, whole, dtype=torch.long)), ratio)
    for k in (1, 5, 30):
        expected = select_entries(queries, keys, weights, blocks, k)
        for past in (0, 1, 2, 3, 40, 60):
            tail = continue_documents(torch.zeros(2, whole - past, dtype=torch.long), past)
            later = continue_blocks(tail, past, ratio)
            found = select_entries(queries[:, past:], keys, weights[:, past:], later, k)
            assert torch.equal(found, expected[:, past:]), (k, past)


def test_selection_of_a_tail_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token sees counts from the beginning of its document, not of the row: few tokens at a time."""
    budget, past, length, ratio = 2**13, 12_000, 64, 3
    monkeypatch.setattr(indexer, "CPU_ELEMENTS", budget)
    generator = torch.Generator().manual_seed(2)
    count = (past + length) // ratio
    queries, keys, weights = (
        torch.randn(1, *shape, generator=generator) for shape in ((length, 2, 4), (count, 4), (length, 2))
    )
    blocks = continue_blocks(continue_documents(torch.zeros(1, length, dtype=torch.long), past), past, ratio)
    with Meter() as meter:
        select_entries(queries, keys, weights, blocks, 5)
    assert count < meter.largest <= budget < length * count / 20
