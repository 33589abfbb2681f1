"""Which implementation runs where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openv4.kernels import dispatch
from openv4.kernels.dispatch import implementation, using

CPU = torch.zeros(1)


def test_auto_takes_torch_on_a_cpu_and_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENV4_KERNELS", raising=False)
    assert implementation(CPU) == "torch"
    if torch.cuda.is_available():
        assert implementation(CPU.cuda()) == "triton"
        assert implementation(CPU.cuda(), CPU) == "torch"


def test_environment_and_context_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setenv("OPENV4_KERNELS", "reference")
    assert implementation(CPU) == "reference"
    with using("torch"):
        assert implementation(CPU) == "torch"
        with using("triton"):
            assert implementation(CPU) == "triton"
            assert implementation(CPU.double()) == "torch"
        assert implementation(CPU) == "torch"
        with pytest.raises(ZeroDivisionError), using("reference"):
            raise ZeroDivisionError
        assert implementation(CPU) == "torch"
    assert implementation(CPU) == "reference"


def test_what_cannot_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENV4_KERNELS", "fast")
    with pytest.raises(ValueError, match="OPENV4_KERNELS=fast: choose one of auto, reference, torch, triton"):
        implementation(CPU)
    monkeypatch.setenv("OPENV4_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        implementation(CPU)
    monkeypatch.setattr(dispatch, "triton", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        implementation(CPU)


def test_everything_runs_without_triton() -> None:
    """A process in which triton cannot be imported trains a step."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from model_cases import random_config, random_model
from openv4.model.loss import Counts, training_losses
model = random_model(random_config(0), 0)
tokens = torch.randint(0, 40, (1, 40)); segments = torch.zeros_like(tokens)
training_losses(model, tokens, segments, indexer=True).total(Counts.of([segments]), 0.3, 1e-4, 0.01).backward()
from openv4.kernels.dispatch import triton
print(triton, torch.isfinite(model.embed.weight.grad).all().item())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["None", "True"], result.stderr
