"""A store in another folder: pushed whole or not at all, pulled, opened as a URL."""

import os
from pathlib import Path

import pytest

from kdcache.errors import AccessError, CorruptObjectError, IncompleteStoreError, KdcacheError, UnsafeError
from kdcache.remotes import connect, is_remote
from kdcache.share import pull, push
from kdcache.store import check, open_store
from tests import tiny


def test_a_store_goes_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tiny.write_store(tmp_path / "s")
    url = f"file://{tmp_path}/on%20a%20disk/s"
    assert not is_remote(url)
    first = push(tmp_path / "s", url)
    assert first.moved_objects == len(local.manifest.objects)
    assert push(tmp_path / "s", url).moved_objects == 0
    assert (tmp_path / "on a disk" / "s" / "README.md").is_file()
    monkeypatch.chdir(tmp_path / "on a disk")
    assert open_store("file:s").digest == open_store(url).digest == local.digest
    assert pull(f"{url}#blake3={local.digest}", tmp_path / "back").digest == local.digest
    assert pull(tmp_path / "s", tmp_path / "copy").digest == local.digest
    assert check(open_store(tmp_path / "back")) == check(open_store(tmp_path / "copy")) == []


def test_what_is_wrong_there_is_not_brought(tmp_path: Path) -> None:
    local = tiny.write_store(tmp_path / "s")
    url = f"file://{tmp_path}/there"
    push(tmp_path / "s", url)
    name = next(name for name in local.manifest.objects if name.startswith("columns/head_logits/c/1"))
    path = tmp_path / "there" / name
    honest = path.read_bytes()
    path.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))
    with pytest.raises(CorruptObjectError):
        pull(url, tmp_path / "a")
    path.unlink()
    with pytest.raises(KdcacheError):
        pull(url, tmp_path / "a")
    path.symlink_to(tmp_path / "s" / name)
    with pytest.raises(UnsafeError, match="link"):
        pull(url, tmp_path / "a")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnsafeError, match="no regular file"):
        pull(url, tmp_path / "a")
    assert not (tmp_path / "a" / "manifest.json").exists()
    with pytest.raises(IncompleteStoreError):
        open_store(tmp_path / "a")


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AccessError, match="cannot be written"):
        connect(f"file://{tmp_path}/file/s").put([("manifest.json", b"{}")])
