"""Every Triton kernel compiles for an H100, at the shapes of V4-Flash, and fits into it."""

from collections import Counter
from pathlib import Path

import pytest
from compile_kernels import TESTS, Report, cases_of, compile_file, jitted, kernel_files, kernels_of, launched, table


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.stem)
def test_kernels_compile(path: Path) -> None:
    report = compile_file(path, cases_of(path))
    print(table([report]))
    assert not report.problems, "\n".join(report.problems)


def test_names_tell_what_is_launched() -> None:
    """What is compiled is told from what is missing by its name."""
    files = list((TESTS.parent / "kernels").glob("*.py"))
    for path in files:
        unnamed = launched(path) & set(jitted(path)) - set(kernels_of(path))
        assert not unnamed, f"{path.name}: what is launched must be named ..._kernel, not {', '.join(sorted(unnamed))}"
    names = Counter(name for path in files for name in kernels_of(path))
    assert not [name for name, count in names.items() if count > 1]


TOY = """
from __future__ import annotations

from openv4.kernels.dispatch import jit, tl


@jit
def _plain_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)


@jit
def _forgotten_kernel(x):
    tl.store(x, 1.0)


@jit
def _broken_kernel(x):
    tl.store(x, tl.arange(0, 3))


@jit
def _greedy_kernel(x, WIDTH: tl.constexpr):
    row, column = tl.arange(0, 16), tl.arange(0, WIDTH)
    a = tl.load(x + row[:, None] * WIDTH + column[None, :])
    b = tl.load(x + column[:, None] * 16 + row[None, :])
    tl.store(x + row[:, None] * 16 + row[None, :], tl.dot(a, b).to(tl.bfloat16))
"""
TOY_CASES = """
from pathlib import Path

import torch
from compile_kernels import _load

toy = _load(Path(__file__).with_name("toy.py"))


def flash_calls():
    x, y = torch.zeros(64), torch.zeros(2**16, dtype=torch.bfloat16)
    return {
        "plain": lambda: [toy._plain_kernel[(1,)](x, BLOCK=block) for block in (32, 64)],
        "broken": lambda: toy._broken_kernel[(1,)](x),
        "greedy": lambda: toy._greedy_kernel[(1,)](y, WIDTH=4096),
    }
"""


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    path, cases = tmp_path / "toy.py", tmp_path / "toy_cases.py"
    path.write_text(TOY)
    cases.write_text(TOY_CASES)
    report = compile_file(path, cases)
    assert len(report.kernels["_plain_kernel"]) == 2
    problems = "\n".join(report.problems)
    assert "toy.py, broken: _broken_kernel does not compile" in problems
    assert "no call of toy_cases.py compiled _forgotten_kernel" in problems
    assert "_greedy_kernel takes" in problems
    assert "_plain_kernel" not in problems


def test_missing_calls_are_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    report = compile_file(path, tmp_path / "toy_cases.py")
    assert report.problems == ["toy.py has kernels, but toy_cases.py has no flash_calls() that compile them"]


def test_table_shows_the_largest_variant() -> None:
    kernels = {"_k": [{"shared": 1, "registers": 40, "stack": 0}, {"shared": 2, "registers": 30, "stack": 8}]}
    assert table([Report(kernels, [])]).splitlines()[-1] == "| _k | 2 | 2 | 40 | 8 |"
