"""Which parameter goes to which optimizer, and the two optimizers as one.

The rule is the paper's: AdamW for the embedding, the prediction head, the static biases and gates of mHC and every
RMSNorm weight; Muon for all other modules, read literally: router, compressors, indexer and mHC projections included.
Vectors (attention sinks) have no matrix to orthogonalise and go to AdamW. So do the compressors' position biases `ape`,
[r, C] tables of biases: our choice, the paper does not say. The factors of LoRA adapters, whose product is what acts,
go to AdamW as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import Parameter

from .config import OptimConfig
from .exchange import Exchange
from .muon import Muon, momentum_dtype

EMBEDDING, LORA, EXPERTS = "embedding and head", "LoRA adapters", "routed experts"
# In the order of the table. An optimizer owns whole groups.
ADAMW_GROUPS = (
    EMBEDDING,
    "norms",
    "mHC biases and gates",
    "attention sinks",
    "compressor positions",
    "other vectors",
    LORA,
)
MUON_GROUPS = (
    "attention",
    "compressor",
    "indexer",
    "router",
    EXPERTS,
    "shared expert",
    "mHC projections",
    "MTP projections",
    "other matrices",
)


@dataclass(frozen=True)
class GroupRow:
    """One row of the table shown at start.

    Attributes:
        group: the group's name.
        optimizer: `Muon` or `AdamW`.
        tensors: number of tensors.
        matrices: number of logical matrices that are orthogonalised; 0 for AdamW.
        parameters: number of elements.
        shapes: the distinct shapes, in order of appearance.
    """

    group: str
    optimizer: str
    tensors: int
    matrices: int
    parameters: int
    shapes: tuple[tuple[int, ...], ...]


def group_of(name: str, ndim: int) -> str:
    """The group of a parameter, by its released name and its number of dimensions.

    Muon owns it if the answer is in `MUON_GROUPS`, AdamW if it is in `ADAMW_GROUPS`.
    """
    path = name.split(".")
    module = path[-2] if path[-1] == "weight" and len(path) > 1 else path[-1]
    if "lora" in path:
        return LORA
    if module in ("embed", "head"):
        return EMBEDDING
    if module.endswith("norm"):
        return "norms"
    if module.startswith("hc_") and module.endswith(("_base", "_scale")):
        return "mHC biases and gates"
    if module == "attn_sink":
        return "attention sinks"
    if module == "ape":
        return "compressor positions"
    if ndim < 2:
        return "other vectors"
    if module.startswith("hc_"):
        return "mHC projections"
    if module in ("e_proj", "h_proj"):
        return "MTP projections"
    # Outermost last: an indexer holds a compressor, attention holds both.
    for part, group in (
        ("indexer", "indexer"),
        ("compressor", "compressor"),
        ("attn", "attention"),
        ("gate", "router"),
        ("experts", EXPERTS),
        ("shared_experts", "shared expert"),
    ):
        if part in path:
            return group
    return "other matrices"


# The sum of a tensor over all processes; alone it is the tensor.
Total = Callable[[Tensor], Tensor]


class Optimizers:
    """Muon and AdamW over disjoint named parameters, stepped, saved and measured together. `build_optimizers` makes it.

    Among many processes the parameters are the shards that this one owns; `clip`, `step` and `update_rms` are then
    called by all of them together.

    Attributes:
        parameters: by released name, those that are trained here.
        groups: the names of the parameters in each group, in the order of the table.
        muon: None if no parameter belongs to it.
        adamw: None if no parameter belongs to it.
        total: sums over all processes.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        groups: Mapping[str, list[str]],
        muon: Muon | None,
        adamw: torch.optim.AdamW | None,
        exchanges: Sequence[Exchange] = (),
        total: Total = lambda numbers: numbers,
    ) -> None:
        self.groups = dict(groups)
        self.muon = muon
        self.adamw = adamw
        self._exchanges, self.total = tuple(exchanges), total
        self.parameters = dict(parameters)
        self._group = {name: group for group, names in groups.items() for name in names}

    def clip(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """`clip_by_global_norm` of the gradients, which go to their owners first; each counts once in the norm."""
        for exchange in self._exchanges:
            exchange.collect()
        return clip_by_global_norm(self.parameters.values(), max_norm, self.total)

    def step(self, lr: float, found_inf: Tensor) -> None:
        """Update all parameters that have a gradient.

        Args:
            lr: learning rate of both optimizers.
            found_inf: 0-dim float tensor; where it is not 0, no weight and no state changes, bit for bit. It is not
                read on the host.
        """
        # torch's kernel skips at exactly 1, but takes the value itself back from its step count: a sum over ranks
        # would update the weights with NaN.
        found_inf = (found_inf != 0).to(torch.float32)
        for optimizer in (self.muon, self.adamw):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.found_inf = found_inf  # type: ignore[union-attr]
                optimizer.step()
        for exchange in self._exchanges:
            exchange.publish()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def update_rms(self) -> dict[str, Tensor]:
        """RMS over each group of the last update before the learning rate and without decay: 0-dim, on the device.

        AdamW's is computed from its state, so that after a skipped step it is the one of the step before; Muon's is
        then 0. A group that has never had a gradient (Muon: that had none in the last step) is left out.
        """
        found: dict[str, tuple[Tensor, int] | None] = {}
        for group in (*ADAMW_GROUPS, *MUON_GROUPS):  # in every process the same, whatever it owns
            names = self.groups.get(group, [])
            if names and self._is_muons(group):
                assert self.muon is not None
                found[group] = self.muon.square_sum(*(self.parameters[name] for name in names))
            else:
                found[group] = self._adamw_square_sum(names) if names else None
        return self._root_means(found)

    @torch.no_grad()
    def residuals(self) -> dict[str, Tensor]:
        """By group of Muon's matrices the root mean of `Muon.residual_sum` in the last step: 0-dim, on the device."""
        found: dict[str, tuple[Tensor, int] | None] = {}
        for group in MUON_GROUPS:
            parameters = [self.parameters[name] for name in self.groups.get(group, [])]
            found[group] = self.muon.residual_sum(*parameters) if self.muon is not None else None
        return self._root_means(found)

    def _root_means(self, found: Mapping[str, tuple[Tensor, int] | None]) -> dict[str, Tensor]:
        """Roots of means, over all processes, from sums and counts of this one."""
        device = next((parameter.device for parameter in self.parameters.values()), None)
        empty = torch.zeros((), device=device)
        sums = torch.stack([empty if pair is None else pair[0].float() for pair in found.values()])
        counts = torch.tensor([0 if pair is None else pair[1] for pair in found.values()], device=device)
        sums, counts = self.total(sums), self.total(counts)
        known = [group for group, count in zip(found, counts.tolist(), strict=True) if count]
        return {group: rms for group, rms in zip(found, (sums / counts).sqrt(), strict=True) if group in known}

    def table(self) -> list[GroupRow]:
        """One row per group that has parameters."""
        matrices: dict[Tensor, int] = {}
        for options in self.muon.param_groups if self.muon else ():
            for parameter in options["params"]:
                matrices[parameter] = prod(parameter.shape[:-2]) * max(1, len(options["row_splits"]))
        rows = []
        for group, names in self.groups.items():
            parameters = [self.parameters[name] for name in names]
            row = GroupRow(
                group=group,
                optimizer="Muon" if self._is_muons(group) else "AdamW",
                tensors=len(parameters),
                matrices=sum(matrices.get(parameter, 0) for parameter in parameters),
                parameters=sum(parameter.numel() for parameter in parameters),
                shapes=tuple(dict.fromkeys(tuple(parameter.shape) for parameter in parameters)),
            )
            rows.append(row)
        return rows

    def state_tensors(self) -> dict[str, Tensor]:
        """All state by name, not copied: `momentum.<name>`; `exp_avg.<name>`, `exp_avg_sq.<name>`, 0-dim `step.<name>`.

        A parameter that has never had a gradient has no state.
        """
        return {f"{kind}.{name}": tensor for name in self.parameters for kind, tensor in self._state(name).items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all state by copies of `tensors`, which `state_tensors` returned; training goes on bit for bit.

        Raises:
            ValueError: a tensor is unknown, has another shape or dtype, or is missing beside others of its parameter.
                Nothing has been changed then.
        """
        layouts = self._check_state_tensors(tensors)
        for name, parameter in self.parameters.items():
            state = self._optimizer(name).state
            state.pop(parameter, None)
            loaded = {kind: tensors[f"{kind}.{name}"] for kind in layouts[name] if f"{kind}.{name}" in tensors}
            if loaded:
                state[parameter] = {kind: t.to(parameter.device, copy=True) for kind, t in loaded.items()}

    def _check_state_tensors(
        self, tensors: Mapping[str, Tensor]
    ) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
        """The layout of each parameter's state; raises as `load_state_tensors` does."""
        layouts = {name: self._layout(name) for name in self.parameters}
        expected = {f"{kind}.{name}": like for name, layout in layouts.items() for kind, like in layout.items()}
        problems = [f"unexpected {key}" for key in tensors if key not in expected]
        for name, layout in layouts.items():
            keys = [f"{kind}.{name}" for kind in layout]
            if any(key in tensors for key in keys):
                problems += [f"missing {key}" for key in keys if key not in tensors]
        for key, (shape, dtype) in expected.items():
            if key in tensors and (tuple(tensors[key].shape), tensors[key].dtype) != (shape, dtype):
                found = _describe(tensors[key].shape, tensors[key].dtype)
                problems.append(f"{key} is {found}, not {_describe(shape, dtype)}")
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"optimizer state does not fit the model and its groups: {'; '.join(problems[:8])}{more}")
        return layouts

    def _is_muons(self, group: str) -> bool:
        return self.muon is not None and group in MUON_GROUPS

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        owner = self.muon if self._is_muons(self._group[name]) else self.adamw
        assert owner is not None
        return owner

    def _state(self, name: str) -> dict[str, Tensor]:
        # `get`, because the state is a defaultdict: looking must not make an entry.
        state: dict[str, Tensor] = self._optimizer(name).state.get(self.parameters[name], {})
        return state

    def _layout(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        parameter = self.parameters[name]
        shape = tuple(parameter.shape)
        if self._is_muons(self._group[name]):
            return {"momentum": (shape, momentum_dtype(parameter))}
        moment = (shape, parameter.dtype)
        return {"exp_avg": moment, "exp_avg_sq": moment, "step": ((), torch.float32)}

    def _adamw_square_sum(self, names: list[str]) -> tuple[Tensor, int] | None:
        assert self.adamw is not None
        defaults = self.adamw.defaults
        (beta1, beta2), eps = defaults["betas"], defaults["eps"]
        square_sums, count = [], 0
        for name in names:
            if state := self._state(name):
                step = state["step"].clamp_min(1)  # 0 if the first step was skipped; the moments are 0 then
                root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(eps)
                square_sums.append((state["exp_avg"] / (1 - beta1**step)).div_(root).square_().sum())
                count += root.numel()
        return (torch.stack(square_sums).sum(), count) if square_sums else None


def build_optimizers(
    named_parameters: Iterable[tuple[str, Parameter]],
    row_splits: Mapping[str, tuple[int, ...]],
    config: OptimConfig,
    exchanges: Sequence[Exchange] = (),
    total: Total = lambda numbers: numbers,
) -> Optimizers:
    """Sort the parameters into groups and make the optimizer of each.

    Args:
        named_parameters: released name and parameter; those that need no gradient are left out.
        row_splits: for parameters whose rows are several logical matrices, the rows of each, e.g.
            `{"layers.0.hc_attn_fn": (4, 4, 16)}`; all others are one matrix (per leading index).
        config: the constants of both.
        exchanges: among many processes, what brings gradients here and weights from here; the parameters are its
            shards. total: sums over all processes.

    Raises:
        ValueError: `row_splits` names no parameter, or one that AdamW owns, or does not add up to the rows.
    """
    named = dict(named_parameters)
    if unknown := [name for name in row_splits if name not in named]:
        raise ValueError(f"row_splits: no parameter is named {', '.join(unknown)}; the names are the released ones")
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    groups: dict[str, list[str]] = {group: [] for group in (*ADAMW_GROUPS, *MUON_GROUPS)}
    for name, parameter in parameters.items():
        groups[group_of(name, parameter.ndim)].append(name)
    groups = {group: names for group, names in groups.items() if names}

    cuts: dict[tuple[int, ...], list[tuple[str, Parameter]]] = {}
    decayed: list[tuple[str, Parameter]] = []
    vectors: list[tuple[str, Parameter]] = []
    for group, names in groups.items():
        for name in names:
            pair = (name, parameters[name])
            if group in MUON_GROUPS and config.matrices == "muon":
                cuts.setdefault(tuple(row_splits.get(name, ())), []).append(pair)
            elif name in row_splits and group not in MUON_GROUPS:
                raise ValueError(f"row_splits: {name} belongs to AdamW ({group}), which knows no matrices; drop it")
            elif group in (EMBEDDING, LORA, *MUON_GROUPS):
                decayed.append(pair)
            else:
                vectors.append(pair)

    muon, adamw = None, None
    if cuts:
        muon = Muon(
            [{"params": pairs, "row_splits": cut} for cut, pairs in cuts.items()],
            momentum=config.muon.momentum,
            weight_decay=config.muon.weight_decay,
            update_rms=config.muon.update_rms,
        )
    if decayed or vectors:
        decay = config.adamw.weight_decay
        decays = ((decayed, decay), (vectors, decay if config.decay_vectors else 0.0))
        # Fused, because only this implementation reads `found_inf` on the device; it does so on CPU as well.
        adamw = torch.optim.AdamW(
            [{"params": pairs, "weight_decay": value} for pairs, value in decays if pairs],
            lr=0.0,
            betas=(config.adamw.beta1, config.adamw.beta2),
            eps=config.adamw.eps,
            fused=True,
        )
    return Optimizers(parameters, groups, muon, adamw, exchanges, total)


@torch.no_grad()
def clip_by_global_norm(
    parameters: Iterable[Tensor], max_norm: float, total: Total = lambda numbers: numbers
) -> tuple[Tensor, Tensor]:
    """Scale all gradients, in place, by min(1, max_norm / (norm + 1e-6)), norm being that of all of them together, in
    all processes over which `total` sums.

    Nothing is read on the host. Norms of single tensors are taken in float32, their squares are added in float64.

    Returns:
        The norm before clipping, and `found_inf`: 1 if the norm is not finite (the gradients are worthless then), else
        0. Both are 0-dim float32 tensors on the device of the gradients.
    """
    return clip_gradients([parameter.grad for parameter in parameters if parameter.grad is not None], max_norm, total)


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], max_norm: float, total: Total) -> tuple[Tensor, Tensor]:
    """`clip_by_global_norm` of gradients without their parameters."""
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else [torch.zeros(())]
    norm = total(torch.stack(norms).double().square().sum()).sqrt().float()
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm, (~norm.isfinite()).float()


def _describe(shape: Iterable[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
