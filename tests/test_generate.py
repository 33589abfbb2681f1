"""Sampling: the distribution of `sample`, and the loop around it."""

import math

import pytest
import torch
from model_cases import random_config, random_model

from openv4.model import Transformer
from openv4.model.generate import generate, sample

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


def test_a_text_longer_than_the_positions_goes_on_from_its_end() -> None:
    model = random_model(random_config(7, max_position_embeddings=8), 7)
    prompt = [(7 * index) % model.config.vocab_size for index in range(20)]
    tokens = list(prompt)
    for _ in range(10):
        tokens.append(int(model(torch.tensor([tokens[-8:]]))[0, -1].argmax()))
    assert generate(model, prompt, 10, temperature=0) == tokens[20:]
    assert len(generate(model, [0], 12)) == 12


def test_the_model_is_left_as_it_was(model: Transformer) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    generate(model, [0], 3)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
