"""A store on a web server: whatever the server does, what comes is what was captured, or an error says why not."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from kdcache import remotes
from kdcache.cli import app
from kdcache.config import parse_config
from kdcache.errors import (
    AccessError,
    ConfigError,
    CorruptObjectError,
    IncompleteStoreError,
    KdcacheError,
    MismatchError,
    MissingObjectError,
    OutageError,
    UnsafeError,
)
from kdcache.remotes import Patience, connect
from kdcache.store import Store, check, open_store
from kdcache.train import METRICS, train
from kdcache.train.config import TrainConfig
from tests import tiny
from tests.remotes import web


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[web.WebServer]:
    tiny.write_store(tmp_path / "share" / "s", rows=((20, 20, 11), (30, 9), (12,)))
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remotes, "Patience", lambda: Patience(first=0.01, longest=0.05, stall=0.5))
    with web.serving(tmp_path / "share") as running:
        yield running


@pytest.fixture
def local(tmp_path: Path, server: web.WebServer) -> Store:
    return open_store(tmp_path / "share" / "s")


class Bag(nn.Module):
    """Logits of the token alone."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, vocab_size)

    def forward(self, ids: Any, mask: Any) -> Any:
        return self.embed(ids)


def student(vocab_size: int) -> nn.Module:
    return Bag(vocab_size)


def an_object(store: Store) -> str:
    return next(name for name in store.manifest.objects if name.startswith("columns/head_logits/c/1"))


def test_a_url_gives_what_the_folder_gives_and_fetches_no_more_than_is_read(
    server: web.WebServer, local: Store, tmp_path: Path
) -> None:
    store = open_store(f"{server.url}/s")
    assert server.requests == ["s/manifest.json"]
    shard = store.read_shard(1, ["labels"])
    assert (shard.columns["labels"] == local.read_shard(1, ["labels"]).columns["labels"]).all()
    assert {name.split("/")[1] for name in server.requests[1:]} == {"columns", "samples"}
    assert all("labels" in name for name in server.requests if "columns" in name)
    for one, other in zip(store, local, strict=True):
        assert one.id == other.id
        assert (one.targets.logits == other.targets.logits).all()
    asked = len(server.requests)
    assert len(set(server.requests)) == asked  # nothing twice
    assert check(open_store(f"{server.url}/s")) == []
    server.shutdown()


def test_a_pinned_store_opens_from_the_cache_alone(server: web.WebServer, local: Store) -> None:
    with pytest.raises(MismatchError, match=local.digest):
        open_store(f"{server.url}/s#blake3={'0' * 64}")
    store = open_store(f"{server.url}/s", digest=local.digest)
    assert check(store) == []
    server.requests.clear()
    again = open_store(f"{server.url}/s#blake3={local.digest}")
    assert check(again) == []
    assert server.requests == []


@pytest.mark.parametrize(
    "fault",
    [
        web.status(500),
        web.status(503),
        web.status(429, Retry_After="0"),
        web.cut_short,
        web.shorter,
        web.web_page,
        web.flipped,
        web.endless,
        web.reset,
        web.stall,
    ],
    ids=["500", "503", "429", "cut short", "shorter", "web page", "flipped", "endless", "reset", "stall"],
)
def test_one_fault_is_got_over(server: web.WebServer, local: Store, fault: web.Answer) -> None:
    name = f"s/{an_object(local)}"
    server.faults[name].append(fault)
    assert check(open_store(f"{server.url}/s")) == []
    assert server.requests.count(name) == 2


def test_a_server_that_asks_to_be_left_alone_is(server: web.WebServer, local: Store) -> None:
    server.faults["s/manifest.json"].append(web.status(429, Retry_After="1"))
    began = time.monotonic()
    open_store(f"{server.url}/s")
    assert 1.0 <= time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (web.status(503), AccessError, "503"),
        (web.reset, AccessError, "in 10 tries"),
        (web.flipped, CorruptObjectError, "its digest is another"),
        (web.shorter, CorruptObjectError, "bytes came, not"),
        (web.web_page, CorruptObjectError, "a web page came in its place"),
        (web.status(404), MissingObjectError, "missing"),
        (web.status(401), AccessError, "401"),
        (web.status(403), AccessError, "403"),
        (web.redirect("file:///etc/passwd"), UnsafeError, "file"),
        (web.redirect("ftp://127.0.0.1/x"), UnsafeError, "ftp"),
    ],
)
def test_a_fault_that_stays_is_named(
    server: web.WebServer, local: Store, fault: web.Answer, error: type[KdcacheError], said: str
) -> None:
    name = f"s/{an_object(local)}"
    server.faults[name] = [fault] * 40
    store = open_store(f"{server.url}/s")
    with pytest.raises(error, match=said) as caught:
        store.read_shard(1)
    assert "127.0.0.1" in caught.value.where
    server.faults[name].clear()
    assert check(store) == []


def test_an_outage_while_training_loses_no_step(server: web.WebServer, local: Store, tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "student": {"factory": "tests.remotes.test_https:student"},
        "data": {"batch_size": 1, "pool_shards": 1, "shuffle": False},
        "run": {"device": "cpu", "steps": 6},
    }
    config = parse_config(TrainConfig, tree)

    def lines(folder: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / METRICS).read_text().splitlines()]

    train(config, local, tmp_path / "straight")
    names = [name for name in local.manifest.objects if "/c/2" in name]
    for name in names:
        server.faults[f"s/{name}"] = [web.status(503)] * 40
    with pytest.raises(OutageError) as caught:
        train(config, f"{server.url}/s", tmp_path / "run")
    assert caught.value.exit_code == 75
    done = lines(tmp_path / "run")
    assert 0 < len(done) < 6
    for name in names:
        server.faults[f"s/{name}"].clear()
    result = train(config, f"{server.url}/s", tmp_path / "run")
    assert result.steps == 6
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")
    assert lines(tmp_path / "run")[: len(done)] == done


def test_what_is_not_there_is_said_not_to_be(server: web.WebServer) -> None:
    with pytest.raises(IncompleteStoreError, match="not uploaded to the end"):
        open_store(f"{server.url}/nothing")


def test_a_damaged_cache_mends_itself(server: web.WebServer, local: Store) -> None:
    store = open_store(f"{server.url}/s")
    assert check(store) == []
    path = store.path / an_object(local)
    for damage in (lambda: path.write_bytes(b"x"), path.unlink, lambda: path.write_bytes(path.read_bytes()[::-1])):
        damage()
        assert check(open_store(f"{server.url}/s")) == []


def test_the_cache_keeps_its_limit_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: web.WebServer
) -> None:
    tiny.write_store(tmp_path / "share" / "many", rows=((30, 20),) * 20)
    local = open_store(tmp_path / "share" / "many")
    limit = local.nbytes // 3
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", str(limit))
    store = open_store(f"{server.url}/many")
    for _ in range(2):
        for one, other in zip(store, local, strict=True):
            assert (one.targets.ids == other.targets.ids).all()
        held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
        assert held <= limit
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", "10KB")
    with pytest.raises(ConfigError, match="two shards"):
        open_store(f"{server.url}/many")
    monkeypatch.setenv("KDCACHE_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match="not a number of bytes"):
        open_store(f"{server.url}/many")


def test_a_token_goes_to_its_host_only(server: web.WebServer, tmp_path: Path) -> None:
    from kdcache.remotes.https import WebPlace

    with web.serving(tmp_path / "share") as other:
        server.faults["s/manifest.json"].append(web.redirect(f"{other.url}/s/manifest.json"))
        place = WebPlace(f"{server.url}/s", {"Authorization": "Bearer secret"})
        assert place.get("manifest.json", 1 << 20, 5.0).startswith(b"{")
        assert server.seen_headers[-1]["Authorization"] == "Bearer secret"
        assert "Authorization" not in other.seen_headers[-1]


def test_unknown_places_and_writing_to_a_web_server_are_refused(server: web.WebServer) -> None:
    with pytest.raises(ConfigError, match="cannot be reached by 'gopher'"):
        open_store("gopher://host/s")
    with pytest.raises(AccessError, match="Nothing can be written"):
        connect(server.url).put([("x", b"")])


def test_pull_takes_a_part(server: web.WebServer, local: Store, tmp_path: Path) -> None:
    line = ["pull", f"{server.url}/s", str(tmp_path / "part"), "--shards", "1", "--top", "3", "-q", "--json"]
    done = CliRunner().invoke(app, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    part = open_store(tmp_path / "part")
    assert json.loads(done.stdout)["digest"] == part.digest
    assert (part.k, [one.id for one in part]) == (3, [local[number].id for number in (3, 4)])
    whole = CliRunner().invoke(app, ["pull", f"{server.url}/s", str(tmp_path / "whole"), "-q", "--json"])
    assert json.loads(whole.stdout)["digest"] == local.digest
    assert check(open_store(tmp_path / "whole")) == []
