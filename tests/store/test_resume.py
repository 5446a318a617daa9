"""Killed between any two writes, a store goes on and ends with the same digest."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import AccessError, CorruptObjectError, IncompleteStoreError, MismatchError, StorageFullError
from kdcache.store import Kept, StoreWriter, objects, open_store, progress, standard_columns
from tests import tiny

ROWS = ((20, 20, 11), (30, 9))


class Killed(BaseException):
    """Stands for the process's end."""


def write(folder: Path, **changes: Any) -> str:
    columns = standard_columns(k=8, vocab_size=50, kept=Kept("float32"))
    writer = StoreWriter.open(folder, tiny.plan(columns, ROWS, vocabulary=50, k=8, **changes))
    random = np.random.default_rng(0)
    for index, counts in enumerate(ROWS):
        labels = random.integers(0, 50, sum(counts))
        values = tiny.shard_columns(tiny.dense_rows(len(labels), 50, index), labels, labels, 8)
        ids = [f"{index}-{n}" for n in range(len(counts))]
        writer.write_shard(index, values, tiny.SampleTable(ids, np.asarray(counts)))
    return writer.finish()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, act: Callable[[], None]) -> list[int]:
    """Let the call-th rename act instead of renaming; return the counter of calls."""
    calls = [0]
    rename = Path.replace

    def counted(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == call:
            act()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    return calls


def test_killed_at_every_write_it_resumes_to_the_same_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        writes = interrupt_at(patch, 0, lambda: None)
        undisturbed = write(tmp_path / "whole")
    call = 0
    while True:
        call += 1
        folder = tmp_path / f"killed-{call}"

        def die() -> None:
            raise Killed

        with monkeypatch.context() as patch:
            calls = interrupt_at(patch, call, die)
            try:
                write(folder)
            except Killed:
                pass
            else:
                break
        assert calls[0] == call
        with pytest.raises(IncompleteStoreError):
            open_store(folder)
        assert write(folder) == undisturbed
        assert not list(folder.rglob("*.partial"))
    assert call == writes[0] + 1  # every object, receipt, the plan and the manifest were reached


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, StorageFullError), (errno.EACCES, AccessError), (errno.EROFS, AccessError)]
)
def test_a_failing_disk_stops_with_a_reason_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    undisturbed = write(tmp_path / "whole")

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    for call in (1, 5, 20, 29):
        folder = tmp_path / f"full-{call}"
        with monkeypatch.context() as patch:
            interrupt_at(patch, call, fail)
            with pytest.raises(error) as caught:
                write(folder)
        assert str(folder) in str(caught.value)
        assert not list(folder.rglob("*.partial"))
        assert write(folder) == undisturbed


def test_a_really_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    import subprocess

    mounted = tmp_path / "small"
    mounted.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if subprocess.run(line, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(StorageFullError, match="no space left"):
            tiny.write_store(mounted / "s", rows=((60,),) * 8, vocabulary=5000, k=60)
        assert not list(mounted.rglob("*.partial"))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_other_settings_are_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    write(tmp_path / "s", teacher={"name": "a"})
    with pytest.raises(MismatchError, match=r"teacher\.name was 'a', now 'b'"):
        write(tmp_path / "s", teacher={"name": "b"})


def test_a_finished_store_is_left_alone(tmp_path: Path) -> None:
    digest = write(tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    assert write(tmp_path / "s") == digest
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}


def test_a_receipt_of_another_store_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", teacher={"name": "b"})
    (tmp_path / "a" / "manifest.json").unlink()
    receipt = tmp_path / "a" / "receipts" / "00001.json"
    receipt.write_bytes((tmp_path / "b" / "receipts" / "00001.json").read_bytes())
    with pytest.raises(CorruptObjectError, match="another shard or store"):
        write(tmp_path / "a")


def test_finishing_early_says_what_is_missing(tmp_path: Path) -> None:
    columns = standard_columns(k=8, vocab_size=50)
    writer = StoreWriter.open(tmp_path / "s", tiny.plan(columns, ROWS, vocabulary=50, k=8))
    with pytest.raises(IncompleteStoreError, match="2 shards"):
        writer.finish()
    begun = progress(tmp_path / "s")
    assert begun is not None
    assert (begun.committed, begun.shards) == (0, 2)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "A", "a//b", "", "nul", "con.txt", "a.", "x\0", "a b", "ü"])
def test_unsafe_object_names_are_refused(name: str) -> None:
    from kdcache.errors import UnsafeError

    with pytest.raises(UnsafeError):
        objects.check_name(name)
