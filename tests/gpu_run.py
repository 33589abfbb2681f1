"""Everything that only a GPU can show, in groups of less than ten minutes: `make gpu`, or `make gpu GROUP=mhc`.

Correctness comes first (the tests of the Triton kernels, natively), then the ceilings, then the benchmarks. Each group
is a process of its own: one that crashes, or hangs, does not stop the others, and what it had measured is kept. Needs
torch, triton, pytest and numpy; what else is missing is skipped and named.

    python tests/gpu_run.py [GROUP ...] [--output FOLDER]      default: all groups, docs/results
    python tests/gpu_run.py --list | --table                   the groups; the table from what was measured before
    python tests/gpu_run.py --merge FILE ...                   adds the runs of other gpu_benchmarks.json to it
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import torch
from gpu_floors import Ceilings
from gpu_protocol import (
    NOT_RUN,
    ROOT,
    Benchmark,
    DeviceTimer,
    Place,
    Row,
    append,
    clocks,
    conditions,
    host_timer,
    load,
    measure_ceilings,
    page,
    run,
)

TESTS = Path(__file__).parent
REGISTRIES = ("bench_gpu_kernels", "bench_gpu_attention", "bench_gpu_model")
SECONDS = 540  # of a group; nothing may take ten minutes
EACH = 400  # of a benchmark, compiling included
TEST_PROCESSES = 6  # compiling keeps the processor busy, not the GPU


def registered(modules: Sequence[str] = REGISTRIES) -> list[Benchmark]:
    """All benchmarks, by their number."""
    found = [benchmark for module in modules for benchmark in import_module(module).BENCHMARKS]
    return sorted(found, key=lambda benchmark: int(benchmark.name.split()[0].removeprefix("D")))


def group_names(benchmarks: Sequence[Benchmark]) -> list[str]:
    return ["correctness", "ceilings", *dict.fromkeys(benchmark.group for benchmark in benchmarks)]


def chosen(names: Sequence[str], benchmarks: Sequence[Benchmark]) -> list[str]:
    """The groups to run, in their order.

    Raises:
        ValueError: there is no such group.
    """
    known = group_names(benchmarks)
    wanted = {part for name in names for part in name.split(",")} or {"all"}
    if unknown := sorted(wanted - {*known, "all"}):
        raise ValueError(f"GROUP={unknown[0]}: choose from all, {', '.join(known)}")
    return [name for name in known if name in wanted or "all" in wanted]


def environment() -> dict[str, str]:
    """Of a child: the package and the tests can be imported, the current folder cannot."""
    paths = [os.fspath(TESTS), os.fspath(ROOT / ".ns"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


def in_process(command: Sequence[str], seconds: float, log: Path | None = None) -> str:
    """Runs a command in a session of its own, and ends all of it in time; says "", or what became of it."""
    with log.open("ab") if log else nullcontext() as file:
        process = subprocess.Popen(command, env=environment(), start_new_session=True, stdout=file, stderr=file)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"timed out after {seconds:.0f} s"
        finally:  # its own children, compilers among them, go with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "" if code == 0 else f"crashed with exit code {code}"


def run_group(
    group: str, modules: Sequence[str], device: str, seconds: float = SECONDS, each: int = EACH
) -> dict[str, Any]:
    """One group in children: where one dies, the next goes on after the benchmark that killed it."""
    deadline = time.monotonic() + seconds
    entry: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    keys = [b.key for b in registered(modules) if b.group == group]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        while not entry or any(key not in rows for key in keys):
            file.write_text("")
            command = [sys.executable, __file__, "--child", group, "--rows", os.fspath(file), "--device", device]
            command += ["--registries", ",".join(modules), "--done", json.dumps(list(rows)), "--each", str(each)]
            left = deadline - time.monotonic()
            outcome = in_process(command, left) if left > 0 else "no time was left"
            started = ""
            for line in file.read_text().rpartition("\n")[0].splitlines():  # the last may be cut short
                told = json.loads(line)
                started = told.pop("start", "") or ("" if told.get("finished") else started)
                if "row" in told:
                    rows[told["row"]["key"]] = told["row"]
                entry |= told.get("entry", {})
            if not outcome:
                break
            if outcome == f"crashed with exit code {-signal.SIGALRM}":
                outcome = f"took more than {each} s"
            notes.append(f"{started}: {outcome}" if started else outcome)
            if not started or time.monotonic() > deadline:
                break
            rows.setdefault(started, asdict(Row(started, outcome)))
    for key in keys:
        rows.setdefault(key, asdict(Row(key, f"not run ({notes[-1] if notes else 'the child told nothing'})")))
    return entry | {"rows": list(rows.values()), "note": "; ".join(notes)}


def child(group: str, file: Path, modules: Sequence[str], device: torch.device, done: Sequence[str], each: int) -> None:
    """Measures a group's ceilings and benchmarks, telling each step to ``file``; the alarm ends what hangs."""
    with file.open("a") as stream:

        def tell(**what: Any) -> None:
            stream.write(json.dumps(what) + "\n")
            stream.flush()

        timer = DeviceTimer() if device.type == "cuda" else host_timer
        before = clocks()
        ceilings = measure_ceilings(device, timer)
        print_ceilings(ceilings, before)
        tell(entry={"ceilings": asdict(ceilings), "clocks": before})
        place = Place(device, "triton" if device.type == "cuda" else "torch")
        for benchmark in registered(modules):
            if benchmark.group != group or benchmark.key in done:
                continue
            tell(start=benchmark.key)
            signal.alarm(each)
            row = run(benchmark, place, timer, ceilings, lambda row: tell(row=asdict(row)))
            print(f"{benchmark.key}: {row.status} {row.correctness} {row.values} {row.peers}", flush=True)
            signal.alarm(0)
            tell(finished=True)
            if device.type == "cuda":
                torch.cuda.synchronize()  # after an illegal access the process is lost; a new one goes on
                torch.cuda.empty_cache()
        tell(entry={"clocks": f"{before} -> {clocks()}"})


def print_ceilings(ceilings: Ceilings, state: str) -> None:
    rates = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in ceilings.flops.items())
    print(f"ceilings: {rates} TFLOP/s, copy {ceilings.bytes / 1e12:.2f} TB/s; {state}", flush=True)


def kernel_tests() -> list[tuple[Path, list[str]]]:
    """The files to run on the GPU, and how: those of Triton kernels whole, of others the tests marked gpu."""
    whole = [*sorted(TESTS.glob("test_*_triton.py")), TESTS / "test_numerics.py", TESTS / "test_dispatch.py"]
    marked = [p for p in sorted(TESTS.glob("test_*.py")) if "pytest.mark.gpu" in p.read_text() and p not in whole]
    marked = [path for path in marked if path.name != "test_gpu_bench.py"]
    return [(path, []) for path in whole] + [(path, ["-m", "gpu"]) for path in marked]


def run_tests(files: Sequence[tuple[Path, list[str]]], seconds: float = SECONDS) -> dict[str, str]:
    """Several files at a time, each in a process, and the verdict of each.

    conftest.py stays out: it imports what runs need, hydra and wandb among it, and a bare machine lacks. The fixtures
    of thread_fixtures.py are there.
    """
    deadline = time.monotonic() + seconds

    def one(job: tuple[Path, list[str]]) -> tuple[str, str]:
        path, options = job
        with TemporaryDirectory() as folder:
            report, log = Path(folder) / "report.xml", Path(folder) / "log"
            command = [
                sys.executable,
                "-m",
                "pytest",
                os.fspath(path),
                *options,
                "--noconftest",
                f"--junitxml={report}",
            ]
            command += [
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                f"--rootdir={ROOT}",
                f"-c={ROOT / 'pyproject.toml'}",
            ]
            left = deadline - time.monotonic()
            outcome = in_process(command, left, log) if left > 0 else "no time was left"
            told = verdict(report, outcome)
            if "passed" not in told or "failed" in told:
                print(log.read_text(errors="replace")[-6000:] if log.exists() else "", flush=True)
        print(f"{path.name}: {told}", flush=True)
        return path.name, told

    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        return dict(pool.map(one, files))


def verdict(report: Path, outcome: str) -> str:
    """Counts from pytest's JUnit file, or what became of the process."""
    if not report.exists():
        return outcome or "wrote no report"
    suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    counts = {"passed": passed, "failed": failed, "skipped": skipped}
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n or name == "passed") + f" in {suite['time']} s"


def groups(
    names: Sequence[str], measure: Callable[[str], Mapping[str, Any]], test: Callable[[], Mapping[str, str]]
) -> Iterator[dict[str, Any]]:
    for name in names:
        print(f"== {name}", flush=True)
        yield {"group": name} | ({"tests": test()} if name == "correctness" else dict(measure(name)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OPENV4_GPU_RESULTS", os.fspath(ROOT / "docs" / "results"))
    parser.add_argument("groups", nargs="*", metavar="GROUP")
    parser.add_argument("--output", type=Path, default=Path(default), help="folder of the results")
    parser.add_argument("--list", action="store_true", help="name the groups")
    parser.add_argument("--table", action="store_true", help="draw the table anew; measures nothing")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="results of other runs, to add")
    parser.add_argument("--device", default="cuda", help="cpu tries the benchmarks out; its times mean nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--registries", default=",".join(REGISTRIES), help=argparse.SUPPRESS)
    parser.add_argument("--done", default="[]", help=argparse.SUPPRESS)
    parser.add_argument("--each", type=int, default=EACH, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    modules, device = options.registries.split(","), torch.device(options.device)
    if options.child:
        child(options.child, options.rows, modules, device, json.loads(options.done), options.each)
        return 0
    benchmarks = registered(modules)
    if options.list:
        print("\n".join(group_names(benchmarks)))
        return 0
    data, text = options.output / "gpu_benchmarks.json", options.output / "gpu_benchmarks.md"
    measures = not options.table and not options.merge
    for file in options.merge:
        for entry in load(file)["runs"]:
            append(data, entry)
    if measures:
        try:
            names = chosen(options.groups, benchmarks)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if device.type == "cuda" and not torch.cuda.is_available():
            print(f"{NOT_RUN}: torch {torch.__version__} of {sys.executable} finds no CUDA device", file=sys.stderr)
            return 1
        where = conditions(device)
        for entry in groups(names, lambda g: run_group(g, modules, options.device), lambda: run_tests(kernel_tests())):
            results = append(data, entry | {"conditions": where})
            text.write_text(page(benchmarks, results))
    options.output.mkdir(parents=True, exist_ok=True)
    text.write_text(page(benchmarks, load(data)))
    print(text.read_text())
    return int(measures and not sound(load(data)["runs"][-len(names) :]))


def sound(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no test failed and no benchmark computed something wrong; one that could not run is told, no more."""
    verdicts = [told for entry in entries for told in entry.get("tests", {}).values()]
    rows = [row for entry in entries for row in entry.get("rows", ())]
    return all("passed" in told and "failed" not in told for told in verdicts) and all(
        row["status"] != "wrong" for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
