"""What the products of a run compute in: which modules multiply FP8 numbers, and what carries that out.

What is rounded follows the release (``stored`` in ``model.shapes``): what V4 is published in FP8 multiplies in FP8,
what it is published in FP4 (the routed experts) in FP8 or, under ``fp4_qat``, in FP8 values that FP4 can hold. All else
(the embedding and head, router, mHC, compressors, the indexer's head weights, norms, sinks) stays in the dtype of the
streams, or in float32, as ``precision_table`` says. Source: recipe 8.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..kernels.fp8 import fake_quantize_kv
from ..model.attention import Attention
from ..model.config import ModelConfig
from ..model.layers import Linear
from ..model.moe import Experts
from ..model.precision import CastWeight, IndexRounding, RoundedWeight
from ..model.shapes import tensor_shapes
from ..model.transformer import Transformer
from ..optim.schedule import Compute
from .transformer_engine import UNIT, BlockScaledExperts, BlockScaling, block_scaling, why_not

if TYPE_CHECKING:  # at run time it would need hydra, and benchmarks run where there is none
    from .config import PrecisionConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply_precision(model: Transformer, config: "PrecisionConfig", compute: Compute | None = None) -> None:
    """Makes the model compute as the run's precision says, or a stage's own ``compute``.

    May be called again, for the next stage. Parameters, their names and gradients stay what they are.
    """
    compute = compute or config.compute
    low = compute in ("fp8", "fp4_qat")
    model.compute_dtype = DTYPES[config.streams if low else compute]
    device = model.embed.weight.device
    accelerated = low and why_not(device, config.streams) is None
    fp8, fp4 = (_modules(model, stored).values() for stored in ("fp8", "fp4"))
    for module in fp8:
        assert isinstance(module, Linear)
        module.rounded = RoundedWeight(model.gauge) if low else None
        if module.rounded is not None and accelerated:
            module.rounded = block_scaling(module.weight, module.rounded, getattr(module, "groups", 1))
    for module in fp4:
        assert isinstance(module, Experts)
        module.rounded = tuple(RoundedWeight(model.gauge, compute == "fp4_qat") for _ in range(3)) if low else ()
        module.engine = None
        if module.rounded and accelerated and not any(size % UNIT for size in module.w1.shape[1:]):
            module.engine = BlockScaledExperts((module.w1, module.w3, module.w2), module.rounded, module.limit)
    kv = partial(fake_quantize_kv, rotary=model.config.qk_rope_head_dim) if config.kv == "fp8" else None
    index = IndexRounding(model.gauge) if compute == "fp4_qat" else None
    for module in model.modules():
        if isinstance(module, Attention):
            module.simulate = kv
            if module.compressor is not None:
                module.compressor.simulate = kv
            if module.indexer is not None:
                module.indexer.simulate = module.indexer.compressor.simulate = index


def held_values(model: Transformer) -> dict[str, CastWeight | RoundedWeight]:
    """By parameter, what makes of it all that products need: of matrices that are released in FP8 or FP4, where the
    products are in bfloat16 or of FP8 numbers that bfloat16 holds. All other parameters are needed in float32."""
    if model.compute_dtype != torch.bfloat16:
        return {}
    makers: dict[str, CastWeight | RoundedWeight] = {}
    for stored in ("fp8", "fp4"):
        for name, module in _modules(model, stored).items():
            if isinstance(module, Experts):
                three = zip(("w1", "w3", "w2"), module.rounded, strict=True) if module.rounded else module.casts.items()
                makers |= {f"{name}.{matrix}": maker for matrix, maker in three}
            else:
                assert isinstance(module, Linear)
                rounded = module.rounded.rounded if isinstance(module.rounded, BlockScaling) else module.rounded
                assert rounded is None or isinstance(rounded, RoundedWeight)
                makers[f"{name}.weight"] = rounded or module.cast
    return makers


def describe_precision(config: "PrecisionConfig", compute: Compute | None, device: torch.device) -> str:
    """What products compute in and what carries that out, in one line, to print when a stage begins."""
    compute = compute or config.compute
    if compute not in ("fp8", "fp4_qat"):
        return f"products in {compute}"
    reason = why_not(device, config.streams)
    how = "Transformer Engine, block scaling" if reason is None else f"emulated exactly ({reason})"
    return f"products in {compute} on {config.streams} streams: {how}"


def precision_table(config: ModelConfig) -> list[tuple[str, str, str, str]]:
    """For each kind of matrix: its names, what it multiplies as under fp8 and under fp4_qat, and how it is released.

    Names are the released ones below a block, ``*`` for the number of the expert; of all else that is trained (norms,
    biases, sinks) nothing is multiplied with hidden vectors.
    """
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for s in tensor_shapes(config):
        if s.matrix or s.part in ("embedding", "head"):
            name = s.name.removeprefix(f"{s.block}.").removesuffix(".weight")
            if s.quantized:
                low = "FP8", "FP4 held in FP8" if s.stored == "fp4" else "FP8"
            elif s.part == "embedding":
                low = ("looked up",) * 2
            else:
                wide = s.part in ("router", "mHC", "head") or ".compressor." in s.name
                low = ("float32" if wide else "streams' dtype",) * 2
            names = rows.setdefault((s.part, *low, s.stored), [])
            if name not in names:
                names.append(name)
    return [(", ".join(names), *key[1:]) for key, names in rows.items()]


def _modules(model: Transformer, stored: str) -> dict[str, nn.Module]:
    """The modules that hold what the instruct models are released in as FP8 (or FP4), by name."""
    names = {s.parameter.removesuffix(".weight") for s in tensor_shapes(model.config) if s.stored == stored}
    owners = {name.rpartition(".")[0] if stored == "fp4" else name for name in names}
    return {name: model.get_submodule(name) for name in sorted(owners)}
