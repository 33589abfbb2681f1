"""Steps of training on several processes, one of which computes wrongly; and what the others say to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import parallel_cases
import torch
from model_cases import random_model
from parallel_cases import Case
from torch import Tensor, nn

from openv4.train.config import IntegrityError, ParallelConfig, PrecisionConfig, StabilityConfig
from openv4.train.integrity import IntegrityChecks
from openv4.train.loop import loss_alone, training_step
from openv4.train.parallel import Alone, Together

# What a repetition must not touch: gradients on their way, rounded by random numbers, or in DeepSpeed's hands.
UNTOUCHED = [
    Case("plain", seed=31, gradients="bf16"),
    Case("experts", expert=2, seed=32, rows=6, recompute="full"),
    Case("zero2", expert=2, seed=35, matrices="adamw", zero=2, rows=6, clip=0.5),
]


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flips a bit of a tensor, in place; two bytes make one number of four here."""
    with torch.no_grad():
        tensor.view(-1).view(torch.int32)[element] ^= 1 << bit if bit < 31 else -(2**31)


def fault(model: nn.Module, wrong: Callable[[int], bool]) -> None:
    """From now on passes that `wrong` names by their number are off by a last bit or two, each by another amount."""
    passes = 0

    def add(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return output * (1 + 2e-7 * passes) if wrong(passes) else output

    model.get_submodule("norm").register_forward_hook(add)


def flipped(expert: int, name: str, when: int, precision: PrecisionConfig | None = None) -> str:
    """What a process is told after six steps, in one of which a bit of rank 1's tensor changes. With ``precision``,
    owners alone have float32 weights."""
    model, processes, checks, step = _begin(expert, StabilityConfig(check_every=2))
    if precision is not None:
        processes.set_precision(model, precision)
    try:
        for number in range(6):
            checks.before_step(number, lambda: torch.zeros(()))
            if number == when and processes.rank == 1:
                flip(dict(processes.copies(model))[name], 3, 4)
            step()
    except IntegrityError as error:
        return str(error)
    return ""


def wrong(expert: int, number: int | None) -> tuple[str, list[tuple[str, str]]]:
    """The error and the events of a process, where rank 1 computes one of its passes wrongly, or all (None)."""
    model, processes, checks, _ = _begin(expert, StabilityConfig(check_every=0, replay_every=3))
    told = checks.tell.args[0]  # type: ignore[attr-defined]
    if processes.rank == 1:
        fault(model, lambda passes: number in (None, passes))
    batch, plan = parallel_cases.Batch(*_tokens(model), ()), parallel_cases.plan()
    try:
        for step in range(3):
            checks.before_step(step, partial(loss_alone, model, batch, plan))
    except IntegrityError as error:
        return str(error), told
    return "", told


def _tokens(model: Any) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(48).view(2, 24).remainder(model.config.vocab_size)
    return tokens, torch.zeros_like(tokens)


def _begin(expert: int, config: StabilityConfig) -> tuple[Any, Alone, IntegrityChecks, Callable[[], None]]:
    case = Case("", expert=expert, seed=36, model={"num_hash_layers": 0})
    processes = Together(ParallelConfig(expert=expert), 0, torch.device("cpu"))
    model = random_model(case.config, case.seed)
    processes.spread(model)
    optimizers = processes.optimizers(model, parallel_cases.OptimConfig())
    told: list[tuple[str, str]] = []
    checks = IntegrityChecks(config, model, processes, partial(_append, told))
    batch, plan = parallel_cases.Batch(*_tokens(model), ()), parallel_cases.plan()
    return model, processes, checks, lambda: training_step(model, optimizers, [batch], plan, 1.0, False, processes)  # type: ignore[return-value]


def _append(told: list[tuple[str, str]], kind: str, text: str) -> None:
    told.append((kind, text))


def replayed(model: Any, optimizers: Any, batches: Any, plan: Any, clip: Any, due: bool, processes: Alone) -> Any:
    """A training step, its first micro-batch computed twice before."""
    checks = IntegrityChecks(StabilityConfig(check_every=1, replay_every=1), model, processes, print)
    state = torch.get_rng_state()
    checks.before_step(processes.steps, partial(loss_alone, model, batches[0], plan))
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    return training_step(model, optimizers, batches, plan, clip, due, processes)


def run_all() -> dict[str, Any]:
    """In a process of a world of two."""
    torch.use_deterministic_algorithms(True)
    untouched = {}
    for case in UNTOUCHED:
        config = ParallelConfig(
            expert=case.expert, context=case.context, gradients=case.gradients, bucket_mb=0.02, zero=case.zero
        )
        both = []
        for step in (training_step, replayed):
            parallel_cases.training_step = step
            both.append(parallel_cases.run(case, Together(config, case.seed, torch.device("cpu"))))
        parallel_cases.training_step = training_step
        untouched[case.name] = [name for name, value in both[0].items() if not torch.equal(value, both[1][name])]
    return {
        "untouched": untouched,
        "weight": flipped(1, "layers.0.attn.wq_a.weight", 4),
        "bf16 weight": flipped(1, "layers.0.attn.wq_a.weight", 4, PrecisionConfig("bf16", "bf16")),
        "sent again": flipped(1, "layers.0.attn.wq_a.weight", 3),
        "bias": flipped(2, "layers.0.ffn.gate.bias", 3),
        "expert": flipped(2, "layers.0.ffn.experts.w1", 4),
        "transient": wrong(1, 2),
        "late": wrong(1, 1),
        "persistent": wrong(1, None),
        "shared": wrong(2, None),
    }
