"""Google Cloud Storage's XML API on loopback, as much of it as storing objects takes: put, get, list."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self._name()] = body  # type: ignore[attr-defined]
        self._answer(200, b"")

    def do_GET(self) -> None:
        objects: dict[str, bytes] = self.server.objects  # type: ignore[attr-defined]
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            found = [
                f"<Contents><Key>{escape(name)}</Key><Size>{len(body)}</Size><ETag>e</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for name, body in sorted(objects.items())
                if name.startswith(prefix)
            ]
            text = f"<?xml version='1.0'?><ListBucketResult>{''.join(found)}</ListBucketResult>"
            self._answer(200, text.encode())
        elif (body := objects.get(self._name())) is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._answer(200, body)

    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/bucket/")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "ETag": '"e"',
            "Last-Modified": formatdate(0, usegmt=True),
            "x-goog-generation": "1",
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Serve an empty bucket named `bucket`; gives its objects by name. `folder` is for the key file."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.objects = {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    key = {"gcs_base_url": f"http://127.0.0.1:{server.server_port}", "disable_oauth": True}
    (folder / "key.json").write_text(json.dumps({**key, "client_email": "", "private_key": "", "private_key_id": ""}))
    patch.setenv("GOOGLE_SERVICE_ACCOUNT", str(folder / "key.json"))
    patch.setenv("GOOGLE_ALLOW_HTTP", "true")
    yield server.objects  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()
