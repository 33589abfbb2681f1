"""``openv4 report``: one page about one or several runs, as a file that needs nothing else, or live."""

import errno
import getpass
import hashlib
import json
import math
import socket
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..train.config import ConfigError
from ..train.record import RunReader, open_runs
from .page import contents, page, stamp


@dataclass(frozen=True)
class ReportConfig:
    """Attributes:
    runs: folders of runs.
    output: the HTML file; null means report.html in the run's folder, for several runs in the current one.
    watch: serve the page on this machine instead, and keep it up to date while the runs go on.
    port: of the page that is served.
    interval: seconds between its updates.
    """

    runs: tuple[str, ...]
    output: str | None = None
    watch: bool = False
    port: int = 8421
    interval: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port={self.port} must be 1 to 65535, or 0 for any that is free")
        if not 0 < self.interval < math.inf:
            raise ConfigError(f"interval={self.interval} must be positive")


CONFIG = ReportConfig
POSITIONAL = "runs"


def run(config: ReportConfig) -> None:
    readers = open_runs(config.runs)
    if config.watch:
        watch(readers, config.port, config.interval)
        return
    default = readers[0].folder / "report.html" if len(readers) == 1 else Path("report.html")
    output = Path(config.output) if config.output else default
    if output.is_dir():
        raise ConfigError(f"output={output} is a folder; give the file to write, such as {output / 'report.html'}")
    values = contents([reader.read() for reader in readers])
    temporary = output.with_name(f".{output.name}")
    temporary.write_text(page(values | {"when": f"as of {stamp()}"}), encoding="utf-8")
    temporary.rename(output)
    print(f"report: {output}")


def watch(readers: list[RunReader], port: int, interval: float) -> None:
    """Serves the page to this machine alone until Ctrl-C.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        server = Server(readers, port, interval)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ConfigError(f"port={port}: {error.strerror}; give another, or port=0 for any that is free") from None
    port = server.server_address[1]
    print(f"report: http://127.0.0.1:{port}/ (Ctrl-C ends it)")
    print(
        f"from another machine: ssh -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}", flush=True
    )
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("report: ended")


class Server(ThreadingHTTPServer):
    """``/`` is the page, ``/data.json?have=<version>`` what it shows, without charts if they are still that version."""

    daemon_threads = True

    def __init__(self, readers: list[RunReader], port: int, interval: float) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.readers, self.interval, self._lock = readers, interval, threading.Lock()

    def contents(self) -> dict[str, Any]:
        with self._lock:
            values = contents([reader.read() for reader in self.readers])
        version = hashlib.sha256(json.dumps(values["charts"]).encode()).hexdigest()[:16]
        return values | {"version": version, "when": f"live, {stamp()}"}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        # A foreign page whose name was made to point at this machine would send that name.
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)
        elif path == "/":
            self._answer("text/html", page(self.server.contents(), self.server.interval))
        elif path == "/data.json":
            values = self.server.contents()
            if query == f"have={values['version']}":
                del values["charts"]
            self._answer("application/json", json.dumps(values))
        else:
            self.send_error(404)

    def _answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """No line on the terminal for every update."""
