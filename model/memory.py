"""What a training step holds on each GPU, by kind: a calculation from the config, in bytes.

Shapes: T tokens of a micro-batch on a GPU, L layers, S streams, D hidden, H heads, C head dim, K experts per token, F
expert intermediate, V vocabulary.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from ..kernels import cross_entropy, moe
from .config import LoRAConfig, ModelConfig
from .lora import adapter_shapes
from .released import Format, stored_bytes
from .released import released_tensors as named_tensors
from .transformer import Transformer

# Context and workspaces of CUDA, NCCL's buffers, and what the allocator cannot use: an allowance, not a calculation.
RUNTIME_BYTES = 6e9


@dataclass(frozen=True)
class MemoryItem:
    """One kind of memory.

    Attributes:
        name: what it is.
        bytes: on each GPU.
        how: the calculation.
    """

    name: str
    bytes: float
    how: str


def lora_memory(
    config: ModelConfig,
    lora: LoRAConfig,
    base: Literal["fp32", "bf16", "released"],
    gpus: int,
    tokens: int,
    release: Format = "fp4+fp8",
) -> list[MemoryItem]:
    """Memory per GPU of LoRA training with ``recompute=full``, bfloat16 compute and no MTP block.

    Routed experts are spread over the GPUs, everything else is on each of them; every GPU has ``tokens`` of its own.

    Args:
        base: what frozen weights are kept in; "released": as in the format ``release``.
    """
    with torch.device("meta"):
        model = Transformer(config)
    format: Format = release if base == "released" else base
    sizes = {name: stored_bytes(name, t.shape, t.dtype, format) for name, t in named_tensors(model)}
    main = {name: size for name, size in sizes.items() if not name.startswith("mtp.")}
    experts = sum(size for name, size in main.items() if ".experts." in name)
    others = sum(main.values()) - experts
    adapters = {name: prod(shape) for name, shape in adapter_shapes(model, lora).items()}
    shared = sum(count for name, count in adapters.items() if ".experts." not in name)
    own = shared + (sum(adapters.values()) - shared) / gpus
    c = config
    streams = tokens * c.hc_mult * c.hidden_size
    heads = tokens * c.num_attention_heads * c.head_dim
    copies = tokens * c.num_experts_per_tok
    expert_rows = copies * (2 * c.hidden_size + 3 * c.moe_intermediate_size)
    # The widest matrices that are dequantised at once: a few experts, or the largest linear map.
    linear = max(prod(t.shape) for name, t in named_tensors(model) if ".experts." not in name and ".attn." in name)
    widest = 2 * max(linear, moe.GPU_ELEMENTS)
    logits = 4 * min(tokens * c.vocab_size, cross_entropy.GPU_ELEMENTS)
    layers = c.num_hidden_layers
    return [
        MemoryItem("routed experts", experts / gpus, f"{experts / 1e9:.1f} GB in {format}, over {gpus} GPUs"),
        MemoryItem("other weights", others, f"{format}, on every GPU"),
        MemoryItem("adapters", 16 * own, f"{own / 1e6:.1f}M x (weight 4 + gradient 4 + two moments 8)"),
        MemoryItem("block inputs", 2 * layers * streams, f"kept for the backward pass: L {layers} x T S D x 2"),
        MemoryItem(
            "a block at work: streams", 20 * streams, "T S D x (float32 copy, its gradient and two sums 16 + bf16 4)"
        ),
        MemoryItem(
            "a block at work: attention",
            16 * heads,
            "T H C x 2 x 8: queries before and after norm and rotation, output, gradients",
        ),
        MemoryItem(
            "a block at work: experts",
            4 * expert_rows,
            "T K x (2 D + 3 F) x 2 x 2: rows, activations and their gradients",
        ),
        MemoryItem(
            "weights being dequantised",
            widest if base == "released" else 0.0,
            "the widest matrix, or a few experts, x 2",
        ),
        MemoryItem("output head", logits + 8 * tokens * c.hidden_size, "a chunk of logits x 4, and T D x 8"),
        MemoryItem("CUDA, NCCL, fragmentation", RUNTIME_BYTES, "an allowance"),
    ]
