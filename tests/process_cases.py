"""Runs a function in several processes that form a process group (gloo), and collects what each returns.

Started by path, this file is one of these processes.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist


def run_processes(
    function: str, count: int, *arguments: Any, timeout: float = 120, environment: dict[str, str] | None = None
) -> list[Any]:
    """What ``function``, named as "module:name", returns for ``arguments`` in each of ``count`` processes.

    Raises:
        AssertionError: a process failed, or not all were done in time; with what every process printed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(arguments, folder / "arguments")
        more = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        outputs = [(folder / f"output{rank}").open("w") for rank in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(folder), str(rank), str(count), function, str(timeout)],
                env=os.environ | more | (environment or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(outputs)
        ]
        deadline = time.monotonic() + timeout
        try:
            # One that has failed leaves the others waiting.
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
        finally:
            codes = [process.poll() for process in processes]
            for process, output in zip(processes, outputs, strict=True):
                process.kill()
                process.wait()
                output.close()
        said = "\n".join(f"--- {r}: {c}\n{(folder / f'output{r}').read_text()[-4000:]}" for r, c in enumerate(codes))
        assert codes == [0] * count, f"{function}: exit codes {codes} (None: still running after {timeout} s)\n{said}"
        return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(count)]


def main(folder: str, rank: str, count: str, function: str, timeout: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=float(timeout))
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(count), timeout=limit)
    module, name = function.split(":")
    arguments = torch.load(Path(folder) / "arguments", weights_only=False)
    torch.save(getattr(importlib.import_module(module), name)(*arguments), Path(folder) / f"result{rank}")
    leave()


def leave() -> NoReturn:
    """Ends a process of a group as the CLI does (``launch.cli._exit`` says why), once all of them are done."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
