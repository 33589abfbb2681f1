"""What a run runs on and with: code version, packages, hardware and its peaks."""

import os
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import torch

from ..model.tensor_files import write_json

# Dense bfloat16 tensor-core rates of the makers' data sheets, TFLOP/s.
_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0, "4090": 165.0}


class CodeVersion(TypedDict):
    git: str | None  # commit of the checkout that runs; None for an installed package
    git_dirty: bool | None  # whether files that git knows were changed since


def code_version() -> CodeVersion:
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    # An installed package may lie in the virtual environment of another project, whose commit says nothing of us.
    if not git("ls-files", "train/loop.py"):
        return {"git": None, "git_dirty": None}
    return {"git": git("rev-parse", "HEAD").strip(), "git_dirty": bool(git("status", "--porcelain", "-uno").strip())}


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Peaks of this process so far, in 10^9 bytes: resident memory and, on CUDA, what torch allocated."""
    peaks = {"system/peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device.type == "cuda":
        peaks["system/peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peaks


def peak_flops(device: torch.device) -> float | None:
    """Peak rate of the device in FLOP/s: from the data sheet of a known GPU, measured on a CPU, else None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for key, peak in _PEAK_TFLOPS.items() if key in name), None)
    size = 1024
    matrix = torch.ones(size, size)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def write_environment(path: Path) -> None:
    """``env.json``: what the run ran on and with."""
    packages = ("openv4", "torch", "numpy", "safetensors", "tokenizers", "hydra-core", "wandb", "deepspeed")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    values = {
        **code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    write_json(path, values)
