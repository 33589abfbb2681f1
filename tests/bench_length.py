"""The training step whose time and memory are followed over the length: 10M parameters, window/CSA/HCA/CSA layers.

Both sides: float32, batch 1, the same weights, forward, backward, and torch's fused AdamW.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_protocol import OURS, PEER, Timing, alternate, gate, peak_mb_of, resident_mb
from test_parity import their_gradient
from torch import Tensor, nn

from openv4.kernels.rope import rope_frequencies, rope_table
from openv4.model import ModelConfig, Transformer, save_pretrained
from openv4.model.config import Recompute
from openv4.model.init import init_weights
from openv4.model.loss import training_losses
from openv4.model.recompute import Route

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 128, 4),
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    sliding_window=64,
    index_n_heads=16,  # with few, scores are often exactly zero, and the two sides break such ties differently
    index_head_dim=32,
    index_topk=64,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    num_hash_layers=1,
    num_nextn_predict_layers=0,  # transformers has no MTP block
    max_position_embeddings=32768,
    initializer_range=0.02,
)
CHECKPOINTED = f"{PEER}, checkpointing"
EXPERTS_LENGTH = 512  # where transformers' two implementations of the experts are compared
WARM_UP_LENGTH = 128  # one entry of each compressed layer


def export(folder: Path) -> Path:
    """The weights of both sides, as a release that transformers loads."""
    if not folder.exists():
        save_pretrained(our_model("none"), folder, "fp32")
    return folder


def our_model(recompute: Recompute) -> Transformer:
    model = Transformer(CONFIG, recompute=recompute)
    init_weights(model)
    return model.train()


def their_model(folder: Path, experts: str) -> nn.Module:
    """transformers refuses every attention implementation but eager for this model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation=experts, dtype=torch.float32
    )
    return model.train()


def text(length: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


def our_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    assert isinstance(model, Transformer)
    return training_losses(model, tokens, torch.zeros_like(tokens), mtp=False).main / (tokens.shape[1] - 1)


def their_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(tokens, labels=tokens, use_cache=False).loss
    return loss


def training_step(
    model: nn.Module, loss_of: Callable[[nn.Module, Tensor], Tensor], lr: float = 1e-4
) -> Callable[[Tensor], Tensor]:
    """A function of the tokens that trains one step and returns the loss; gradients stay until the next."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step(tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@cache
def fastest_experts(folder: Path) -> tuple[str, dict[str, Timing]]:
    """transformers' faster implementation of the experts, and the timings that say so."""
    tokens = text(EXPERTS_LENGTH)
    steps = {name: training_step(their_model(folder, name), their_loss) for name in ("grouped_mm", "eager")}
    timings = alternate({name: partial(step, tokens) for name, step in steps.items()}, rounds=3)
    return min(timings, key=lambda name: timings[name].median_s), timings


@cache
def step_times(length: int, folder: Path, with_peer: bool) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Timings of each arm at one length, and their losses before and after the timed steps.

    One step warms up; with the peer it is compared, and for this step alone ``aligned``.
    """
    tokens = text(length)
    model = our_model("none")
    steps = {OURS: training_step(model, our_loss)}
    if with_peer:
        peer = their_model(folder, fastest_experts(folder)[0])
        steps[PEER] = training_step(peer, their_loss)
        with aligned(peer) as differing:
            losses = {name: step(tokens) for name, step in steps.items()}
        checks: dict[str, Any] = gate((losses[OURS], losses[PEER]), gradient_pairs(model, peer))
        checks["tokens_that_chose_otherwise"] = differing
    else:
        losses = {OURS: steps[OURS](tokens)}
        checks = {}
    checks["first_loss"] = {name: float(loss) for name, loss in losses.items()}

    def turn(name: str) -> None:
        losses[name] = steps[name](tokens)

    timings = alternate({name: partial(turn, name) for name in steps}, warm_up=False)
    return timings, checks | {"last_loss": {name: float(loss) for name, loss in losses.items()}}


@contextmanager
def aligned(peer: nn.Module) -> Iterator[list[int]]:
    """While it lasts, transformers takes the experts and entries that our last pass chose, and exact rotary angles.

    Its own angles are float32 products, off by 6e-8 of the position: at 4096 tokens its gradient is 2e-5 from that of a
    float64 model, ours 1e-6 (measured). And of thousands of choices a few are between scores equal to rounding; one
    token that chooses otherwise moves the gradient by up to a percent. Yields, for each layer that chooses, the number
    of tokens whose own choice was another.
    """
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

    choices: list[Tensor] = []
    differing: list[int] = []

    def replay(chosen: Tensor) -> Tensor:
        ours = choices.pop(0).view_as(chosen)
        differing.append(int((ours.sort(-1).values != chosen.sort(-1).values).any(-1).sum()))
        return ours

    def route(router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, chosen = output
        ids = replay(chosen)
        weights = router.score_fn(logits).gather(1, ids)
        return logits, weights / (weights.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor, ids

    def rotate(rotary: nn.Module, _: Any, call: dict[str, Any], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        theta = rotary.config.rope_parameters[call["layer_type"]]["rope_theta"]
        return rope_table(call["position_ids"], rope_frequencies(2 * output[0].shape[-1], theta))

    def record(route: Route, name: str, choose: Callable[..., Tensor], *arguments: Any) -> Tensor:
        choice: Tensor = recall(route, name, choose, *arguments)
        if name in ("experts", "entries"):  # the balance loss chooses as well; it is not compared
            choices.append(choice)
        return choice

    recall, hooks = Route.recall, []
    for module in peer.modules():
        if isinstance(module, theirs.DeepseekV4Indexer):
            hooks.append(module.register_forward_hook(lambda _, inputs, selected: replay(selected)))
        elif isinstance(module, theirs.DeepseekV4TopKRouter):
            hooks.append(module.register_forward_hook(route))
        elif isinstance(module, theirs.DeepseekV4RotaryEmbedding):
            hooks.append(module.register_forward_hook(rotate, with_kwargs=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "recall", record)
        yield differing
    assert differing and not choices, "the two sides make different numbers of choices"
    for hook in hooks:
        hook.remove()


def gradient_pairs(model: nn.Module, peer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Our gradient beside transformers', for each of our parameters; no gradient counts as zero."""
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    pairs = []
    for name, parameter in model.named_parameters():
        gradients = parameter.grad, their_gradient(theirs, name, CONFIG.moe_intermediate_size)
        ours, other = (torch.zeros_like(parameter) if g is None else g for g in gradients)
        pairs.append((ours, other))
    return pairs


def peak_of_step(arm: str, length: int, folder: Path, experts: str) -> dict[str, float]:
    """Memory of one training step; to be run in a process of its own.

    ``total_mb`` is the peak above what was resident once the libraries were imported: weights, gradients, AdamW's state
    and activations. ``activation_mb`` is the peak above what was resident after a short step: what grows with length.
    The learning rate is 0, so that the short step leaves the loss comparable.
    """
    if arm == OURS:
        imported = resident_mb()
        step = training_step(our_model("full"), our_loss, lr=0.0)
    else:
        from transformers.models.deepseek_v4 import modeling_deepseek_v4  # noqa: F401  # part of the libraries

        imported = resident_mb()
        model = their_model(folder, experts)
        if arm == CHECKPOINTED:
            model.activation_checkpointing_enable()
        step = training_step(model, their_loss, lr=0.0)
    step(text(WARM_UP_LENGTH))
    ready, tokens, losses = resident_mb(), text(length), []
    start = time.perf_counter()
    peak = peak_mb_of(lambda: losses.append(float(step(tokens))))
    seconds = time.perf_counter() - start
    return {"total_mb": peak - imported, "activation_mb": peak - ready, "seconds_once": seconds, "loss": losses[0]}
