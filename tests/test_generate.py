"""Sampling: the distribution of `sample`, the loop around it, and the command's text, replies and costs."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_cases import random_config, random_model
from tokenizers import Tokenizer

from openv4.data.chat import encode_prompt
from openv4.data.config import DataError
from openv4.data.tokenizer import load_tokenizer, train_tokenizer
from openv4.launch.generate import GenerateConfig, run
from openv4.model import Transformer, load_pretrained, save_pretrained
from openv4.model.cache import Cache
from openv4.model.config import AttentionMode
from openv4.model.generate import generate, sample, stream
from openv4.train.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])
DRAWS = 2000


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(random_config(7), 7)


def frequencies(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, temperature, top_p, generator) for _ in range(DRAWS)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / DRAWS


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Each frequency within five standard deviations of a binomial; what is impossible never occurs."""
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 5 * deviation).all(), (found, expected)


# The distribution.


def test_temperature_one_and_all_tokens_is_the_models_distribution() -> None:
    assert_close(frequencies(PROBABILITIES.log(), 1.0, 1.0), PROBABILITIES)
    assert_close(frequencies(PROBABILITIES.log() + 100, 1.0, 1.0), PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature: float) -> None:
    expected = PROBABILITIES ** (1 / temperature)
    assert_close(frequencies(PROBABILITIES.log(), temperature, 1.0), expected / expected.sum())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_likeliest_that_reach_it(top_p: float, kept: list[int]) -> None:
    """The smallest set of likeliest tokens whose probability is at least top_p, renormalised."""
    expected = torch.zeros(4)
    expected[kept] = PROBABILITIES[kept]
    assert_close(frequencies(PROBABILITIES.log(), 1.0, top_p), expected / expected.sum())


def test_top_p_counts_after_the_temperature() -> None:
    """At temperature 2 the likeliest token has 0.38, so a top_p of 0.45 takes a second one."""
    flat = PROBABILITIES.sqrt()
    expected = torch.zeros(4)
    expected[[1, 3]] = flat[[1, 3]]
    assert_close(frequencies(PROBABILITIES.log(), 2.0, 0.45), expected / expected.sum())


def test_greedy_takes_the_first_of_equals() -> None:
    generator = torch.Generator()
    assert sample(torch.tensor([0.0, 3.0, 1.0, 3.0]), 0.0, 1.0, generator) == 1
    state = generator.get_state()
    sample(torch.tensor([0.0, 1.0]), 0.0, 0.5, generator)
    assert torch.equal(generator.get_state(), state), "greedy draws nothing"


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-300.0, 250.0, 249.0, 0.0])
    assert {sample(logits, temperature, 1.0, generator) for _ in range(50)} == {1}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    assert_close(frequencies(logits, 1.0, 1.0), torch.tensor([0.5, 0.0, 0.5, 0.0]))
    assert sample(torch.tensor([-math.inf, -5.0]), 1.0, 0.9, torch.Generator()) == 1


def test_top_p_of_one_drops_no_token_by_rounding() -> None:
    """The float32 sum of 129,280 equal probabilities passes 1 before its end; every token must stay possible."""
    size = 129_280
    logits = torch.zeros(size)
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, 1.0, 1.0, generator) for _ in range(60)]
    assert max(drawn) > size * 0.9 and min(drawn) < size * 0.1
    peaked = 3 * torch.randn(size, generator=generator)
    order = peaked.argsort(descending=True)
    probability = peaked.softmax(-1)[order]
    lost = order[(probability.cumsum(0) - probability >= 1.0).nonzero().flatten()]
    assert len(lost) > 1000, "what a comparison with 1 would leave out"
    seen: list[torch.Tensor] = []

    def first_of(weights: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        seen.append(weights)
        return torch.tensor([0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", first_of)
        sample(peaked, 1.0, 1.0, generator)
    assert (seen[0] > 0).all()


# The loop.


def test_greedy_is_an_argmax_loop(model: Transformer) -> None:
    tokens = [0, 5, 9]
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert generate(model, [0, 5, 9], 12, temperature=0) == tokens[3:]


def test_a_seed_decides_the_text(model: Transformer) -> None:
    texts = [generate(model, [0], 12, seed=seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2] != texts[3]
    state = torch.get_rng_state()
    generate(model, [0], 3, seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(99)
    assert generate(model, [0], 12, seed=0) == texts[0], "and asked for nothing"


def test_a_shorter_text_is_the_beginning_of_a_longer_one(model: Transformer) -> None:
    assert generate(model, [3, 1], 9, seed=4)[:4] == generate(model, [3, 1], 4, seed=4)


def test_lengths(model: Transformer) -> None:
    for count in (0, 1, 5):
        assert len(generate(model, [1, 2], count)) == count
    assert all(0 <= token < model.config.vocab_size for token in generate(model, [1], 10, temperature=5.0, top_p=1.0))


def test_stop_tokens_end_the_text_and_are_left_out(model: Transformer) -> None:
    text = generate(model, [0], 12, seed=3)
    for stop in ([text[4]], [text[4], model.config.vocab_size + 5], [text[9], text[4]]):
        first = min(text.index(token) for token in stop if token in text)
        assert generate(model, [0], 12, seed=3, stop=stop) == text[:first]
    assert generate(model, [text[0], 0], 5, temperature=0, stop=range(model.config.vocab_size)) == []
    absent = next(token for token in range(model.config.vocab_size) if token not in text)
    assert generate(model, [0], 12, seed=3, stop=[absent]) == text


def test_a_prompt_may_hold_the_stop_token(model: Transformer) -> None:
    stop = 0
    assert generate(model, [stop], 3, seed=1) == generate(model, [stop], 3, seed=1, stop=[model.config.vocab_size])


def test_an_empty_prompt_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="the prompt holds no token; begin with"):
        generate(model, [], 3)


def test_a_text_ends_where_the_positions_do() -> None:
    """Beyond them the model was never trained, and what it would write is not to be trusted."""
    model = random_model(random_config(7, max_position_embeddings=8), 7)
    assert len(generate(model, [0, 1, 2], 12)) == 5
    assert generate(model, [0, 1, 2], 12) == generate(random_model(random_config(7), 7), [0, 1, 2], 5)
    assert len(generate(model, [0, 1, 2], 4)) == 4
    assert len(generate(model, [0] * 7, 12)) == 1
    for length in (8, 20):
        with pytest.raises(ValueError, match=f"a prompt of {length} tokens fills max_position_embeddings=8; shorten"):
            generate(model, [0] * length, 1)
    cache = Cache(model.config)
    model.decode(torch.tensor([[0, 1, 2, 3, 4]]), cache)
    with pytest.raises(ValueError, match="a prompt of 8 tokens"):
        list(stream(model, [5, 6, 7], 1, cache=cache))


def counted(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tokens of every run of the model to come."""
    shapes: list[tuple[int, ...]] = []
    decode = model.decode

    def counting(
        tokens: torch.Tensor, cache: Cache, attention: AttentionMode = "sparse", last: int = 1
    ) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return decode(tokens, cache, attention, last)

    monkeypatch.setattr(model, "decode", counting)
    monkeypatch.setattr(model, "run", lambda *_, **__: pytest.fail("a full pass"))
    return shapes


def test_each_new_token_is_one_run_of_one_token(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is one run, and nothing is run for the last token, which nobody continues."""
    shapes = counted(model, monkeypatch)
    generate(model, [4, 5, 6], 5)
    assert shapes == [(1, 3), (1, 1), (1, 1), (1, 1), (1, 1)]
    shapes.clear()
    generate(model, [4, 5, 6], 0)
    assert shapes == []


def test_tokens_come_as_they_are_drawn(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(model, [4, 5, 6], 5, seed=2)
    shapes = counted(model, monkeypatch)
    for index, token in enumerate(stream(model, [4, 5, 6], 5, seed=2), 1):
        assert token == expected[index - 1] and len(shapes) == index


def test_a_cache_goes_on(model: Transformer) -> None:
    """A text in two calls: the cache holds all but the last token drawn, with which the second call begins."""
    expected = generate(model, [4, 5, 6], 12, temperature=0)
    cache = Cache(model.config)
    first = list(stream(model, [4, 5, 6], 5, temperature=0, cache=cache))
    assert cache.length == 3 + 4
    second = list(stream(model, first[-1:], 7, temperature=0, cache=cache))
    assert first + second == expected and cache.length == 3 + 11


def test_dense_attention() -> None:
    """As a model of the dense stages was trained: an argmax loop over full passes in that mode."""
    model = random_model(random_config(5, index_topk=1), 5)
    texts = {}
    modes: tuple[AttentionMode, ...] = ("dense", "sparse")
    for mode in modes:
        tokens = list(range(30))
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]), attention=mode)[0, -1].argmax()))
        texts[mode] = tokens[30:]
        assert list(stream(model, range(30), 12, temperature=0, attention=mode)) == texts[mode]
    assert texts["dense"] != texts["sparse"]


def test_the_model_is_left_as_it_was(model: Transformer) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    generate(model, [0], 3)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# The command.

TEXTS = ["in the beginning was the word", "light and day and night and heaven and earth", "who said 42 to whom?"] * 3


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `openv4 export` leaves it, with a tokenizer beside it that knows the chat format's tokens."""
    folder = tmp_path_factory.mktemp("generate") / "export"
    tokenizer = train_tokenizer(TEXTS, 300)
    save_pretrained(random_model(random_config(7, vocab_size=300, max_position_embeddings=200), 7), folder, "fp32")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def output(export: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the command; what it prints, without the last newline, and the line on costs."""

    def run_command(**settings: object) -> tuple[str, str]:
        run(GenerateConfig(**({"checkpoint": str(export), "max_new_tokens": 20} | settings)))  # type: ignore[arg-type]
        out, err = capsys.readouterr()
        assert out.endswith("\n") and err.count("\n") == 1
        return out[:-1], err

    return run_command


def model_of(export: Path) -> tuple[Transformer, Tokenizer]:
    return load_pretrained(export, torch.float32), load_tokenizer(export / "tokenizer.json")


def test_the_command_prints_the_text_and_what_it_cost(export: Path, output: Callable[..., tuple[str, str]]) -> None:
    model, tokenizer = model_of(export)
    text, costs = output(prompt="light and", seed=3)
    ids = [0, *tokenizer.encode("light and").ids]
    cache = Cache(model.config)
    new = list(stream(model, ids, 20, 0.8, 0.95, 3, stop=[1], cache=cache))
    assert text == "light and" + tokenizer.decode(new)
    found = re.fullmatch(
        r"(\d+) tokens, [\d.]+ tokens/s; the cache of (\d+) tokens takes ([\d,]+) bytes, each further one ([\d,.]+) "
        r"\(in V4's FP8 and FP4: ([\d,]+) and ([\d,.]+)\)\n",
        costs,
    )
    assert found is not None, costs
    numbers = [float(number.replace(",", "")) for number in found.groups()]
    c = model.config
    kinds, still = c.kinds, c.head_dim - c.qk_rope_head_dim
    entry = math.ceil((still + 2 * c.qk_rope_head_dim + math.ceil(still / 64)) / 8) * 8
    key = math.ceil(c.index_head_dim / 2) + math.ceil(c.index_head_dim / 32)
    assert (kinds[0], kinds[3], c.compress_ratios) == ("csa", "hca", (4, 0, 0, 7, 0)), "the other layers are windows"
    per_token = (entry + key) / 4 + entry / 7
    length = len(ids) + len(new) - (len(new) == 20)
    assert numbers[:3] == [len(new), length, cache.bytes] and cache.length == length
    assert numbers[3] == pytest.approx(4 * ((c.head_dim + c.index_head_dim) / 4 + c.head_dim / 7), abs=0.05)
    assert numbers[4] == pytest.approx(4 * min(length, c.sliding_window) * entry + length * per_token, abs=0.5)
    assert numbers[5] == pytest.approx(per_token, abs=0.05)


def test_a_reply(export: Path, output: Callable[..., tuple[str, str]]) -> None:
    """What follows the prompt of the chat format; special tokens in a message stay text, unlike in a plain prompt."""
    model, tokenizer = model_of(export)
    for message in ("who said 42", "a <think> b"):
        for system in (None, "be light"):
            messages = [{"role": "system", "content": system}] if system else []
            ids = encode_prompt([*messages, {"role": "user", "content": message}], tokenizer, "none")
            assert tokenizer.token_to_id("<think>") not in ids
            new = generate(model, ids, 20, 0.8, 0.95, 0, stop=[1])
            text, _ = output(chat=True, prompt=message, system=system)
            assert text == tokenizer.decode(new, skip_special_tokens=False)


def test_reasoning_stands_before_the_answer(
    export: Path, output: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(export / "tokenizer.json")
    end = tokenizer.token_to_id("</think>")
    seen: list[list[int]] = []

    def scripted(*texts: str) -> Callable[..., list[int]]:
        ids = [[end] if text == "</think>" else tokenizer.encode(text).ids for text in texts]

        def replay(model: Transformer, prompt: list[int], *_: object, cache: Cache) -> list[int]:
            seen.append(prompt)
            return list(itertools.chain(*ids))

        return replay

    monkeypatch.setattr("openv4.launch.generate.stream", scripted("day or night", "</think>", "light"))
    assert output(chat=True, prompt="who", effort="high")[0] == "<think>day or night</think>\nlight"
    assert seen[-1] == encode_prompt([{"role": "user", "content": "who"}], tokenizer, "high")
    monkeypatch.setattr("openv4.launch.generate.stream", scripted("day or ni"))
    assert output(chat=True, prompt="who", effort="high")[0] == "<think>day or ni", "cut off while it reasons"
    assert output(chat=True, prompt="who")[0] == "day or ni"


def test_maximal_effort_needs_its_prefix(export: Path, output: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"effort=max needs the max-effort prefix.*chat_templates="):
        output(chat=True, prompt="who", effort="max")
    templates = tmp_path / "templates.json"
    templates.write_text(json.dumps({"max_effort": "heaven and earth "}))
    assert output(chat=True, prompt="who", effort="max", chat_templates=str(templates))[0].startswith("<think>")


def test_settings_of_a_chat_without_one() -> None:
    for key, value in (("effort", "high"), ("system", "be brief"), ("chat_templates", "a.json")):
        with pytest.raises(ConfigError, match=f"{key}={value} is for a chat: add chat=true"):
            GenerateConfig("a", **{key: value})  # type: ignore[arg-type]


def test_a_prompt_without_room_is_refused(output: Callable[..., tuple[str, str]]) -> None:
    with pytest.raises(ConfigError, match=r"a prompt of \d+ tokens fills model.max_position_embeddings=200"):
        output(prompt="word 12345 " * 100)
