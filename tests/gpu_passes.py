"""What the GPU benchmarks of operations share: random tensors, and the passes of an operation by any implementation."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from gpu_floors import Work
from gpu_protocol import Benchmark, Case, NotHereError, Place, Target, Timer, agreement
from torch import Tensor

from openv4.kernels.dispatch import Choice, using

# Both sides round what they hand on to bf16 (1.7e-3 relative rms), a few times in a row; TF32 rounds by 5e-4.
TOLERANCE = 2e-2
Numbers = Mapping[str, float]


def operation(module: str, name: str) -> Callable[..., Any]:
    """A public function of ours by its name, so that one that is missing costs its own benchmark only."""
    try:
        found: Callable[..., Any] = getattr(import_module(f"openv4.{module}"), name)
    except (ImportError, AttributeError):
        raise NotHereError(f"not run: there is no {module}.{name}") from None
    return found


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


class Draw:
    """Random tensors of a place, the same for the same seed."""

    def __init__(self, place: Place, seed: int = 0) -> None:
        self.device = place.device
        self.generator = torch.Generator(place.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).mul_(scale).to(dtype)

    def float32(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, scale=scale, dtype=torch.float32)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, device=self.device)


def flat(results: Any) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results or () for tensor in flat(part)] if isinstance(results, tuple | list) else []


class Passes:
    """One operation on fixed inputs: forward, backward for fixed gradients of its outputs, by any implementation.

    Args:
        learned: names of the inputs whose gradients are wanted.
    """

    def __init__(self, function: Callable[..., Any], inputs: Mapping[str, Any], learned: Sequence[str] = ()) -> None:
        self.function, self.learned = function, list(learned)
        self.inputs = dict(inputs) | {name: inputs[name].detach().requires_grad_() for name in learned}
        self.slopes: list[Tensor] | None = None

    def forward(self, choice: Choice) -> list[Tensor]:
        with using(choice):
            return flat(self.function(**self.inputs))

    def gradients(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        moved = [x for x in outputs if x.requires_grad]
        if self.slopes is None:
            self.slopes = [torch.randn_like(x) for x in moved]
        leaves = [self.inputs[name] for name in self.learned]
        return torch.autograd.grad(moved, leaves, self.slopes, retain_graph=True, allow_unused=True)

    def backward(self, choice: Choice) -> Callable[[], tuple[Tensor, ...]]:
        """To be called again and again: the forward pass is run the first time only."""
        kept: list[Tensor] = []

        def call() -> tuple[Tensor, ...]:
            kept.extend([] if kept else self.forward(choice))
            return self.gradients(kept)

        return call

    def results(self, choice: Choice, backward: bool) -> dict[str, Tensor]:
        outputs = self.forward(choice)
        found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
        if backward:
            gradients = zip(self.learned, self.gradients(outputs), strict=True)
            found |= {f"gradient of {name}": value for name, value in gradients if value is not None}
        return found

    def agree(self, place: Place, backward: bool, tolerance: float = TOLERANCE) -> str:
        """Ours against torch's, and ours against itself, bit for bit."""
        found = self.results(place.ours, backward)
        told = agreement(found, self.results("torch", backward), tolerance, "torch")
        agreement(self.results(place.ours, backward), found, 0, "the first of two runs")
        return f"{told}, deterministic"

    def case(
        self,
        place: Place,
        backward: bool,
        floor: Work,
        others: Mapping[str, Callable[..., Any]] | None = None,
        tolerance: float = TOLERANCE,
        values: Callable[[Timer], Numbers] = lambda _: {},
    ) -> Case:
        """Times one direction; ``others``: further functions of the same inputs, beside our torch path."""
        arms = {"torch": self} | {name: Passes(f, self.inputs, self.learned) for name, f in (others or {}).items()}

        def timed(passes: Passes, choice: Choice) -> Callable[[], object]:
            return passes.backward(choice) if backward else partial(passes.forward, choice)

        peers = {name: timed(passes, "torch") for name, passes in arms.items()}
        return Case(lambda: self.agree(place, backward, tolerance), timed(self, place.ours), peers, floor, values)


def extra_mb(place: Place, call: Callable[[], object]) -> float:
    """Peak of allocated memory above what there was, 10^6 bytes; 0 where nothing counts it."""
    if place.device.type != "cuda":
        call()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def share_of_floor(least: float, *more: Target) -> tuple[Target, ...]:
    return (Target("share", least), *more)


def directions(
    name: str, size: str, group: str, build: Callable[..., Case], least: tuple[float, float], absent: Sequence[str]
) -> list[Benchmark]:
    """The forward and the backward benchmark of an operation."""
    return [
        Benchmark(
            f"{name}, {'backward' if backward else 'forward'}",
            size,
            group,
            partial(build, backward=backward),
            share_of_floor(least[backward]),
            tuple(absent),
        )
        for backward in (False, True)
    ]
