"""The page of results on a loopback port, made again when runs change: `hcnet report --watch`."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hcnet_cli.console import UserError, notice

HOST = "127.0.0.1"  # nothing but this machine reaches the page
HOST_NAMES = (HOST, "localhost")  # that a browser may have asked for; another name may be a stranger's, led here
WATCHED = ("runs/*/run.json", "runs/*/metrics.jsonl", "runs/*/*.png", "runs/*/final", "runs/*/explain")
WATCHED_STUDIES = ("studies/*.json", "studies/*/*.log", "slurm/*/*")


class LivePage:
    """The page and its version. `make` gives the page of a version, which the browser compares with `/version`."""

    def __init__(self, folders: Sequence[Path], make: Callable[[str], str]) -> None:
        self.folders, self.make = folders, make
        self.made: tuple[str, bytes] = ("", b"")
        self.lock = threading.Lock()

    def version(self) -> str:
        """A text that changes when a file of a run or a study does."""
        seen = []
        for folder in self.folders:
            for pattern in (*WATCHED, *WATCHED_STUDIES):
                for path in folder.glob(pattern):
                    try:
                        stat = path.stat()
                    except OSError:
                        continue  # a link that leads nowhere, or a file that was just replaced
                    seen.append((str(path), stat.st_mtime_ns, stat.st_size))
        return f"{hash(tuple(sorted(seen))) & 0xFFFFFFFFFFFFFFFF:016x}"

    def page(self) -> bytes:
        """The page of the runs as they are now."""
        with self.lock:
            version = self.version()
            if version != self.made[0]:
                self.made = version, self.make(version).encode("utf-8", "backslashreplace")
            return self.made[1]


def server(live: LivePage, port: int) -> ThreadingHTTPServer:
    """A server of the page at / and of its version at /version, and of nothing else; port 0: any that is free.

    UserError for a port that cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "hcnet", ""

        def do_GET(self) -> None:
            name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if name not in HOST_NAMES:
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"Not this host.\n")
            elif self.path == "/":
                try:
                    self._answer(HTTPStatus.OK, "text/html", live.page())
                except UserError as error:
                    self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n".encode())
            elif self.path == "/version":
                self._answer(HTTPStatus.OK, "text/plain", live.version().encode())
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is one page: /\n")

        def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the browser has gone to another page
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    try:
        made = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror or error}"
        raise UserError(
            f"Port {port} {reason}.", hint="Choose another with --port; 0 takes one that is free."
        ) from None
    made.daemon_threads = True
    return made


def serve(live: LivePage, port: int) -> None:
    """Serves the page until Ctrl-C."""
    with server(live, port) as running:
        notice(f"The page is at http://{HOST}:{running.server_port}/ and follows the runs. Ctrl-C ends it.")
        try:
            running.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            notice("Ended.")
