"""Standard output and error of a long run, which must not end it: their reader may leave (``openv4 train | head -1``),
a terminal be closed, the disk of a log be full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Lasting:
    """A stream of text for which a failing write is the last one: what follows goes nowhere, and nobody is stopped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with suppress(OSError):  # a stream that is no file, as in tests
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # what is still buffered fails no more either
                os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within, no write to standard output or error fails."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else _Lasting(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
