"""Killed between any two writes, a store goes on and ends with the same digest."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import AccessError, CorruptObjectError, IncompleteStoreError, MismatchError, StorageFullError
from kdcache.store import Kept, StoreWriter, check, objects, open_store, progress, standard_columns
from kdcache.store.progress import committed
from tests import tiny
from tests.store.faulty import MODES, FaultyDisk, Killed

ROWS = ((20, 20, 11), (30, 9))


def write(folder: Path, **changes: Any) -> str:
    columns = standard_columns(k=8, vocab_size=50, kept=Kept("float32"))
    writer = StoreWriter.open(folder, tiny.plan(columns, ROWS, vocabulary=50, k=8, **changes))
    for index, counts in enumerate(ROWS):
        inputs, labels = tiny.token_columns(counts, 50, index)
        values = tiny.shard_columns(tiny.dense_rows(len(labels), 50, index), inputs, labels, 8)
        ids = [f"{index}-{n}" for n in range(len(counts))]
        writer.write_shard(index, values, tiny.SampleTable(ids, np.asarray(counts)))
    return writer.finish()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """The digest of a whole run, and how often it asks something of the disk."""
    with pytest.MonkeyPatch.context() as patch:
        faulty = FaultyDisk(patch)
        return write(tmp_path_factory.mktemp("whole") / "s"), faulty.calls


@pytest.mark.parametrize("mode", MODES)
def test_whatever_befalls_any_call_the_same_command_ends_in_the_same_digest(
    tmp_path: Path, undisturbed: tuple[str, int], mode: str
) -> None:
    digest, calls = undisturbed
    stopped = 0
    for at in range(1, calls + 1):
        folder = tmp_path / f"{at}"
        with pytest.MonkeyPatch.context() as patch:
            faulty, told = FaultyDisk(patch, at, mode), str(folder)
            try:
                write(folder)
            except Killed:
                stopped += 1
            except (StorageFullError, AccessError) as error:
                stopped, told = stopped + 1, str(error)
        assert str(folder) in told
        if mode.startswith("power"):
            faulty.lose_power(np.random.default_rng(at) if "some" in mode else None)
        sealed = (folder / "manifest.json").is_file()
        if not sealed and folder.is_dir():
            with pytest.raises(IncompleteStoreError):
                open_store(folder)
        assert write(folder) == digest
        assert check(open_store(folder)) == []
        assert sorted(path.name for path in folder.iterdir() if path.name in ("staging", "claims")) == []
        shutil.rmtree(folder)
    assert stopped > 0.9 * calls  # the rest are calls that may fail: what is cleared away at the end


def test_at_most_one_shard_is_lost(tmp_path: Path, undisturbed: tuple[str, int]) -> None:
    before = set[int]()
    for at in range(1, undisturbed[1] + 1):
        with pytest.MonkeyPatch.context() as patch:
            FaultyDisk(patch, at, "killed after")
            with contextlib.suppress(Killed):
                write(tmp_path / f"{at}")
        now = committed(tmp_path / f"{at}")
        assert before <= now  # a later kill never has less
        before = now
    assert before == {0, 1}


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
        assert not list(mounted.glob("s/staging/*"))
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
