"""A real web server on loopback that serves a folder, and misbehaves where it is told to."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

Answer = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Serves `server.folder`; the next fault of a path, if any, answers in its place."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: WebServer = self.server  # type: ignore[assignment]
        name = unquote(self.path).lstrip("/")
        server.requests.append(name)
        server.seen_headers.append(dict(self.headers))
        path = server.folder / name
        faults = server.faults[name] or server.faults["*"]
        data = path.read_bytes() if path.is_file() else None
        if faults:
            faults.pop(0)(self, data or b"")
        elif data is None:
            self.answer(404, b"no such file")
        else:
            self.answer(200, data)

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        """Send a whole answer."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class WebServer(ThreadingHTTPServer):
    """A folder at `url`.

    Attributes:
        requests: Names that were asked for, in order.
        faults: Name (or "*") to answers that come first.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.seen_headers: list[dict[str, str]] = []
        self.faults: dict[str, list[Answer]] = defaultdict(list)
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    """Serve a folder."""
    server = WebServer(folder)
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def status(code: int, **headers: str) -> Answer:
    """Answer with an error."""
    return lambda handler, data: handler.answer(code, b"not now", **headers)


def cut_short(handler: Handler, data: bytes) -> None:
    """Promise all and send half."""
    handler.answer(200, data[: len(data) // 2], Content_Length=str(len(data)))
    handler.close_connection = True


def shorter(handler: Handler, data: bytes) -> None:
    """Send half as if it were all."""
    handler.answer(200, data[: len(data) // 2])


def web_page(handler: Handler, data: bytes) -> None:
    """Answer as a network does that wants a login."""
    handler.answer(200, b"<!DOCTYPE html><html><body>Please log in</body></html>", Content_Type="text/html")


def flipped(handler: Handler, data: bytes) -> None:
    """Send all with one bit wrong."""
    wrong = bytearray(data)
    wrong[len(wrong) // 2] ^= 1
    handler.answer(200, bytes(wrong))


def endless(handler: Handler, data: bytes) -> None:
    """Send far more than there is."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(1000):
            handler.wfile.write(bytes(1 << 20))
    except OSError:
        pass
    handler.close_connection = True


def reset(handler: Handler, data: bytes) -> None:
    """Hang up without a word."""
    handler.connection.close()
    handler.close_connection = True


def stall(handler: Handler, data: bytes) -> None:
    """Send half, then nothing for a long time."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    time.sleep(3)
    handler.close_connection = True


def redirect(where: str) -> Answer:
    """Send to another URL."""
    return lambda handler, data: handler.answer(302, b"", Location=where)
