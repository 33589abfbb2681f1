"""Signals that ask a run to stop in time."""

import os
import signal
import threading
import time
from typing import Any


class StopSignal:
    """Notes a first SIGUSR1 or SIGTERM, as SLURM sends some minutes before it kills, so that the step can end and the
    run be saved; a second one, some seconds later, ends the process as it does by default. (Sooner it is the first one
    on another way: from a launcher and from SLURM.)

    Attributes:
        signal: its name, once it has come.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
    SECONDS = 5.0

    def __init__(self) -> None:
        self.signal, self._noted = "", 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if not self.signal:
            self.signal, self._noted = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() > self._noted + self.SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
