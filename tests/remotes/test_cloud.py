"""A store in an object store: pushed, read, pulled, against a real S3 server on loopback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from kdcache import remotes
from kdcache.errors import AccessError, ConfigError, IncompleteStoreError, Interrupted, KdcacheError, MismatchError
from kdcache.remotes import Patience, TransientError, connect
from kdcache.remotes.cloud import CloudPlace
from kdcache.share import MARK, pull, push
from kdcache.store import check, open_store
from kdcache.stream import Loader, StreamConfig
from tests import tiny
from tests.remotes import azure, gcs


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of an S3 server with the bucket `bucket`."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(key, value)
        import boto3

        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")
        client.close()  # its connections would be found open by whatever test runs when they are collected
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remotes, "Patience", lambda: Patience(first=0.01, longest=0.05, tries=4))


def test_a_store_goes_round(s3: str, tmp_path: Path) -> None:
    local = tiny.write_store(tmp_path / "s", rows=((20, 20, 11), (30, 9)), hidden={"final": 4})
    url = "s3://bucket/round/s"
    seen: list[tuple[int, int]] = []
    sent = push(tmp_path / "s", url, progress=lambda done, total: seen.append((done, total)))
    assert (sent.objects, sent.moved_objects) == (len(local.manifest.objects), len(local.manifest.objects))
    assert seen[-1] == (local.nbytes, local.nbytes)
    again = push(tmp_path / "s", url)
    assert (again.moved_objects, again.digest) == (0, local.digest)
    store = open_store(url)
    assert store.digest == local.digest
    assert check(store) == []
    assert check(store, quick=True) == []
    brought = pull(sent.pin, tmp_path / "back")
    assert brought.moved_objects == brought.objects == sent.objects
    assert check(open_store(tmp_path / "back")) == []
    assert open_store(tmp_path / "back").digest == local.digest
    assert pull(url, tmp_path / "back").moved_objects == 0
    (tmp_path / "back" / "columns" / "labels" / "c" / "0").write_bytes(b"x")
    assert pull(url, tmp_path / "back").moved_objects == 1


def test_the_manifest_is_last_and_a_broken_upload_goes_on(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tiny.write_store(tmp_path / "s", rows=((20, 11), (30, 9), (8,)))
    url, put, sent = "s3://bucket/broken/s", CloudPlace.put, list[str]()
    monkeypatch.setattr(CloudPlace, "batch", (3, 1 << 30))

    def counted(self: CloudPlace, objects: Any, *, last: bool = False) -> None:
        if len(sent) > 10:
            raise AccessError("the cable is out")
        put(self, objects, last=last)
        sent.extend(name for name, _ in objects)

    with monkeypatch.context() as patch:
        patch.setattr(CloudPlace, "put", counted)
        with pytest.raises(AccessError, match="cable"):
            push(tmp_path / "s", url)
    assert "manifest.json" not in sent
    with pytest.raises(IncompleteStoreError, match="not uploaded to the end"):
        open_store(url)
    rest = push(tmp_path / "s", url)
    assert rest.moved_objects == len(local.manifest.objects) - len([name for name in sent if name != MARK])
    assert check(open_store(url)) == []


def test_passing_faults_are_got_over(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_store(tmp_path / "s")
    put, fails = CloudPlace.put, [True, False, True, True, False]

    def shaky(self: CloudPlace, objects: Any, *, last: bool = False) -> None:
        if fails and fails.pop():
            raise TransientError("503")
        put(self, objects, last=last)

    monkeypatch.setattr(CloudPlace, "put", shaky)
    push(tmp_path / "s", "s3://bucket/shaky")
    assert check(open_store("s3://bucket/shaky")) == []


def test_another_store_is_never_mixed_in(s3: str, tmp_path: Path) -> None:
    tiny.write_store(tmp_path / "a", seed=0)
    tiny.write_store(tmp_path / "b", seed=1)
    url = "s3://bucket/mixed"
    push(tmp_path / "a", url)
    with pytest.raises(MismatchError, match="Another store is there"):
        push(tmp_path / "b", url)
    connect("s3://bucket/half").put([("columns/labels/c/0", b"x")])
    with pytest.raises(MismatchError, match="unknown origin"):
        push(tmp_path / "b", "s3://bucket/half")
    connect("s3://bucket/begun").put([(MARK, json.dumps({"digest": "0" * 64}).encode())])
    with pytest.raises(MismatchError, match="a part of one"):
        push(tmp_path / "b", "s3://bucket/begun")
    pull(url, tmp_path / "c")
    push(tmp_path / "b", "s3://bucket/other")
    with pytest.raises(MismatchError, match="holds another store"):
        pull("s3://bucket/other", tmp_path / "c")


def test_what_cannot_work_says_so(s3: str, tmp_path: Path) -> None:
    tiny.write_store(tmp_path / "s")
    with pytest.raises(AccessError, match="bucket"):
        push(tmp_path / "s", "s3://no-such-bucket/s")
    with pytest.raises(ConfigError, match="from a folder"):
        push("s3://bucket/x", "s3://bucket/y")


def test_a_stopped_pull_goes_on(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tiny.write_store(tmp_path / "s", rows=((20, 11), (30, 9), (8,)))
    push(tmp_path / "s", "s3://bucket/stopped")
    got: list[int] = []

    def stop(done: int, total: int) -> None:
        got.append(done)
        if len(got) == 5:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        pull("s3://bucket/stopped", tmp_path / "out", progress=stop)
    with pytest.raises(IncompleteStoreError):
        open_store(tmp_path / "out")
    rest = pull("s3://bucket/stopped", tmp_path / "out")
    assert rest.moved_objects <= len(local.manifest.objects) - 5
    assert check(open_store(tmp_path / "out")) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_the_same_from_far_away(s3: str, tmp_path: Path, workers: int) -> None:
    tiny.write_store(tmp_path / "s", rows=((20, 11), (30, 9), (8,), (15, 14)))
    push(tmp_path / "s", "s3://bucket/train")
    config = StreamConfig(batch_size=2, seed=3, workers=workers)
    near, far = Loader(tmp_path / "s", config), Loader(open_store("s3://bucket/train"), config)
    for _ in range(2):
        for one, other in zip(near, far, strict=True):
            assert one.targets is not None
            assert other.targets is not None
            assert (one.input_ids == other.input_ids).all()
            assert (one.targets.logits == other.targets.logits).all()


def test_the_card_has_the_hubs_header_and_the_preview_opens(s3: str, tmp_path: Path) -> None:
    local = tiny.write_store(tmp_path / "s")
    push(tmp_path / "s", "s3://bucket/card")
    place = connect("s3://bucket/card")
    text = place.get("README.md", 1 << 20, 30).decode()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["configs"] == [{"config_name": "preview", "data_files": "preview.parquet"}]
    assert local.digest in body
    assert f"{local.num_positions:,} positions" in body
    (tmp_path / "preview.parquet").write_bytes(place.get("preview.parquet", 1 << 20, 30))
    table = pq.read_table(tmp_path / "preview.parquet")
    assert table.num_rows == local.num_positions
    assert np.allclose([sum(c["probability"] for c in row) <= 1.0001 for row in table["candidates"].to_pylist()], True)


def test_the_commands_work(s3: str, tmp_path: Path) -> None:
    local = tiny.write_store(tmp_path / "s")

    def run(*arguments: str) -> dict[str, Any]:
        line = [sys.executable, "-m", "kdcache", *arguments, "--json"]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    sent = run("push", str(tmp_path / "s"), "s3://bucket/commands", "-q")
    assert sent["pin"] == f"s3://bucket/commands#blake3={local.digest}"
    assert run("info", "s3://bucket/commands")["digest"] == local.digest
    assert run("verify", sent["pin"])["ok"]
    assert run("pull", sent["pin"], str(tmp_path / "back"))["moved_objects"] == sent["objects"]
    assert run("verify", str(tmp_path / "back"), "--quick")["ok"]


def test_a_store_goes_round_on_google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tiny.write_store(tmp_path / "s")
    with gcs.serving(tmp_path, monkeypatch) as objects:
        assert push(tmp_path / "s", "gs://bucket/a/s").digest == local.digest
        assert {name for name in objects if not name.startswith("a/s/")} == set()
        assert open_store("gs://bucket/a/s")[3].id == local[3].id
        pull(f"gs://bucket/a/s#blake3={local.digest}", tmp_path / "back")
        assert check(open_store(tmp_path / "back")) == []
        with pytest.raises(KdcacheError, match="no store"):
            open_store("gs://bucket/b")


@pytest.mark.skipif(shutil.which("azurite-blob") is None, reason="needs azurite: npm install -g azurite")
def test_a_store_goes_round_on_azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tiny.write_store(tmp_path / "s")
    with azure.serving(tmp_path, monkeypatch):
        assert push(tmp_path / "s", "az://bucket/a/s").digest == local.digest
        assert open_store("az://bucket/a/s")[3].id == local[3].id
        pull(f"az://bucket/a/s#blake3={local.digest}", tmp_path / "back")
        assert check(open_store(tmp_path / "back")) == []
        with pytest.raises(KdcacheError, match="no store"):
            open_store("az://bucket/b")
