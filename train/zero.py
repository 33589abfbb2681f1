"""AdamW whose state DeepSpeed's ZeRO partitions, for runs in which nothing is Muon's: adapters, or `matrices=adamw`.

Stage 1 partitions optimizer state and float32 weights, stage 2 gradients as well. The engine reduces gradients and
steps; the gradient's norm and clipping are ours, because its own takes norms of different experts for one another.
"""

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor

from ..optim.groups import Optimizers, clip_gradients


class ZeroOptimizers(Optimizers):
    """The same as ``Optimizers`` on parameters that all processes hold whole; only their state is partitioned.

    Each method is called by all processes together. A parameter without a gradient counts as one with a gradient of
    zero (``train.config`` refuses runs where that matters).

    Args:
        plain: the optimizers of one process; engine: DeepSpeed's, whose optimizer was made of ``grouped(plain)``.
    """

    def __init__(self, plain: Optimizers, engine: Any) -> None:
        super().__init__(plain.parameters, plain.groups, None, plain.adamw, total=plain.total)
        self._engine, self._zero = engine, engine.optimizer
        self._linked = False

    def clip(self, max_norm: float) -> tuple[Tensor, Tensor]:
        parts = [part for group in self._zero.averaged_gradients.values() for part in group or ()]
        return clip_gradients(parts, max_norm, self.total)

    def step(self, lr: float, found_inf: Tensor) -> None:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._zero.optimizer.found_inf = (found_inf != 0).to(torch.float32)
        self._engine.step()
        for parameter in self.parameters.values():  # written to through flat buffers, which nothing counts
            torch.autograd.graph.increment_version(parameter)

    def zero_grad(self) -> None:
        """The engine's step has done it."""

    def _state(self, name: str) -> dict[str, Tensor]:
        parameter = self.parameters[name]
        states = self._zero.optimizer.state
        if not states:
            return {}
        if not self._linked:
            self._link()
        whole = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")}
        return whole | {"step": states[self._partition_of(parameter)]["step"].clone()}  # one for a group of parameters

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._check_state_tensors(tensors)
        self._zero.refresh_fp32_params()  # the model's weights were read before
        if not tensors:
            return
        for partition in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
        self._link()
        for name, parameter in self.parameters.items():
            if f"step.{name}" in tensors:
                step = self._zero.optimizer.state[self._partition_of(parameter)]["step"]
                step.copy_(torch.maximum(step, tensors[f"step.{name}"].to(step.device)))
                for kind in ("exp_avg", "exp_avg_sq"):
                    safe_set_full_optimizer_state(parameter, tensors[f"{kind}.{name}"].to(parameter.device), kind)

    def _link(self) -> None:
        """Lets DeepSpeed find the states of parameters. It does so itself after its first group of parameters has been
        updated, when the others have no state yet."""
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()
        self._linked = True

    def _partition_of(self, parameter: Tensor) -> Tensor:
        """This process's part of the group of parameters to which one belongs."""
        for group, partition in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
            if any(each is parameter for each in group):
                found: Tensor = partition
                return found
        raise KeyError("a parameter that DeepSpeed does not know")


def grouped(plain: Optimizers) -> torch.optim.AdamW:
    """An AdamW like that of ``plain``, whose groups tell DeepSpeed which parameters are of experts."""
    assert plain.adamw is not None and plain.muon is None
    groups: list[dict[str, Any]] = []
    for options in plain.adamw.param_groups:
        kinds: dict[str | None, list[Tensor]] = {}
        for parameter in options["params"]:
            kinds.setdefault(getattr(parameter, "group_name", None), []).append(parameter)
        for name, parameters in kinds.items():
            experts = {} if name is None else {"moe": True, "name": name}
            groups.append({"params": parameters, "weight_decay": options["weight_decay"], **experts})
    defaults = plain.adamw.defaults
    return torch.optim.AdamW(groups, lr=0.0, betas=defaults["betas"], eps=defaults["eps"], fused=True)
