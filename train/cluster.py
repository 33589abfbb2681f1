"""What a plan is made for: GPUs, their rates, and the shares of them that a step reaches."""

import math
import os
from dataclasses import dataclass, field, replace
from typing import Literal

from .config import ConfigError

Compute = Literal["fp32", "bf16", "fp8", "fp4_qat"]


@dataclass(frozen=True)
class GpuConfig:
    """A processor, its memory and its links; rates are dense ones of the data sheet unless ``source`` says otherwise.

    Attributes:
        name: shown.
        memory_gb: 10^9 bytes; null: that of this machine.
        fp32_tflops, tf32_tflops, bf16_tflops, fp8_tflops: 10^12 operations a second; 0: it has no such arithmetic.
        bandwidth_tb_s: of the memory, 10^12 bytes a second.
        link_gb_s: to the other GPUs of a node, 10^9 bytes a second, each way.
        network_gb_s: share of each GPU in its node's network, 10^9 bytes a second, each way.
        per_node: GPUs in a node.
        kind: cpu for a processor without a GPU.
        source: of the numbers.
    """

    name: str
    memory_gb: float | None
    fp32_tflops: float
    tf32_tflops: float
    bf16_tflops: float
    fp8_tflops: float
    bandwidth_tb_s: float
    link_gb_s: float
    network_gb_s: float
    per_node: int = 8
    kind: Literal["cpu", "gpu"] = "gpu"
    source: str = "data sheet"

    def __post_init__(self) -> None:
        for key in ("fp32_tflops", "tf32_tflops", "bf16_tflops", "bandwidth_tb_s", "link_gb_s", "network_gb_s"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"gpu.{key}={getattr(self, key)} must be positive")
        if not 0 <= self.fp8_tflops < math.inf:
            raise ConfigError(f"gpu.fp8_tflops={self.fp8_tflops} must be positive, or 0 for a GPU without FP8")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise ConfigError(f"gpu.memory_gb={self.memory_gb} must be positive, or null for this machine's")
        if self.per_node < 1:
            raise ConfigError(f"gpu.per_node={self.per_node} must be at least 1")


@dataclass(frozen=True)
class Shares:
    """What part of the GPU's rates a step reaches.

    Attributes:
        matmul: of the arithmetic's rate, by linear maps and the output head.
        experts: the same, by routed experts.
        attention: the same, by attention, index scores and their losses.
        bandwidth: of the memory's bandwidth.
        network: of links and network.
        overlap: of communication, hidden behind computation.
    """

    matmul: float = 0.7
    experts: float = 0.6
    attention: float = 0.5
    bandwidth: float = 0.75
    network: float = 0.7
    overlap: float = 0.0

    def __post_init__(self) -> None:
        for key in ("matmul", "experts", "attention", "bandwidth", "network"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"shares.{key}={getattr(self, key)} must be above 0 and at most 1")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"shares.overlap={self.overlap} must be between 0 and 1")


@dataclass(frozen=True)
class Cluster:
    """Attributes:
    gpu: what it is made of.
    gpus: how many.
    shares: what a step reaches of its rates.
    compute: dtype of matrix products; fp8 and fp4_qat: linear maps and experts in FP8.
    """

    gpu: GpuConfig
    gpus: int
    shares: Shares = field(default_factory=Shares)
    compute: Compute = "bf16"

    def __post_init__(self) -> None:
        if self.compute in ("fp8", "fp4_qat") and not self.gpu.fp8_tflops:
            raise ConfigError(f"compute={self.compute}: {self.gpu.name} has no FP8 arithmetic; choose compute=bf16")

    def computing(self, compute: Compute | None) -> "Cluster":
        """The same, in a stage that says what it computes in."""
        return self if compute is None else replace(self, compute=compute)

    @property
    def capacity(self) -> float:
        """Bytes of each GPU's memory."""
        if self.gpu.memory_gb is not None:
            return self.gpu.memory_gb * 1e9
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def rate(self, kind: str) -> float:
        """Operations a second of one GPU in work of that kind (``accounting.Kind``)."""
        gpu, shares = self.gpu, self.shares
        wide = gpu.fp32_tflops if self.compute == "fp32" else gpu.bf16_tflops
        narrow = gpu.fp8_tflops if self.compute in ("fp8", "fp4_qat") else wide
        full_precision = gpu.fp32_tflops if self.compute == "fp32" else gpu.tf32_tflops
        tflops, share = {
            "projection": (narrow, shares.matmul),
            "expert": (narrow, shares.experts),
            "core": (wide, shares.attention),
            "index": (wide, shares.attention),
            "fp32": (full_precision, shares.matmul),
            "head": (wide, shares.matmul),
            "adapter": (wide, shares.matmul),
        }[kind]
        return tflops * 1e12 * share
