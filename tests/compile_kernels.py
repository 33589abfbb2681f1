"""Compiles every Triton kernel for an H100, where none is needed, and prints what each takes of a multiprocessor.

    python tests/compile_kernels.py                 every file of kernels/, each in a process of its own
    python tests/compile_kernels.py FILE CASES      the kernels of FILE, by the calls of CASES, as JSON

CASES is a module with ``flash_calls()``: named closures that call each public operation, forward and backward, at the
dims of V4-Flash. Every kernel of FILE must be reached by one of them.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

TESTS = Path(__file__).parent
SECONDS = 900  # of one file, with nothing in Triton's cache
# Files without cases of their own, and whose calls reach them.
CASES = {"fp8": "quantize", "fp4": "quantize", "hyper_connection_triton": "hyper_connection", "moe_triton": "moe"}
Usage = list[dict[str, int]]  # of each variant: shared, registers, stack


@dataclass(frozen=True)
class Report:
    """Of one file: what was compiled, and in words what is wrong."""

    kernels: Mapping[str, Usage]
    problems: list[str]


def jitted(path: Path) -> list[str]:
    """Names of the functions of a file that ``@jit`` decorates."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(isinstance(d, ast.Name) and d.id == "jit" for d in f.decorator_list)]


def kernels_of(path: Path) -> list[str]:
    """What is launched, by its name; other ``@jit`` functions are called by kernels."""
    return [name for name in jitted(path) if name.endswith("_kernel")]


def launched(path: Path) -> set[str]:
    """Names that stand in a launch, ``name[grid](...)``."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}


def kernel_files() -> list[Path]:
    return [path for path in sorted((TESTS.parent / "kernels").glob("*.py")) if kernels_of(path)]


def cases_of(path: Path) -> Path:
    own = TESTS / f"{path.stem}_cases.py"
    return own if own.exists() else TESTS / f"{CASES.get(path.stem, path.stem)}_cases.py"


def compile_file(path: Path, cases: Path) -> Report:
    """In a process of its own, which does not interpret kernels."""
    hidden = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "OPENV4_KERNELS")}
    paths = [os.fspath(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, __file__, os.fspath(path), os.fspath(cases)],
        capture_output=True,
        text=True,
        env=hidden | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        timeout=SECONDS,
    )
    if run.returncode:
        return Report({}, [f"{path.name}: {run.stderr[-4000:]}"])
    return Report(**json.loads(run.stdout.splitlines()[-1]))


def compile_here(path: Path, cases: Path) -> Report:
    """What ``compile_file`` does in its child."""
    from hopper import SHARED_MEMORY, compiling
    from triton.runtime.jit import JITFunction

    from openv4.kernels import dispatch

    problems = []
    calls = getattr(_load(cases), "flash_calls", None) if cases.exists() else None
    if calls is None:
        return Report({}, [f"{path.name} has kernels, but {cases.name} has no flash_calls() that compile them"])
    # On a CPU dispatch refuses kernels that would not be interpreted; these are compiled, and not run.
    with compiling() as found, dispatch.using("triton"), mock.patch.object(dispatch, "INTERPRETED", True):
        run = JITFunction.run

        def named(self: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return run(self, *arguments, **options)
            except Exception as error:
                raise RuntimeError(f"{self.fn.__name__} does not compile: {error}") from error

        with mock.patch.object(JITFunction, "run", named):
            for name, call in calls().items():
                try:
                    call()
                except Exception as error:
                    problems.append(f"{path.name}, {name}: {error}")
    for kernel in kernels_of(path):
        if kernel not in found.kernels:
            problems.append(f"{path.name}: no call of {cases.name} compiled {kernel}")
    for kernel, variants in found.kernels.items():
        if (shared := max(usage["shared"] for usage in variants)) > SHARED_MEMORY:
            problems.append(f"{path.name}: {kernel} takes {shared} bytes of shared memory, a block has {SHARED_MEMORY}")
    return Report(found.kernels, problems)


def table(reports: Iterable[Report]) -> str:
    """The largest variant of each kernel in each respect."""
    lines = ["| kernel | variants | shared | registers | stack |", "|---|---|---|---|---|"]
    for report in reports:
        for kernel, variants in sorted(report.kernels.items()):
            most = [max(usage[key] for usage in variants) for key in ("shared", "registers", "stack")]
            lines.append(f"| {kernel} | {len(variants)} | " + " | ".join(map(str, most)) + " |")
    return "\n".join(lines)


def _load(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> int:
    if arguments:
        report = compile_here(*map(Path, arguments))
        print(json.dumps({"kernels": report.kernels, "problems": report.problems}))
        return 0
    reports = [compile_file(path, cases_of(path)) for path in kernel_files()]
    print(table(reports))
    problems = [problem for report in reports for problem in report.problems]
    print("\n".join(problems))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
