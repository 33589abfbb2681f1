"""The benchmarks of whole training steps on a GPU (D11 to D14): a V4 of a billion parameters, a third of it active.

Steps are composed here of `training_losses`, `clip_by_global_norm` and `build_optimizers`, as in `train.loop`, which
itself needs packages that a bare machine lacks. Left out is the move of the router's biases.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from gpu_floors import Work
from gpu_passes import Numbers
from gpu_protocol import Benchmark, Case, NotHereError, Place, Target, Timer, brief
from torch import Tensor

from openv4.kernels.dispatch import Choice, using
from openv4.kernels.hyper_connection import Mixing
from openv4.model import ModelConfig, Transformer, transformer
from openv4.model.accounting import count_parameters, training_flops_per_token
from openv4.model.config import Recompute, without_mtp
from openv4.model.init import init_weights
from openv4.model.loss import Counts, training_losses
from openv4.model.moe import MoE
from openv4.model.recompute import Route
from openv4.optim.config import OptimConfig
from openv4.optim.groups import build_optimizers, clip_by_global_norm

# 1.02B parameters, 0.34B active, besides the MTP block.
CONFIG = ModelConfig(
    vocab_size=32768,
    hidden_size=2048,
    num_hidden_layers=12,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128),
    num_attention_heads=16,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=512,
    o_groups=4,
    o_lora_rank=512,
    index_n_heads=16,
    index_head_dim=64,
    index_topk=256,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_intermediate_size=320,
    num_hash_layers=2,
    max_position_embeddings=65536,
    initializer_range=0.02,
)
TOKENS = 16384  # of a micro-batch
STEP_TOKENS = 2**19  # of a step, where the optimizer's time counts
PEAK = 989e12  # bf16 of the data sheet, which MFU is measured by
LR = 1e-4


class Training:
    """A model in training, and one micro-batch of random tokens, each row a document."""

    def __init__(
        self,
        place: Place,
        config: ModelConfig,
        rows: int,
        length: int,
        recompute: Recompute = "none",
        optim: OptimConfig | None = None,
    ) -> None:
        self.place, self.config, self.length = place, config, length
        self.model = Transformer(config, torch.bfloat16, recompute=recompute)
        init_weights(self.model)
        self.model.to(place.device)
        self.optimizers = build_optimizers(
            self.model.named_parameters(), self.model.row_splits(), optim or OptimConfig()
        )
        drawn = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
        self.tokens = drawn.to(place.device)
        self.segments = torch.zeros_like(self.tokens)
        self.counts = Counts.of([self.segments])

    def loss(self) -> Tensor:
        mtp = self.config.num_nextn_predict_layers > 0
        losses = training_losses(self.model, self.tokens, self.segments, "sparse", mtp=mtp, indexer=True)
        return losses.total(self.counts, 0.3, 1e-4, 0.01)

    def micro(self, choice: Choice | None = None) -> Tensor:
        """Forward and backward of the micro-batch; gradients add up."""
        with using(choice or self.place.ours):
            loss = self.loss()
            loss.backward()
        return loss.detach()

    def forward(self) -> None:
        """Once more, without gradient, as a pass for anticipated routes does."""
        with using(self.place.ours), torch.no_grad():
            self.model.run(self.tokens, self.segments, mtp=False)

    def update(self) -> None:
        """Clip and step; gradients stay."""
        with using(self.place.ours):
            _, found_inf = clip_by_global_norm(self.model.parameters(), 1.0)
            self.optimizers.step(LR, found_inf)

    def step(self, micro_batches: int = 1) -> None:
        self.optimizers.zero_grad()
        for _ in range(micro_batches):
            self.micro()
        self.update()

    def gradient_norm(self, choice: Choice) -> tuple[Tensor, Tensor]:
        self.optimizers.zero_grad()
        loss = self.micro(choice)
        return loss, clip_by_global_norm(self.model.parameters(), torch.inf)[0]

    def check(self) -> str:
        """Loss and gradient norm against the torch path. Single gradients differ: of choices, some are close."""
        (ours, norm), (loss, wanted) = self.gradient_norm(self.place.ours), self.gradient_norm("torch")
        off, slope = (float((a - b).abs() / b.abs()) for a, b in ((ours, loss), (norm, wanted)))
        assert off < 1e-3, f"loss {float(ours):.5f}, torch's {float(loss):.5f}"
        assert slope < 0.05, f"gradient norm {float(norm):.4g}, torch's {float(wanted):.4g}"
        return f"loss {off:.0e}, gradient norm {slope:.0e} from torch"


def fitting(make: Callable[[Recompute], Training]) -> tuple[Training, Recompute]:
    """The training that keeps the most for its backward pass and still fits."""
    for mode in ("none", "selective", "full"):
        recompute: Recompute = mode  # type: ignore[assignment]
        try:
            training = make(recompute)
            training.micro()
            return training, recompute
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # not before the error, which holds on to what did not fit, is gone
    raise NotHereError("not run: a micro-batch does not fit into memory")


# Speed of a step (D11).


def step(place: Place, length: int, config: ModelConfig = CONFIG, tokens: int = TOKENS) -> Case:
    rows = max(1, tokens // length)
    training, recompute = fitting(lambda mode: Training(place, config, rows, length, mode))
    flops = training_flops_per_token(config, length, "sparse", indexer_loss=True)

    def values(timer: Timer) -> Numbers:
        micro, update = timer(training.micro), timer(training.update)
        many = max(1, STEP_TOKENS // (rows * length))
        rate = many * rows * length / (many * micro + update)
        found = {"tokens/s": rate, "MFU": rate * flops / PEAK, "update ms": update * 1e3}
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            training.step()
            found["GB"] = torch.cuda.max_memory_allocated() / 1e9
        return found | {"recompute": ("none", "selective", "full").index(recompute)}

    peers: dict[str, Callable[[], object]] = {
        "transformers, no MTP": _Peer(partial(transformers_loss, place, config, training.tokens, False)),
        "transformers, checkpointing": _Peer(partial(transformers_loss, place, config, training.tokens, True)),
        "Llama of as many active parameters": _Peer(partial(llama_loss, place, config, training.tokens)),
    }
    floor = Work(flops * rows * length, 0.0)
    return Case(training.check, training.micro, peers, floor, values)


class _Peer:
    """A model's forward and backward, made when it is first called; one that failed leaves no memory behind."""

    def __init__(self, make: Callable[[], Callable[[], Tensor]]) -> None:
        self.make, self.loss = make, None

    def __call__(self) -> None:
        self.loss = self.loss or self.make()
        try:
            self.loss().backward()
        except Exception as error:
            self.loss = None
            torch.cuda.empty_cache()
            raise RuntimeError(brief(error)) from None


def transformers_loss(place: Place, config: ModelConfig, tokens: Tensor, checkpointing: bool) -> Callable[[], Tensor]:
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    described = DeepseekV4Config(**without_mtp(config).to_json())
    torch.manual_seed(0)
    with torch.device(place.device):
        model: Any = AutoModelForCausalLM.from_config(
            described, attn_implementation="eager", experts_implementation="grouped_mm", dtype=torch.bfloat16
        )
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return lambda: model(tokens, labels=tokens, use_cache=False).loss


def llama_loss(place: Place, config: ModelConfig, tokens: Tensor) -> Callable[[], Tensor]:
    """A dense decoder through SDPA and torch.compile, as many parameters as a token of ours meets."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 3 * config.hidden_size // 4 // 128 * 128 or config.hidden_size
    count = count_parameters(config)
    layer = 4 * width**2 + 3 * width * 8 * width // 3
    layers = max(1, round((count.active + count.mtp_active - config.vocab_size * width) / layer))
    described = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        max_position_embeddings=config.max_position_embeddings,
        attn_implementation="sdpa",
    )
    with torch.device(place.device):
        model = LlamaForCausalLM(described).bfloat16().train()
    run: Any = torch.compile(model) if place.device.type == "cuda" else model
    return lambda: run(tokens, labels=tokens, use_cache=False).loss


# What a part of the recipe costs (D12).


@contextmanager
def plain_residual() -> Iterator[None]:
    """Within, a block adds its output to one stream; the model must have one."""

    def read(streams: Tensor, *_: Any) -> tuple[Tensor, Any]:
        ones = streams.new_ones(*streams.shape[:2], 1, 1)
        return streams.squeeze(2), Mixing(ones[..., 0], ones)

    def write(streams: Tensor, output: Tensor, *_: Any) -> Tensor:
        return streams + output.unsqueeze(2)

    def both(streams: Tensor, output: Tensor, mixing: Any, *projection: Any) -> tuple[Tensor, Tensor, Any]:
        new = write(streams, output)
        return new, *read(new)

    plain = {"mhc_pre": read, "mhc_post": write, "mhc_post_pre": both, "mhc_head": lambda streams, *_: streams[:, :, 0]}
    with mock.patch.multiple(transformer, **plain):
        yield


def tax(check: Callable[[], str], on: Callable[[], object], off: Callable[[], object]) -> Case:
    def values(timer: Timer) -> Numbers:
        with_it, without = timer(on), timer(off)
        return {"tax": with_it / without - 1, "with ms": with_it * 1e3, "without ms": without * 1e3}

    return Case(check, values=values)


def mhc_tax(place: Place, length: int = 4096, config: ModelConfig = CONFIG) -> Case:
    on = Training(place, config, 1, length)
    off = Training(place, replace(config, hc_mult=1), 1, length)

    def without() -> None:
        with plain_residual():
            off.micro()

    return tax(on.check, on.micro, without)


def mtp_tax(place: Place, length: int = 4096, config: ModelConfig = CONFIG) -> Case:
    on, off = (Training(place, c, 1, length) for c in (config, without_mtp(config)))
    case = tax(on.check, on.micro, off.micro)
    with_it, without = (
        training_flops_per_token(config, length, "sparse", mtp, indexer_loss=True) for mtp in (True, False)
    )
    measured = case.values

    def values(timer: Timer) -> Numbers:
        found = measured(timer)
        return {**found, "tax beyond its FLOPs": found["tax"] - (with_it / without - 1)}

    case.values = values
    return case


def qat_tax(place: Place, length: int = 4096, config: ModelConfig = CONFIG, micro_batches: int = 8) -> Case:
    """FP4 rounding of experts and indexer over FP8 training, steps of so many micro-batches."""
    try:
        from openv4.train.precision import apply_precision
    except ImportError as error:
        raise NotHereError(f"not run: {brief(error)}") from None
    on, off = (Training(place, config, 1, length) for _ in range(2))
    for training, compute in ((on, "fp4_qat"), (off, "fp8")):
        precision: Any = SimpleNamespace(compute=compute, streams="bf16", kv="plain")
        apply_precision(training.model, precision)
    return tax(on.check, partial(on.step, micro_batches), partial(off.step, micro_batches))


def muon_tax(place: Place, length: int = 4096, config: ModelConfig = CONFIG, tokens: int = STEP_TOKENS) -> Case:
    """Of Muon over AdamW in a step of ``tokens``, from the times of its parts."""
    training = Training(place, config, 1, length)
    named = dict(training.model.named_parameters())
    adamw = build_optimizers(named.items(), training.model.row_splits(), OptimConfig(matrices="adamw"))
    no = torch.zeros((), device=place.device)

    def values(timer: Timer) -> Numbers:
        times = [timer(call) for call in (training.micro, training.update, lambda: adamw.step(LR, no))]
        micro, muon, plain = times
        passes = tokens / length * micro
        return {"tax": (passes + muon) / (passes + plain) - 1, "Muon ms": muon * 1e3, "AdamW ms": plain * 1e3}

    return Case(training.check, values=values)


def anticipation_tax(place: Place, length: int = 4096, config: ModelConfig = CONFIG) -> Case:
    """Of one more forward pass, all that anticipated routes take."""
    training = Training(place, config, 1, length)

    def both() -> None:
        training.forward()
        training.micro()

    return tax(training.check, both, training.micro)


# Determinism (D13).


def determinism(place: Place, length: int = 4096, config: ModelConfig = CONFIG, steps: int = 200) -> Case:
    def trained() -> dict[str, Tensor]:
        training = Training(place, config, 1, length)
        for _ in range(steps):
            training.step()
        return {name: tensor.cpu() for name, tensor in training.model.state_dict().items()}

    def check() -> str:
        first, second = trained(), trained()
        differing = [name for name in first if not torch.equal(first[name], second[name])]
        assert not differing, f"{len(differing)} tensors differ after {steps} steps, {differing[0]} among them"
        assert all(tensor.isfinite().all() for tensor in first.values()), "weights are not finite"
        return f"two runs of {steps} steps are bit-equal"

    def values(timer: Timer) -> Numbers:
        training = Training(place, config, 1, length)
        free = timer(training.step)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        forced = timer(training.step)
        torch.use_deterministic_algorithms(False)
        return {"tax": forced / free - 1, "with ms": forced * 1e3, "without ms": free * 1e3}

    return Case(check, values=values)


# The host (D14).


def synchronisations(device: torch.device, call: Callable[[], object]) -> tuple[int, float]:
    """How often the host waits in a call, and for how many seconds the GPU works."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    events = profiler.events() or []
    waits = sum(event.name == "cudaStreamSynchronize" for event in events)
    return waits, sum(event.time_range.elapsed_us() for event in events if event.device_type == DeviceType.CUDA) / 1e6


def wall(device: torch.device, call: Callable[[], object], rounds: int = 20) -> float:
    """Seconds of a call as the host sees them, calls one after another."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    wait()
    return (time.perf_counter() - start) / rounds


def host_of_experts(place: Place, tokens: int = 4096, config: ModelConfig = CONFIG) -> Case:
    """A MoE layer, forward and backward: how often the host waits, and what is lost beside a replayed CUDA graph."""
    layer = MoE(config, hash_routed=False).to(place.device)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.normal_(0, 0.02)
    x = torch.randn(1, tokens, config.hidden_size, device=place.device, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=place.device)
    valid = torch.ones(1, tokens, dtype=torch.bool, device=place.device)

    def call() -> None:
        with using(place.ours):
            output, routing = layer(x, ids, ids, valid, Route())
            (output.float().square().sum() + routing.balance).backward()

    def check() -> str:
        call()
        assert x.grad is not None and x.grad.isfinite().all(), "the gradient is not finite"
        return "finite"

    def values(_: Timer) -> Numbers:
        waits, _busy = synchronisations(place.device, call)
        found = {"synchronisations": float(waits), "wall ms": wall(place.device, call) * 1e3}
        if place.device.type == "cuda" and not waits:
            replay = captured(call)
            graph = wall(place.device, replay) * 1e3
            found |= {"graph ms": graph, "gap": 1 - graph / found["wall ms"]}
        return found

    return Case(check, values=values)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_of_step(place: Place, length: int = 4096, config: ModelConfig = CONFIG) -> Case:
    """Of a whole micro-batch: the share of the wall time in which the GPU has nothing to do."""
    training = Training(place, config, 1, length)

    def values(_: Timer) -> Numbers:
        seconds = wall(place.device, training.micro)
        waits, busy = synchronisations(place.device, training.micro)
        return {"gap": 1 - busy / seconds, "wall ms": seconds * 1e3, "synchronisations": float(waits)}

    return Case(training.check, values=values)


def _all() -> list[Benchmark]:
    found = []
    for length, least in ((4096, 0.35), (16384, 0.30)):
        targets = [Target("MFU", least)]
        if length == 16384:
            targets += [Target(f"over {peer}", 10) for peer in ("transformers, no MTP", "transformers, checkpointing")]
        size = f"{TOKENS // length} x {length} tokens"
        build = partial(step, length=length)
        absent = ("Automodel", "torchtitan")
        found.append(Benchmark("D11 micro-batch, 1.0B / 0.34B active", size, "model", build, tuple(targets), absent))
    taxes: tuple[tuple[str, Callable[..., Case], Target], ...] = (
        ("mHC", mhc_tax, Target("tax", 0.08, False)),
        ("MTP", mtp_tax, Target("tax beyond its FLOPs", 0.02, False)),
        ("FP4 QAT over FP8, 8 micro-batches", qat_tax, Target("tax", 0.03, False)),
        ("Muon over AdamW, 0.5M tokens a step", muon_tax, Target("tax", 0.12, False)),
        ("anticipated routes, one more forward", anticipation_tax, Target("tax", 0.30, False)),
    )
    for name, build, target in taxes:
        found.append(Benchmark(f"D12 tax of {name}", "1 x 4096 tokens", "tax", build, (target,)))
    price = (Target("tax", 0.05, False),)
    found.append(Benchmark("D13 determinism, 200 steps twice", "1 x 4096 tokens", "determinism", determinism, price))
    gap = Target("gap", 0.10, False)
    waits = Target("synchronisations", 0, False)
    found.append(Benchmark("D14 host, MoE layer", "4096 tokens", "host", host_of_experts, (gap, waits)))
    found.append(Benchmark("D14 host, micro-batch", "1 x 4096 tokens", "host", host_of_step, (gap,)))
    return found


BENCHMARKS = _all()
