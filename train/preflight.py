"""What is checked before many processes train for hours: that they meet, and that they are about to do the same.

In this order, at the start of every process::

    check_layout(config, world)                          # what the numbers contradict; no torch, no network
    store = meet(rank, world, address, port)             # everybody is there, or one line says who is not
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    preflight(config, rank, local_rank, partial(gather_json, device=device), fingerprint)

What is exchanged is JSON text in tensors of bytes; nothing is pickled. Importing this file does not import torch.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..model.accounting import checkpoint_bytes
from ..model.memory import Layout
from .cluster import Cluster, GpuConfig
from .config import ConfigError, TrainConfig, to_yaml
from .planning import Placement, rows_per_step, stage_memory, why_indivisible

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

T = TypeVar("T")

# Every rank's value, as JSON can hold it, to the list of all by rank: ``gather_json``, or a test's own.
Gather = Callable[[Any], list[Any]]

# How long the processes wait for each other: a minute, and what the others need to hear of it.
MEET_SECONDS = 45.0
# How long a file that another node has written may take to be seen: caches of network file systems.
SEEN_SECONDS = 10.0
_SHOWN = 6
# What `training_memory` calls them.
WEIGHTS = ("routed experts", "other weights")


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, our own script for srun, ourselves) has started this process as one of
    several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class PreflightError(ConfigError):
    """Processes that must not train together; ``problems`` holds a line for each, the same lines on every rank."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        super().__init__("; ".join(problems[:_SHOWN]) + more)
        self.problems = tuple(problems)


# Before there are processes.


def check_layout(config: TrainConfig, processes: int) -> None:
    """Refuses a number of processes that contradicts the model, a stage or ``parallel.*``.

    Raises:
        ConfigError: with the numbers, and which stage it is.
    """
    parallel = config.parallel
    for key in ("expert", "context"):
        if processes % getattr(parallel, key):
            raise ConfigError(
                f"parallel.{key}={getattr(parallel, key)} does not divide the number of processes, {processes}"
            )
    layout = Layout(processes, parallel.expert, parallel.context)
    for stage in config.stages:
        if reason := why_indivisible(config, stage, layout):
            raise ConfigError(f"stage {stage.name!r} on {processes} processes: parallel.{reason}")


def check_memory(config: TrainConfig, processes: int, here: int) -> None:
    """Refuses a run that the memory of this machine, swap included, cannot hold, before any of it is made.

    One process on a CPU is taken for what `openv4 plan` expects of it, less the tenth by which that may be wrong. Of
    others only what is certain counts: on CPUs the weights and optimizer state that all hold together, on GPUs the
    weights, which are made in the CPU's memory.

    Args:
        processes: of the run; here: of them, those of this machine.

    Raises:
        ConfigError: with both sizes.
    """
    gpu = config.device != "cpu" and Path("/dev/nvidiactl").exists()
    if gpu and config.pretrained:  # read straight into the GPU's memory
        return
    cpu = GpuConfig("this machine", None, 1, 1, 1, 1, 1, 1, 1, 1, "cpu")  # its rates are not asked for
    machine = Cluster(cpu, 1, compute=config.precision.compute)
    have = machine_memory()
    for stage in config.stages:
        rows = min(rows_per_step(stage), max(1, config.micro_batch_tokens // stage.sequence_length))
        items = stage_memory(config, stage, machine, Placement(Layout(), rows, config.recompute))
        certain = WEIGHTS if gpu else (*WEIGHTS, "optimizer state")
        counted = [i for i in items if i.name in certain] if gpu or processes > 1 else items
        needed = 0.9 * sum(item.bytes for item in counted) * here / processes
        if needed > have:
            raise ConfigError(
                f"stage {stage.name!r} needs at least {_gb(needed)} of memory, this machine has {_gb(have)}; choose a "
                "smaller model or fewer micro_batch_tokens (`openv4 plan` says what a run fits on)"
            )


def machine_memory() -> int:
    """Bytes that this machine has, or the control group that this process is in; with its swap, where Linux tells."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, about = Path("/sys/fs/cgroup/memory.max"), Path("/proc/meminfo")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    swap = re.search(r"SwapTotal: +(\d+) kB", about.read_text()) if about.exists() else None
    return memory + (1024 * int(swap[1]) if swap else 0)


def idle(config: TrainConfig, processes: int) -> list[str]:
    """A line for each stage whose steps have no row for some of the processes: possible, but these wait."""
    lines = []
    for stage in config.stages:
        rows, groups = rows_per_step(stage), processes // config.parallel.context
        if rows < groups:
            lines.append(
                f"stage {stage.name!r} has {rows} rows of {stage.sequence_length:,} tokens a step for {groups} "
                f"{'processes' if config.parallel.context == 1 else 'groups of processes'}: {groups - rows} have none"
            )
    return lines


# Where they meet.


def meet(rank: int, world: int, address: str, port: int, seconds: float = MEET_SECONDS) -> "Store":
    """The store at ``address:port``, which rank 0 opens, once every rank is there.

    Under torchrun its agent has opened the store already.

    Raises:
        PreflightError: the port is taken, the address is not rank 0's, or ranks do not come; within ``seconds``, and a
            quarter more on the ranks that hear of it.
    """
    from torch._C._distributed_c10d import PrefixStore, TCPStore
    from torch.distributed import DistError

    where = f"{address}:{port} (MASTER_ADDR:MASTER_PORT)"
    host, deadline = host_name(), time.monotonic() + seconds
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if opens and (reason := _cannot_listen(port)):
        raise PreflightError([f"rank 0 ({host}): cannot open {where}: {reason}; choose another MASTER_PORT"])
    try:
        options: dict[str, Any] = {"timeout": timedelta(seconds=seconds), "wait_for_workers": False}
        if opens and (listener := _on_this_machine(address, port)):
            options["master_listen_fd"] = listener.detach()
        opened = _within(seconds, lambda: TCPStore(address, port, world, opens, **options))
        # A run's own part of it, so that a stranger at a port that two jobs share is not taken for one of ours.
        job = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
        store = PrefixStore("/".join(("openv4", *job)), opened)
        store.set(f"rank/{rank}", host)
    except (DistError, RuntimeError, ValueError) as error:
        reason = _first_line(error)
        raise PreflightError([f"rank {rank} ({host}): no rank 0 at {where} within {seconds:.0f} s: {reason}"]) from None
    if rank == 0:
        missing = list(range(world))
        while missing and time.monotonic() < deadline:
            missing = [other for other in missing if not store.check([f"rank/{other}"])]
            if missing:
                time.sleep(0.05)
        told = f"{_ranks(missing)} of {world} did not come to {where} within {seconds:.0f} s" if missing else ""
        store.set("all", told)
        if missing:
            time.sleep(1.0)  # the store ends with this process; those who came shall read why
    else:
        try:
            store.wait(["all"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + seconds / 4))
            told = store.get("all").decode()
        except (DistError, RuntimeError) as error:
            told = f"{where}: rank 0 is gone: {_first_line(error)}"
    if told:
        raise PreflightError([f"rank {rank} ({host}): {told}"])
    return store


def _cannot_listen(port: int) -> str:
    """Why a port cannot be opened here; nothing if it can. (A store finds out too, but says it in a page.)"""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return f"port {port}: {error.strerror}"
    return ""


def _on_this_machine(address: str, port: int) -> socket.socket | None:
    """A socket for a store that other machines cannot reach, where the address is for this machine alone (a store of
    its own making listens to all). None: it is not, or the port was taken a moment ago, which the store will say."""
    if address not in ("127.0.0.1", "localhost"):
        return None
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The function's result. A store waits without end for somebody who listens at its port and is no store."""
    results: list[T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)  # left behind if it waits without end: the process ends
    thread.start()
    thread.join(seconds + 1)
    if errors:
        raise errors[0]
    if not results:
        raise RuntimeError("whoever listens there does not answer")
    return results[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def host_name() -> str:
    """This node, as SLURM or the system calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# What they tell each other.


def gather_json(value: Any, device: "torch.device | str" = "cpu", group: "ProcessGroup | None" = None) -> list[Any]:
    """The values of all ranks, by rank, as JSON in byte tensors on ``device`` (NCCL: the rank's GPU). Nothing is
    pickled; a collective of ``group``, by default of all, on every rank at once."""
    import torch
    from torch import distributed

    text = json.dumps(value).encode()
    world = distributed.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    distributed.all_gather(sizes, torch.tensor([len(text)], dtype=torch.int64, device=device), group)
    longest = max(int(size) for size in sizes)
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    texts = [torch.zeros_like(mine) for _ in range(world)]
    distributed.all_gather(texts, mine, group)
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]


@dataclass(frozen=True)
class Facts:
    """What one rank knows about itself.

    Attributes:
        gpus: CUDA devices that it sees.
        output: the run's folder, absolute.
        problem: what keeps it from writing there; nothing if nothing does.
        free, needed: bytes of the file system of that folder.
        same: what has to be the same everywhere, by name.
    """

    rank: int
    local_rank: int
    host: str
    gpus: int
    output: str
    problem: str
    free: int
    needed: int
    same: dict[str, str]


def preflight(
    config: TrainConfig, rank: int, local_rank: int, gather: Gather, fingerprint: str = "", gpus: int | None = None
) -> list[Facts]:
    """Compares all ranks, and refuses to go on where they cannot train together or this run cannot be saved.

    A collective: every rank calls it, gathers twice, and comes to the same result. Checked are: a GPU for each process
    of a node; the output folder, one and the same for all, writable, with space for two checkpoints (one, where the run
    has one already); versions of openv4, torch and Python; the config; the data.

    Args:
        gather: ``gather_json``.
        fingerprint: of the opened data.
        gpus: CUDA devices that this process sees; None: as torch says.

    Raises:
        PreflightError: a line for each problem, which names rank and host.
    """
    output, mark = Path(config.output), f".preflight-{secrets.token_hex(8)}"
    facts = facts_of(config, rank, local_rank, fingerprint, gpus)
    if rank == 0 and not facts.problem:
        try:
            (output / mark).touch()
        except OSError as error:  # the others wait in gather: they must hear of it there
            facts = replace(facts, problem=_unwritable(output, error))
    try:
        gathered = gather([asdict(facts), mark])
        everyone = [Facts(**values) for values, _ in gathered]
        seen = bool(everyone[0].problem) or _sees(output / gathered[0][1])
        visible = gather(seen)  # also: nobody looks any more
    finally:
        if rank == 0:
            (output / mark).unlink(missing_ok=True)
    if problems := [*compare(everyone, config.device), *_elsewhere(everyone, visible)]:
        raise PreflightError(problems)
    return everyone


def facts_of(config: TrainConfig, rank: int, local_rank: int, fingerprint: str = "", gpus: int | None = None) -> Facts:
    output = Path(config.output)
    size = checkpoint_bytes(config.model, config.optim.matrices, config.lora)
    # Two at a time: a new one is complete before an old one goes.
    needed = size * (1 if (output / "checkpoints" / "latest").exists() else 2)
    problem, free = "", 0
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".preflight-{secrets.token_hex(8)}"
        probe.write_bytes(b"openv4")
        probe.unlink()
        free = shutil.disk_usage(output).free
    except OSError as error:
        problem = _unwritable(output, error)
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    same = {
        "openv4": f"{importlib.metadata.version('openv4')}, source {source_hash()}",
        "torch": importlib.metadata.version("torch"),
        "Python": platform.python_version(),
        "config": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
        "data": fingerprint[:24],
    }
    return Facts(rank, local_rank, host_name(), gpus, str(output.resolve()), problem, free, needed, same)


def _unwritable(output: Path, error: OSError) -> str:
    return f"cannot write to output={output} ({error.strerror or error})"


def source_hash() -> str:
    """Of all Python files of this package: unlike a commit, it knows what is not committed."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("kernels", "data", "model", "optim", "train", "launch"):
        for path in sorted((root / folder).glob("*.py")):
            found.update(f"{folder}/{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def compare(everyone: Sequence[Facts], device: str = "auto") -> list[str]:
    """A line for each problem of what all ranks told, the folder's identity aside."""
    return [*_without_gpu(everyone, device), *_cannot_save(everyone), *_differing(everyone)]


def _without_gpu(everyone: Sequence[Facts], device: str) -> Iterator[str]:
    if device == "cpu" or (device == "auto" and not any(facts.gpus for facts in everyone)):
        return
    processes = Counter(facts.host for facts in everyone)
    told: set[str] = set()
    for facts in everyone:
        if facts.gpus < processes[facts.host] and facts.host not in told:
            told.add(facts.host)
            yield (
                f"rank {facts.rank} ({facts.host}): {facts.gpus} GPUs for the {processes[facts.host]} processes of the "
                "node; start as many processes as it has GPUs, and let each see all of them"
            )


def _cannot_save(everyone: Sequence[Facts]) -> Iterator[str]:
    for facts in _one_a_host(everyone):
        if facts.problem:
            yield f"rank {facts.rank} ({facts.host}): {facts.problem}"
        elif facts.free < facts.needed:
            yield (
                f"rank {facts.rank} ({facts.host}): {_gb(facts.free)} free at output={facts.output}, checkpoints need "
                f"{_gb(facts.needed)}; free some space or choose another output"
            )


def _one_a_host(everyone: Sequence[Facts]) -> Iterator[Facts]:
    """Of ranks of one node that tell the same, the first."""
    told: set[tuple[str, str, bool]] = set()
    for facts in everyone:
        kind = facts.host, facts.problem, facts.free < facts.needed
        if kind not in told:
            told.add(kind)
            yield facts


def _differing(everyone: Sequence[Facts]) -> Iterator[str]:
    """What is not the same everywhere; right is what most ranks have, of equally many what the lowest has."""
    for key in everyone[0].same:
        values: dict[str, list[Facts]] = {}
        for facts in everyone:
            values.setdefault(facts.same[key], []).append(facts)
        usual = max(values, key=lambda value: len(values[value]))
        for value, odd in values.items():
            if value != usual:
                first = odd[0]
                yield (
                    f"{_ranks([facts.rank for facts in odd])} ({first.host}): {key} {value or 'none'}, but "
                    f"{_ranks([facts.rank for facts in values[usual]])} {'has' if len(values[usual]) == 1 else 'have'} "
                    f"{usual or 'none'}"
                )


def _elsewhere(everyone: Sequence[Facts], visible: Sequence[bool]) -> Iterator[str]:
    for facts, sees in zip(everyone, visible, strict=True):
        if not sees and not facts.problem:
            yield (
                f"rank {facts.rank} ({facts.host}): output={facts.output} is another folder than that of rank 0 "
                f"({everyone[0].host}); choose one on a file system that all nodes share"
            )


def _sees(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-3, 8``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
