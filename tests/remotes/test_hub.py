"""A data set repository: the real client of the hub, against a hub on loopback that keeps commits in memory."""

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from kdcache import remotes
from kdcache.errors import AccessError, ConfigError, IncompleteStoreError
from kdcache.remotes import Patience, connect
from kdcache.remotes.hub import HubPlace
from kdcache.share import pull, push
from kdcache.store import check, open_store
from tests import tiny


class Hub(ThreadingHTTPServer):
    """One repository.

    Attributes:
        files: Path to content.
        commits: Paths of each, in order.
        token: That every request must have.
        broken: Statuses that the next requests get.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.token = "hf_secret"
        self.broken: list[int] = []
        self.made = False

    @property
    def head(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def hub(self) -> Hub:
        return self.server  # type: ignore[return-value]

    def answer(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        hub = self.hub()
        if hub.broken:
            self.answer(hub.broken.pop(0), {"error": "try again"})
        elif self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, {"error": "Invalid username or password."})
        else:
            return False
        return True

    def do_POST(self) -> None:
        hub, body = self.hub(), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if self.refused():
            return
        if path == "/api/repos/create":
            hub.made = True
            self.answer(200, {"url": "https://huggingface.co/datasets/me/logits"})
        elif path == "/api/validate-yaml":  # the client has the card's header looked at before it commits
            content = json.loads(body)["content"]
            header = yaml.safe_load(content.split("---\n")[1])
            wrong = [] if header["tags"] and header["configs"] else [{"message": "no tags or configs"}]
            self.answer(200, {"errors": wrong, "warnings": []})
        elif path.startswith("/api/datasets/me/logits/preupload/"):
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            self.answer(200, {"files": modes, "commitOid": hub.head})
        elif path.startswith("/api/datasets/me/logits/commit/"):
            lines = [json.loads(line) for line in body.splitlines()]
            parent = lines[0]["value"].get("parentCommit")
            if parent not in (None, hub.head):
                self.answer(412, {"error": "A commit has happened since."})
                return
            paths = []
            for line in lines[1:]:
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                paths.append(line["value"]["path"])
            hub.commits.append(paths)
            made = {"commitUrl": f"https://huggingface.co/datasets/me/logits/commit/{hub.head}", "commitOid": hub.head}
            self.answer(200, {**made, "pullRequestUrl": None, "success": True})
        else:
            self.answer(404, {"error": path})

    def do_GET(self) -> None:
        hub, path = self.hub(), unquote(urlsplit(self.path).path)
        if self.refused():
            return
        if path.startswith("/datasets/me/logits/resolve/main/"):
            data = hub.files.get(path.removeprefix("/datasets/me/logits/resolve/main/"))
            self.answer(404 if data is None else 200, data or b"")
        elif path.startswith("/api/datasets/me/logits/tree/main"):
            below = path.removeprefix("/api/datasets/me/logits/tree/main").strip("/")
            found = {name: data for name, data in hub.files.items() if name.startswith(below)}
            if not hub.made or (below and not found):
                code = "RepoNotFound" if not hub.made else "EntryNotFound"
                self.answer(404, {"error": "not found"}, X_Error_Code=code)
                return
            self.answer(
                200,
                [
                    {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
                    for name, data in found.items()
                ],
            )
        else:
            self.answer(404, {"error": path})

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remotes, "Patience", lambda: Patience(first=0.01, longest=0.05, tries=4))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("url", ["hf://datasets/me/logits", "hf://datasets/me/logits@main/wiki/v1"])
def test_a_store_goes_round(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(HubPlace, "batch", (7, 1 << 30))
    local = tiny.write_store(tmp_path / "s")
    sent = push(tmp_path / "s", url)
    assert [path.rsplit("/", 1)[-1] for path in hub.commits[-1]] == ["manifest.json"]
    assert max(map(len, hub.commits)) == 7
    assert push(tmp_path / "s", url).moved_objects == 0
    assert check(open_store(sent.pin)) == []
    assert check(open_store(url), quick=True) == []
    pull(url, tmp_path / "back")
    assert open_store(tmp_path / "back").digest == local.digest
    assert check(open_store(tmp_path / "back")) == []


def test_a_hub_that_is_busy_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    tiny.write_store(tmp_path / "s")
    hub.broken = [503, 429]
    push(tmp_path / "s", "hf://datasets/me/logits")
    hub.broken = [500]
    assert check(open_store("hf://datasets/me/logits")) == []


def test_somebody_elses_commit_before_the_manifest_is_noticed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_store(tmp_path / "s")
    commit = HubPlace.put

    def raced(self: HubPlace, objects: Any, *, last: bool = False) -> None:
        if last:
            hub.commits.append(["theirs"])
        commit(self, objects, last=last)

    with monkeypatch.context() as patch:
        patch.setattr(HubPlace, "put", raced)
        with pytest.raises(AccessError, match="412"):
            push(tmp_path / "s", "hf://datasets/me/logits")
    with pytest.raises(IncompleteStoreError):
        open_store("hf://datasets/me/logits")
    push(tmp_path / "s", "hf://datasets/me/logits")
    assert check(open_store("hf://datasets/me/logits")) == []


def test_without_a_token_it_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    tiny.write_store(tmp_path / "s")
    hub.token = "another"
    with pytest.raises(AccessError, match="401") as caught:
        push(tmp_path / "s", "hf://datasets/me/logits")
    assert "log in" in caught.value.hint.lower()
    with pytest.raises(AccessError, match="401") as caught:
        open_store("hf://datasets/me/logits")
    assert hub.token not in str(caught.value)


def test_other_urls_of_the_hub_are_refused() -> None:
    for url in ("hf://me/logits", "hf://models/me/x", "hf://datasets/me"):
        with pytest.raises(ConfigError, match="not a data set of the hub"):
            connect(url)
