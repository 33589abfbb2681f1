"""What a training step holds on each GPU at its fullest moment, by kind: a calculation from the config, in bytes.

``training_memory`` walks through a step (forward pass, losses, backward pass, update) with the sizes of ``activations``
and tells what is alive where the sum is largest; nothing is built, torch is not imported. On a CPU the result has been
compared with measurements (``tests/test_memory_plan.py``). Measured are one process, all dtypes that run today, all
recomputations; of many processes the weights (``tests/test_held_weights.py``).
"""

from dataclasses import dataclass
from math import ceil
from os import cpu_count
from typing import Literal

from .accounting import optimizer_bytes, tensor_bytes
from .activations import ATTENTION, CHOICES, FP8_TILE, MIXING, TILE, Device, Stage, Work
from .config import AttentionMode, LoRAConfig, ModelConfig, Recompute
from .shapes import Format, Part, Shape, adapter_shapes, logical_rows, tensor_shapes

Compute = Literal["fp32", "bf16", "fp8", "fp4_qat"]

# Context and workspaces of CUDA, buffers of NCCL and DeepSpeed, what the allocator cannot use: an allowance, no
# calculation.
RUNTIME_BYTES = 6e9
# Resident memory of `openv4 train` on a CPU before there is a model: Python, torch, the other libraries; measured.
# 75 MB of it are triton's, which torch's optimizers load where it is installed.
PROCESS_BYTES = 500e6
# What oneDNN compiles for products in bfloat16 on a CPU, from so many tokens on: measured in short runs, 320 to 400 MB;
# it grows slowly with the number of steps, as experts get other numbers of tokens.
BF16_CPU_BYTES, BF16_CPU_TOKENS = 330e6, 1024
# What glibc's heap keeps of freed memory where blocks are replayed, over what such a block makes: measured,
# 0.9 to 3.4. MALLOC_MMAP_THRESHOLD_=1048576 in the environment makes it none.
REPLAYED = 1.4

# Elements of the stacks in which Muon updates matrices: of all, and on a CPU of each thread.
STACK_ELEMENTS, CPU_STACK_ELEMENTS = 2**26, 2**17

INPUTS, HEAD, GRADIENTS = "block inputs", "output head and losses", "gradients"


@dataclass(frozen=True)
class Layout:
    """How a run is spread.

    Attributes:
        gpus: all of them, data-parallel size times ``context``.
        expert: the routed experts are spread over so many GPUs.
        context: so many GPUs share each row, and have length / context consecutive tokens of it.

    Raises:
        ValueError: one is below 1, or does not divide ``gpus``.
    """

    gpus: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name in ("gpus", "expert", "context"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
            if self.gpus % size:
                raise ValueError(f"{name}={size} does not divide gpus={self.gpus}")


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


def training_memory(
    config: ModelConfig,
    layout: Layout | None = None,
    *,
    length: int,
    rows: int = 1,
    attention: AttentionMode = "sparse",
    compute: Compute = "bf16",
    streams: Literal["fp32", "bf16"] = "bf16",
    recompute: Recompute = "none",
    matrices: Literal["muon", "adamw"] = "muon",
    mtp: bool = True,
    indexer: bool = False,
    micro_batches: int = 1,
    lora: LoRAConfig | None = None,
    base: Literal["fp32", "bf16", "released"] = "fp32",
    release: Format = "fp4+fp8",
    device: Device = "gpu",
    threads: int | None = None,
) -> list[MemoryItem]:
    """Memory of a GPU, or of the process on a CPU, at the fullest moment of a step after the first; items add up to it.

    One process: weights, gradients and optimizer state in float32, weights cast to bfloat16 where they are used; frozen
    ones under LoRA as ``base`` says. Many GPUs: weights and float32 gradients, of what is no routed expert on each of
    them, of routed experts over ``layout.expert``; optimizer state with the owner of each matrix, out of all GPUs for
    dense ones and out of those that hold the same experts. On bfloat16 streams, matrices that are released in FP8 or
    FP4 are held in bfloat16, and with their owners in float32 as well.

    Args:
        length: tokens of a row, which ``layout.context`` GPUs share.
        rows: of one forward and backward pass.
        compute: fp8 and fp4_qat keep what their ``streams`` would, and the rounded weights in that dtype, once for all
            micro-batches (Transformer Engine: FP8 twice, by rows and by columns, which is as much as bf16). On many
            GPUs, of bf16 streams, they take the place of the weights.
        matrices: the optimizer of matrices, as in ``OptimConfig``.
        mtp: the MTP block is trained; its weights are there either way, if the config has it.
        indexer: the indexers' loss is computed; in an indexer warm-up it always is.
        micro_batches: with more than one, gradients are there while the next pass runs.
        base: of frozen weights; "released": as in the format ``release``.
        threads: of the CPU; None: as many as it has.

    Raises:
        ValueError: the layout does not fit model or rows.
    """
    layout = layout or Layout()
    if config.n_routed_experts % layout.expert:
        raise ValueError(f"expert={layout.expert} does not divide the {config.n_routed_experts} routed experts")
    if length % layout.context:
        raise ValueError(f"context={layout.context} does not divide the rows' length={length}")
    if attention == "indexer_warmup" or "csa" not in config.kinds:
        mtp, indexer = mtp and attention != "indexer_warmup", attention == "indexer_warmup"
    low = compute in ("fp8", "fp4_qat")
    width = 4 if (streams if low else compute) == "fp32" else 2
    held: Format = "fp32"
    if lora is not None:
        held = release if base == "released" else base
    owned = width < 4 and layout.gpus > 1 and lora is None  # owners alone have all in float32
    own = {"fp32": 4, "bf16": 2}.get(held)  # bytes of a number in the dtype of linear maps; None: quantised
    work = Work(
        config=config,
        rows=rows,
        length=length,
        attention=attention,
        indexer=indexer and attention != "dense",
        experts=config.n_routed_experts // layout.expert,
        width=width,
        device=device,
        context=layout.context,
        casts=width if own not in (None, width) and not low and not owned else 0,
        wide_casts=4 if held != "fp32" else 0,
        dequantized=own is None,
        lora=lora,
        tile=FP8_TILE if low else TILE,
    )
    trained_mtp = mtp and config.num_nextn_predict_layers > 0
    step = _Step(work, layout, matrices, recompute, trained_mtp, micro_batches, held, owned)
    step.hold_weights()
    if low and held == "fp32" and not owned:
        step.hold_rounded()
    step.run(threads or cpu_count() or 1)
    items = [MemoryItem(name, size, step.how(name)) for name, size in step.tally.fullest.items() if size > 0.5]
    if device == "gpu":
        why = "CUDA, NCCL, DeepSpeed's buffers, fragmentation: an allowance"
        return [*items, MemoryItem("process", RUNTIME_BYTES, why)]
    if width < 4:
        compiled = BF16_CPU_BYTES * min(1.0, work.tokens / BF16_CPU_TOKENS)
        items.append(MemoryItem("compiled products", compiled, "oneDNN's, bfloat16: measured"))
    if recompute != "none" and attention != "indexer_warmup":
        replayed = max(sum(stage.kept for stage in stages) for _, stages in step.blocks)
        items.append(
            MemoryItem("freed, not returned", REPLAYED * replayed, f"{REPLAYED:g} x a replayed block: measured")
        )
    return [*items, MemoryItem("process", PROCESS_BYTES, "Python, torch, other libraries, data: measured")]


class _Tally:
    """Bytes alive by kind, and what they were when there were most of them."""

    def __init__(self) -> None:
        self.alive: dict[str, float] = {}
        self.total = self.most = 0.0
        self.fullest: dict[str, float] = {}

    def hold(self, kind: str, size: float) -> None:
        self.alive[kind] = self.alive.get(kind, 0.0) + size
        self.total += size

    def free(self, kind: str, size: float) -> None:
        self.hold(kind, -size)

    def make(self, kind: str, size: float) -> None:
        """Made and freed again: only the fullest moment sees it."""
        if self.total + size > self.most:
            self.most = self.total + size
            self.fullest = self.alive | {f"at work: {kind}": size}


class _Step:
    """A training step in sizes; the tally ends with its fullest moment."""

    def __init__(
        self,
        work: Work,
        layout: Layout,
        matrices: Literal["muon", "adamw"],
        recompute: Recompute,
        mtp: bool,
        micro_batches: int,
        held: Format,
        owned: bool,
    ) -> None:
        self.work, self.layout, self.matrices, self.recompute = work, layout, matrices, recompute
        self.mtp, self.held, self.owned, self.config = mtp, held, owned, work.config
        self.tally = _Tally()
        self.warmup = work.attention == "indexer_warmup"
        self.accumulates = micro_batches > 1
        c = self.config
        weights = adapter_shapes(c, work.lora) if work.lora else tensor_shapes(c)
        self.learning = [
            s
            for s in weights
            if s.trained
            and (".indexer." in s.name if self.warmup else work.indexer or ".indexer." not in s.name)
            and (mtp or not s.in_mtp)
        ]
        self.gradients: dict[tuple[str, Part], float] = {}
        for s in self.learning:
            key = s.block, s.part
            self.gradients[key] = self.gradients.get(key, 0.0) + self._here(s, 4.0 * s.numel)
        self.blocks = self._blocks()
        self.streams = float(work.width * work.streams)
        # Normalised streams and the next token's embedding, before and after its norm: of them the MTP block's input
        # is made.
        self.merged = self.streams + 2 * work.width * work.hidden + 4 * work.tokens * (1 + c.hc_mult)
        # Input of a head before and after its norm, and its gradient.
        self.head = (2 * work.width + 4) * work.hidden + 4 * work.tokens * (2 + c.hc_mult)

    def _here(self, s: Shape, size: float) -> float:
        return size / self.layout.expert if s.part == "routed experts" else size

    def _blocks(self) -> list[tuple[str, list[Stage]]]:
        """Name and stages of each block that runs; blocks of a kind share theirs."""
        c = self.config
        names = [f"layers.{layer}" for layer in range(c.num_hidden_layers)] + ["mtp.0"] * self.mtp
        kinds: dict[tuple[object, ...], list[Stage]] = {}
        found = []
        for layer, name in enumerate(names):
            kind = c.kinds[layer], c.compress_ratios[layer], layer < min(c.num_hash_layers, c.num_hidden_layers)
            if kind not in kinds:
                kinds[kind] = self.work.stages(*kind)
            found.append((name, kinds[kind]))
        return found

    def hold_weights(self) -> None:
        """What is there all the time: weights, optimizer state, and what is known of where the batch's tokens stand."""
        c, w, tally = self.config, self.work, self.tally
        for s in tensor_shapes(c):
            kind = "routed experts" if s.part == "routed experts" else "other weights"
            if self.owned and s.quantized:
                tally.hold(kind, self._here(s, 2.0 * s.numel))
                tally.hold("optimizer state", 4.0 * s.numel / self.layout.gpus)
            else:
                tally.hold(kind, self._here(s, tensor_bytes(s, self.held)))
        for s in adapter_shapes(c, w.lora) if w.lora else ():
            tally.hold("adapters", self._here(s, 4.0 * s.numel))
        for s in self.learning:
            if w.lora:  # a few adapters are on every GPU with their moments
                tally.hold("optimizer state", self._here(s, 8.0 * s.numel))
            else:  # over all GPUs, or over those that hold the same experts
                tally.hold("optimizer state", optimizer_bytes(s, self.matrices) / self.layout.gpus)
        if self.accumulates:
            tally.hold(GRADIENTS, sum(self.gradients.values()))
        ratios = set(c.compress_ratios) - {0}
        places = w.tokens * (17 + 16 * len(ratios) + 8 * c.qk_rope_head_dim)
        entries = sum(w.rows * (w.length // ratio) for ratio in ratios)
        tally.hold("batch", 20 * w.tokens + (places + 9 * entries) * (1 + self.mtp))

    def hold_rounded(self) -> None:
        """Weights rounded to FP8, or to FP4 that FP8 holds, of the blocks that run."""
        for s in tensor_shapes(self.config):
            if s.quantized and (self.mtp or not s.in_mtp):
                self.tally.hold("rounded weights", self._here(s, self.work.width * s.numel))

    def run(self, threads: int) -> None:
        if self.warmup:
            self._warm_up()
        else:
            self._forward()
            self._backward()
        self.tally.make("update", self._update(threads))

    def _kept(self, stage: Stage) -> tuple[float, float]:
        """Bytes that a stage keeps after the forward pass of its block: of its kind, and choices."""
        if self.recompute == "none":
            return stage.kept, 0.0
        return stage.products if self.recompute == "selective" else 0.0, stage.choices

    def _forward(self) -> None:
        w, c, tally = self.work, self.config, self.tally
        tally.hold(HEAD, w.width * w.hidden)  # the embedding, for the MTP block
        # Shares of the sinks and matrices of mixing, which the losses' statistics look at.
        reports = 4.0 * w.tokens * (c.num_attention_heads + (2 * c.hc_mult**2 if self.recompute != "none" else 0))
        for name, stages in self.blocks:
            if name.startswith("mtp"):
                tally.hold(MIXING, self.merged)
            tally.hold(INPUTS, self.streams)
            for stage in stages:
                tally.hold(stage.kind, stage.kept)
                tally.make(stage.kind, stage.forward)
            tally.make(MIXING, self.streams)
            for stage in stages:
                kept, choices = self._kept(stage)
                tally.free(stage.kind, stage.kept - kept)
                tally.hold(CHOICES, choices)
            tally.hold(HEAD, reports)
        tally.free(HEAD, w.width * w.hidden)
        for _ in range(1 + self.mtp):
            tally.hold(INPUTS, self.streams)  # the output of the last block
            tally.hold(HEAD, self.head + self._table)
            # The loss computes in float32; a head that is held in another dtype is copied.
            copy = 0.0 if self.held == "fp32" else 4.0 * c.vocab_size * c.hidden_size
            tally.make(HEAD, self._logits() + w.wide(w.hidden) + copy)
        tally.free(HEAD, reports * len(self.blocks))

    @property
    def _table(self) -> float:
        """Gradient of the head's weight, which the loss makes in its forward pass."""
        return self.gradients.get(("", "head"), 0.0)

    def _logits(self) -> float:
        w, v = self.work, self.config.vocab_size
        return 4.0 * v * min(w.tokens, max(1, w.portion("cross_entropy") // v)) + 24 * w.tokens

    def _backward(self) -> None:
        w, tally = self.work, self.tally
        for _ in range(1 + self.mtp):
            tally.make(HEAD, 4 * w.hidden)
            tally.free(HEAD, self.head)
            tally.hold(GRADIENTS, self.streams)
            tally.make(HEAD, w.wide(w.streams) + 4 * w.streams)
            tally.free(INPUTS, self.streams)
        tally.free(HEAD, self._table * (1 + self.mtp))
        self._differentiate(("", "head"))
        for name, stages in reversed(self.blocks):
            for stage in stages:
                kept, choices = self._kept(stage)
                tally.free(CHOICES, choices)
                tally.hold(stage.kind, stage.kept - kept)
                if self.recompute != "none":
                    tally.make(stage.kind, stage.forward)
            for stage in reversed(stages):
                for part in stage.parts:
                    self._differentiate((name, part))
                tally.make(stage.kind, stage.backward + w.width * w.hidden)
                tally.free(stage.kind, stage.kept)
            if name.startswith("mtp"):
                self._differentiate((name, "MTP projections"))
                tally.make(MIXING, (18 if w.width < 4 else 12) * w.streams)
                tally.free(MIXING, self.merged)
                tally.free(GRADIENTS, self.streams)
            tally.free(INPUTS, self.streams)
        for part in ("embedding", "mHC", "norms"):
            self._differentiate(("", part))
        tally.free(GRADIENTS, self.streams)

    def _differentiate(self, key: tuple[str, Part]) -> None:
        """The gradients of a part of a block: new ones, or ones that are added to those of earlier micro-batches."""
        size = self.gradients.get(key, 0.0)
        if self.accumulates:
            self.tally.make(GRADIENTS, size)
        else:
            self.tally.hold(GRADIENTS, size)

    def _warm_up(self) -> None:
        """The forward pass remembers nothing but what the indexers' loss kept, and the backward pass begins with it."""
        w, c, tally = self.work, self.config, self.tally
        n = float(w.width * w.hidden)
        tally.hold(INPUTS, 2 * self.streams + n)  # before and after the attention of a block, and the embedding
        for _, stages in self.blocks:
            for index, stage in enumerate(stages):
                # The indexer's loss runs while queries, entries and output of the attention are there.
                learns = "indexer" in stage.parts
                beside = sum(s.kept for s in stages[: index + 2] if s.kind == ATTENTION) - stage.kept if learns else 0.0
                tally.make(stage.kind, beside + stage.kept + stage.forward + 4 * n)
                if learns:  # its linear maps keep their inputs
                    tally.hold(ATTENTION, stage.kept + n + w.width * w.tokens * c.q_lora_rank)
            tally.hold(HEAD, 4.0 * w.tokens * (c.num_attention_heads + 2 * c.hc_mult**2))
        # The loss is computed to be shown; its weight's gradient with it, to be dropped.
        table = 0.0 if w.lora else 4.0 * c.vocab_size * c.hidden_size
        tally.free(INPUTS, self.streams + n)
        tally.make(HEAD, self._logits() + 2 * n + w.wide(w.hidden) + table)
        tally.free(HEAD, tally.alive.get(HEAD, 0.0))
        tally.free(INPUTS, self.streams)
        for name, stages in reversed(self.blocks):
            for stage in stages:
                if "indexer" in stage.parts:
                    self._differentiate((name, "indexer"))
                    tally.make(ATTENTION, stage.backward)
                    tally.free(ATTENTION, stage.kept + n + w.width * w.tokens * c.q_lora_rank)

    def _update(self, threads: int) -> float:
        """Of the optimizers' step: Muon's largest stack with its momentum, products and new weights."""
        w = self.work
        if w.lora or self.matrices != "muon":
            return 0.0
        stacks: dict[tuple[int, int], float] = {}
        for s in self.learning:
            if s.matrix:
                for rows in logical_rows(s, self.config):
                    n, m = sorted((rows, s.shape[-1]))
                    stacks[n, m] = stacks.get((n, m), 0.0) + s.copies / self.layout.gpus
        most = 0.0
        for (n, m), count in stacks.items():
            limit = STACK_ELEMENTS // (n * m)
            if w.device == "cpu":
                limit = min(limit, threads * max(1, CPU_STACK_ELEMENTS // (n * m)))
            most = max(most, 4.0 * min(ceil(count), max(1, limit)) * (5 * n * m + 3 * n * n))
        return most

    def how(self, name: str) -> str:
        """The calculation of an item, in words."""
        w, layout, c = self.work, self.layout, self.config
        many, rest = layout.gpus > 1, "embedding, head, router, compressors, mHC, norms"
        compute = "float32" if w.width == 4 else "bf16"
        kept = {
            "none": "all that the backward pass asks for",
            "selective": "products and choices; one block is replayed",
            "full": "one block is replayed",
        }[self.recompute]
        sentences = {
            "routed experts": ("bf16" if self.owned else self.held)
            + (f", {w.experts} of {c.n_routed_experts} experts" if many else ""),
            "other weights": (f"bf16; {rest} fp32" if self.owned else self.held) + (", on every GPU" if many else ""),
            "rounded weights": f"FP8 values in {compute}, made once a step",
            "adapters": "float32",
            "optimizer state": "AdamW: two moments, float32"
            if w.lora or self.matrices == "adamw"
            else "float32: Muon's momentum, AdamW's two moments"
            + (", weights held in bf16" if self.owned else "")
            + (", each with one owner" if many else ""),
            GRADIENTS: "float32, of the weights so far and of the streams",
            "batch": f"{w.tokens:,} tokens, their documents and rotations",
            INPUTS: f"T S D x {w.width} ({compute}) for each block whose backward pass is to come",
            CHOICES: "experts and entries that a replay takes again",
            HEAD: "hidden states, their gradients and the head's",
        }
        if name.startswith("at work"):
            return "made and freed at the fullest moment"
        return sentences.get(name, f"kept for the backward pass: {kept}")
