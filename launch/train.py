"""``openv4 train``: pretraining and fine-tuning, from prepared data to checkpoints. The same command again resumes.

Under ``torchrun``, ``deepspeed`` or ``srun`` it is one of the run's processes; with ``parallel.nproc`` it starts them.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from ..train.config import REQUEUE_EXIT, ConfigError, TrainConfig, to_yaml
from ..train.preflight import check_layout, check_memory, launched

CONFIG = TrainConfig

# After one process has failed, the others may end by themselves for so many seconds, and then when told to.
GRACE = 5.0
_CHILD = "import sys; from openv4.launch.cli import main_of_process; main_of_process(sys.argv[1])"


def run(config: TrainConfig) -> None:
    nproc = config.parallel.nproc
    environment = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check_memory(config, *(environment if launched() else (nproc, nproc)))
    import torch  # with what needs it: two seconds, which a refusal need not wait for

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch finds no CUDA device here; use device=auto or cpu")
    if launched() or nproc == 1:
        from ..train.loop import train

        train(config)
        return
    check_layout(config, nproc)
    if code := start_processes(config):
        sys.exit(code)


def start_processes(config: TrainConfig) -> int:
    """Trains in ``parallel.nproc`` processes on this machine; returns 0, or the exit code of the one that failed.

    Signals are passed on. Where one process fails, the others are stopped, and it is named (``cause``).
    """
    count = config.parallel.nproc
    with TemporaryDirectory(prefix="openv4-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config))
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            # Else gloo listens where the machine's name leads, which others may reach.
            **({"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")} if sys.platform == "linux" else {}),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
        }
        command = [sys.executable, "-P", "-c", _CHILD, str(file)]
        children = [
            subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]

        def pass_on(number: int, frame: object) -> None:
            for child in children:
                if child.poll() is None:
                    child.send_signal(number)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            return _watch(children)
        finally:
            for child in children:
                child.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


def _watch(children: list[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended; says which is why."""
    ended: dict[int, int] = {}  # exit codes by rank, as they come
    failed, deadline = None, 0.0
    while len(ended) < len(children):
        for rank, child in enumerate(children):
            if rank not in ended and (code := child.poll()) is not None:
                ended[rank] = code
        now = time.monotonic()
        if not deadline and any(code not in (0, REQUEUE_EXIT) for code in ended.values()):
            # Who has saved in time waits for nobody, and nobody for it: the others end by themselves.
            deadline = now + GRACE
        if deadline and now > deadline:
            failed = cause(ended) if failed is None else failed  # of those who ended untold
            for child in children:
                child.terminate() if now < deadline + GRACE else child.kill()
        time.sleep(0.05)
    failed = cause(ended) if failed is None else failed
    if failed is None:
        return 0
    code = ended[failed]
    if code < 0:
        name = signal.Signals(-code).name
        print(
            f"error: process {failed} of {len(children)} was ended by {name}; the others were stopped", file=sys.stderr
        )
        return 128 - code
    if len(set(ended.values())) > 1:
        print(f"error: process {failed} of {len(children)} ended with exit code {code}", file=sys.stderr)
    return code


def cause(ended: dict[int, int]) -> int | None:
    """Which rank, of exit codes in the order they were seen, is why the run ended; None where all is well.

    The others lose their connections to a killed process before the kernel reports its end, and may well be seen to
    end earlier; so a signal goes before an exit code. Not SIGABRT: with it a communication library ends its own
    process when another is gone. One that has saved and asks to be started again is the cause only when none failed.
    """

    def weight(rank: int) -> int:
        code = ended[rank]
        return 0 if code < 0 and code != -signal.SIGABRT else 2 if code == REQUEUE_EXIT else 1

    return min((rank for rank, code in ended.items() if code), key=weight, default=None)


def die_with_parent() -> None:
    """Asks the kernel to end this process when the one that started it ends, however it does (Linux)."""
    parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
