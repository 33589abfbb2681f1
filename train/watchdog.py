"""A thread that watches whether a run of several processes goes on, and says which of them holds it up.

Every process tells a store, apart from training, where its main thread stands: waiting for others, or at something of
its own. Where no step ends for ``seconds``, each prints its stack, and the first process names those that hold the
others up: who does not answer any more (stopped, or gone), or else who is not waiting. That is before the process group
gives up (``parallel.timeout_minutes``), which says neither. Where steps end, but one process works nearly all the time
while the others wait for half of it or more, it is named as slow. (On a GPU a wait for others can look like one for
the device, so that slow processes may stay unnamed.)
"""

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A process that has not told the store for so long does not answer.
SILENT_SECONDS = 5.0
# Shares of the time: who works more than the first while the others work less than the second holds them up.
BUSY, WAITING = 0.8, 0.5
_LEAST_LOOKS = 8
_WAITING = ("torch/distributed/", "deepspeed/comm/")


class Watchdog:
    """Watches from ``with`` to its end.

    Args:
        store: a connection that nobody else uses; rank, world: of this process.
        seconds: without an end of a step, after which something is said; again after as long.
        tell: is given what the first process finds: "hang" or "slow", and a line.
    """

    def __init__(
        self, store: "Store", rank: int, world: int, host: str, seconds: float, tell: Callable[[str, str], None]
    ) -> None:
        self._store, self._rank, self._world, self._host = store, rank, world, host
        self._seconds, self._tell = seconds, tell
        self._step, self._since = 0, time.monotonic()
        self._main = threading.main_thread().ident
        self._looks, self._busy = 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(SILENT_SECONDS)

    def step(self, step: int) -> None:
        """Training has come to this step."""
        self._step, self._since = step, time.monotonic()

    def _watch(self) -> None:
        told = compared = time.monotonic()
        while not self._stop.wait(min(1.0, self._seconds / 20)):
            try:
                self._report()
                now = time.monotonic()
                if now - compared > self._seconds:
                    compared = now
                    if self._rank == 0 and (slow := self._slow()):
                        self._tell("slow", slow)
                    self._looks = self._busy = 0
                if min(now - self._since, now - told) > self._seconds:
                    told = now
                    self._print_stack(now - self._since)
                    if self._rank == 0:
                        still = f"no step has ended for {now - self._since:.0f} s, at step {self._step}"
                        self._tell("hang", f"{still}: {self._culprits()}")
            except RuntimeError:  # the store is gone, and with it the first process; the launcher says so
                return

    def _report(self) -> None:
        stack = traceback.extract_stack(self._frame())
        waits = any(part in frame.filename for frame in stack for part in _WAITING) or ".wait(" in (
            stack[-1].line or ""
        )
        own = next((f for f in reversed(stack) if not any(part in f.filename for part in _WAITING)), stack[-1])
        place = f"{Path(own.filename).name}:{own.lineno} {own.name}"
        self._looks, self._busy = self._looks + 1, self._busy + (not waits)
        share = self._busy / self._looks if self._looks >= _LEAST_LOOKS else None
        found = {"host": self._host, "waits": waits, "place": place, "busy": share, "time": time.time()}
        self._store.set(f"watchdog/{self._rank}", json.dumps(found))

    def _told(self) -> dict[int, dict[str, Any]]:
        """What the processes have told last; nothing of one that never has."""
        found: dict[int, dict[str, Any]] = {}
        for rank in range(self._world):
            key = f"watchdog/{rank}"
            found[rank] = json.loads(self._store.get(key)) if self._store.check([key]) else {}
        return found

    def _slow(self) -> str:
        found = self._told()
        shares = {rank: each["busy"] for rank, each in found.items() if each.get("busy") is not None}
        if len(shares) < self._world:
            return ""
        worst = max(shares, key=lambda rank: shares[rank])
        others = median(share for rank, share in shares.items() if rank != worst)
        if shares[worst] < BUSY or others > WAITING:
            return ""
        place, host = found[worst]["place"], found[worst]["host"]
        return (
            f"rank {worst} ({host}) works {shares[worst]:.0%} of the time, the others, who wait for it, {others:.0%}; "
            f"last seen at {place}"
        )

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main or 0)

    def _print_stack(self, still: float) -> None:
        stack = "".join(traceback.format_stack(self._frame()))
        print(
            f"rank {self._rank} ({self._host}): no step has ended for {still:.0f} s\n{stack}",
            file=sys.stderr,
            flush=True,
        )

    def _culprits(self) -> str:
        """The processes that the others wait for."""
        found = self._told()
        newest = max((each.get("time", 0.0) for each in found.values()), default=0.0)
        silent = {rank: newest - each.get("time", 0.0) for rank, each in found.items()}
        lost = [rank for rank, seconds in silent.items() if seconds > SILENT_SECONDS]
        if lost:
            return "; ".join(
                f"rank {rank} ({found[rank].get('host', 'unknown')}) has not answered for {silent[rank]:.0f} s"
                for rank in lost[:8]
            )
        busy = [rank for rank, each in found.items() if not each["waits"]]
        if not busy:
            return "all processes wait for each other"
        return "; ".join(
            f"rank {rank} ({found[rank]['host']}) is at {found[rank]['place']}, others wait" for rank in busy[:8]
        )
