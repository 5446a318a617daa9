"""Any number of writers on one store: every row once, whoever dies, whatever each of them saw."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import IncompleteStoreError, MismatchError
from kdcache.store import Kept, StoreWriter, check, open_store, standard_columns
from kdcache.store.progress import PLAN_FILE, committed
from tests import tiny

ROWS = tuple((20, 20, 11) if index % 2 else (30, 9) for index in range(24))
COLUMNS = standard_columns(k=8, vocab_size=50, kept=Kept("float32"))


def opened(folder: Path) -> StoreWriter:
    return StoreWriter.open(folder, tiny.plan(COLUMNS, ROWS, vocabulary=50, k=8))


def make(writer: StoreWriter, index: int, *, noise: float = 0.0) -> int:
    """Write a shard as every writer would, or, with noise, as a teacher that is not quite deterministic."""
    counts = ROWS[index]
    inputs, labels = tiny.token_columns(counts, 50, index)
    values = tiny.shard_columns(tiny.dense_rows(len(labels), 50, index) + noise, inputs, labels, 8)
    ids = [f"{index}-{number}" for number in range(len(counts))]
    return writer.write_shard(index, values, tiny.SampleTable(ids, np.asarray(counts)))


def work(folder: Path, seed: int) -> None:
    """What one process does: all that nobody else does, at its own pace."""
    pace, writer = random.Random(seed), opened(folder)
    for index in writer.unmade():
        time.sleep(pace.uniform(0, 0.02))
        make(writer, index)
    writer.finish()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("alone") / "s"
    work(folder, 0)
    return open_store(folder).digest


def test_two_writers_share_the_shards_and_take_over_what_a_dead_one_left(tmp_path: Path, alone: str) -> None:
    first, second = opened(tmp_path / "s"), opened(tmp_path / "s")
    left, right = first.unmade(), second.unmade()
    taken = [next(left), next(right), next(left), next(right)]
    assert taken == [0, 1, 2, 3]
    for index in (0, 2):
        assert make(first, index)
    assert make(second, 1)
    # the second dies over shard 3
    rest = []
    for index in left:
        assert make(first, index)
        rest.append(index)
    assert rest == [*range(4, len(ROWS)), 3]
    assert first.finish() == alone
    assert not make(second, 3)  # it was not dead after all: its work is for nothing, and harms nothing
    assert second.finish() == alone
    assert check(open_store(tmp_path / "s")) == []


def test_of_two_that_differ_one_wins_with_all_its_objects(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "s"), opened(tmp_path / "s")
    for index in range(len(ROWS)):
        one, two = (first, second) if index % 3 else (second, first)
        assert make(one, index, noise=0.25 * (one is second))
        assert not make(two, index, noise=0.25 * (two is second))
    assert second.finish() == first.finish()
    store = open_store(tmp_path / "s")
    assert check(store) == []
    assert len({one.id for one in store}) == len(store) == sum(len(counts) for counts in ROWS)


def test_who_comes_second_with_other_settings_is_told(tmp_path: Path) -> None:
    opened(tmp_path / "s")
    with pytest.raises(MismatchError, match="k was 8, now 7"):
        StoreWriter.open(tmp_path / "s", tiny.plan(COLUMNS, ROWS, vocabulary=50, k=7))


def test_both_may_begin_the_store_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: str) -> None:
    """Between the look for a plan and the plan's being put, another writer begins and finishes the whole store."""
    from kdcache.store import writer

    begin = writer.start_objects

    def late(plan: object) -> object:
        monkeypatch.setattr(writer, "start_objects", begin)
        work(tmp_path / "s", 1)
        return begin(plan)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "start_objects", late)
    assert opened(tmp_path / "s").digest == alone
    assert check(open_store(tmp_path / "s")) == []


def test_without_hard_links_one_writer_works_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: str
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    work(tmp_path / "s", 1)
    assert open_store(tmp_path / "s").digest == alone


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 40))])
def test_eight_writers_with_random_kills_write_every_row_once(tmp_path: Path, alone: str, seed: int) -> None:
    context, chance, kills = multiprocessing.get_context("fork"), random.Random(seed), 0
    workers: list[multiprocessing.process.BaseProcess] = []
    while not (tmp_path / "s" / "manifest.json").is_file():
        workers = [one for one in workers if one.is_alive() or one.exitcode == 0]
        while len(workers) < 8:
            workers.append(context.Process(target=work, args=(tmp_path / "s", chance.randrange(1 << 30))))
            workers[-1].start()
        time.sleep(chance.uniform(0, 0.05))
        running = [one for one in workers if one.is_alive()]
        if running and kills < 12:
            os.kill(chance.choice(running).pid or 0, signal.SIGKILL)
            kills += 1
    for one in workers:
        one.join(60)
    opened(tmp_path / "s").finish()
    assert kills
    assert {one.exitcode for one in workers} <= {0, -signal.SIGKILL}
    store = open_store(tmp_path / "s")
    assert store.digest == alone
    assert check(store) == []
    assert not (tmp_path / "s" / "staging").exists()


def test_an_unfinished_store_of_several_says_how_far_it_is(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "s"), opened(tmp_path / "s")
    make(first, 0)
    make(second, 1)
    assert committed(tmp_path / "s") == {0, 1}
    assert (tmp_path / "s" / PLAN_FILE).is_file()
    with pytest.raises(IncompleteStoreError, match="2 of 24"):
        open_store(tmp_path / "s")
