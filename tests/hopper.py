"""Compiles Triton kernels for an H100 on a machine that has none, as they would be launched.

Within ``compiling()`` a launch compiles for sm_90, with the dtypes, constants and alignments of its arguments, and runs
nothing: outputs hold zeros. So whoever calls an operation there, forward and backward, at the shapes of a real model
learns whether every kernel behind it compiles, and what it takes of a multiprocessor.

Must run in a process of its own: with TRITON_INTERPRET set, kernels cannot be compiled.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED_MEMORY = 232_448  # bytes that one block may have on an H100


@dataclass
class Compiled:
    """What was compiled: by kernel, the shared memory, registers and spilled bytes of each variant."""

    kernels: dict[str, list[dict[str, int]]] = field(default_factory=dict)

    def table(self) -> str:
        return json.dumps(self.kernels, indent=1)


class _NoDevice:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def compiling() -> Iterator[Compiled]:
    """Within, Triton kernels are compiled, not launched; torch operations on the CPU run as ever."""
    from triton.runtime.jit import JITFunction

    found = Compiled()
    seen: set[int] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            usage = {"shared": kernel.metadata.shared, **_registers(kernel.asm["cubin"])}
            name = getattr(self, "__name__", None) or self.fn.__name__
            found.kernels.setdefault(name, []).append(usage)
        return kernel

    previous = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    triton.runtime.driver.set_active(_NoDevice())
    empty_like, empty, new_empty = torch.empty_like, torch.empty, torch.Tensor.new_empty
    patches = (
        mock.patch.object(JITFunction, "run", compile_only),
        # What no kernel writes must be an index that torch can use.
        mock.patch.object(torch, "empty", lambda *a, **k: empty(*a, **k).zero_()),
        mock.patch.object(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).zero_()),
        mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).zero_()),
    )
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in patches:
            patch.stop()
        if previous is not None:
            triton.runtime.driver.set_active(previous)


def _registers(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes that it spills to memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([os.fspath(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    found = {key: re.search(rf"{key}:(\d+)", text) for key in ("REG", "STACK")}
    return {name: int(m[1]) if m else -1 for name, m in zip(("registers", "stack"), found.values(), strict=True)}
