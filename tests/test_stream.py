"""The order is a pure function, and resuming at any step gives the same future."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kdcache.batch import Batch
from kdcache.errors import ConfigError, CorruptObjectError, KdcacheError, MismatchError
from kdcache.store import Kept, Store, open_store
from kdcache.store.manifest import seal
from kdcache.stream import Loader, StreamConfig, StreamDataset, sample_order
from kdcache.stream.decoders import FORKS
from tests import tiny

ROWS = ((5, 9, 3), (7, 7), (4, 4, 4, 4), (12,), (6, 2))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny.write_store(tmp_path_factory.mktemp("stream") / "s", rows=ROWS, hidden={"final": 4})


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [batch.sample_index.tolist() for batch in batches]


def test_batches_hold_exactly_what_the_store_holds(store: Store) -> None:
    for batch in Loader(store, StreamConfig(batch_size=3, hidden=("final",))):
        assert batch.targets is not None
        for place, number in enumerate(batch.sample_index.tolist()):
            rows = slice(int(batch.offsets[place]), int(batch.offsets[place + 1]))
            sample = store[number]
            assert np.array_equal(batch.input_ids[rows].numpy(), sample.input_ids[:-1])
            assert np.array_equal(batch.labels[rows].numpy(), sample.labels)
            assert np.array_equal(batch.targets[rows].numpy().logits, sample.targets.logits)
            assert np.array_equal(batch.targets[rows].numpy().ids, sample.targets.ids)
            assert np.array_equal(batch.hidden["final"][rows].numpy(), sample.hidden["final"])


@pytest.mark.parametrize("pool", [1, 2, 10])
def test_an_epoch_gives_every_sample_once_in_another_order_each_time(store: Store, pool: int) -> None:
    loader = Loader(store, StreamConfig(batch_size=5, pool_shards=pool))
    epochs = [[number for batch in numbers(list(loader)) for number in batch] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(store)))
    assert epochs[0] != epochs[1] != epochs[2]
    again = Loader(store, StreamConfig(batch_size=5, pool_shards=pool))
    again.set_epoch(2)
    assert [number for batch in numbers(list(again)) for number in batch] == epochs[2]


def test_the_order_stays_within_pools_of_shards() -> None:
    order = sample_order([10] * 6, seed=3, epoch=1, pool_shards=2)
    for pool in range(3):
        assert len({number // 10 for number in order[pool * 20 : pool * 20 + 20]}) == 2
    assert np.array_equal(order, sample_order([10] * 6, seed=3, epoch=1, pool_shards=2))
    assert not np.array_equal(order, sample_order([10] * 6, seed=4, epoch=1, pool_shards=2))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resuming_at_every_step_gives_the_same_future(store: Store, workers: int) -> None:
    config = StreamConfig(batch_size=2, workers=workers)
    reference = Loader(store, config)
    whole = numbers([batch for _ in range(2) for batch in reference])
    steps = range(len(whole)) if workers == 0 else (0, 1, 4, 7)
    for step in steps:
        first = Loader(store, StreamConfig(batch_size=2))
        seen = 0
        state: dict[str, Any] = first.state_dict()
        while seen < step:
            for _ in first:
                seen += 1
                state = first.state_dict()
                if seen == step:
                    break
        second = Loader(store, config)
        second.load_state_dict(state)
        rest = numbers(list(second))
        while len(rest) < len(whole) - step:
            rest += numbers(list(second))
        assert rest == whole[step:], f"resumed after {step}"


def dealt(loaders: list[Loader], steps: int) -> list[list[int]]:
    """The samples of every global batch of an epoch's rest, whichever rank has them."""
    parts = [numbers(list(one)) for one in loaders]
    assert {len(one) for one in parts} == {steps}
    return [sorted(number for part in parts for number in part[step]) for step in range(steps)]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_stopped_anywhere_on_any_ranks_and_workers_it_goes_on_with_the_same_batches(
    tmp_path_factory: pytest.TempPathFactory, workers: int, before: int, after: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "matrix"
    if not folder.exists():
        tiny.write_store(folder, rows=[(5, 9, 7, 4, 8)] * 12)
    store, batch, steps = open_store(folder), 12, 5

    def loaders(ranks: int, count: int) -> list[Loader]:
        made = {"batch_size": batch // ranks, "world_size": ranks, "workers": count, "pool_shards": 3}
        return [Loader(store, StreamConfig(rank=rank, **made)) for rank in range(ranks)]

    whole = [dealt(epoch, steps) for epoch in [loaders(1, 0)] for _ in range(2)]
    for stop in range(steps + 1) if workers == 0 else (0, 2, steps):
        states = []
        for one in loaders(before, 0):
            for seen, _ in enumerate(one):
                if seen + 1 == stop:
                    break
            states.append(one.state_dict() if stop else Loader(store, one.config).state_dict())
        if stop == steps:  # the epoch is over: what comes is the next
            states = [{**state, "epoch": 1, "batches": 0} for state in states]
        assert all(state == states[0] for state in states)
        resumed = loaders(after, workers)
        for one in resumed:
            one.load_state_dict(states[0])
        expected = whole[1] if stop == steps else whole[0][stop:]
        assert dealt(resumed, len(expected)) == expected


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_the_order(store: Store, workers: int) -> None:
    alone = numbers(list(Loader(store, StreamConfig(batch_size=2))))
    assert numbers(list(Loader(store, StreamConfig(batch_size=2, workers=workers)))) == alone


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_stock_dataloader_works_with_either_way_of_starting_workers(store: Store, context: str) -> None:
    store.read_shard(0)  # a parent that has read already must not hang its children
    dataset = StreamDataset(store, StreamConfig(batch_size=4))
    found = list(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context))
    assert numbers(found) == numbers(list(Loader(store, StreamConfig(batch_size=4))))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_global_batch_evenly(store: Store, world_size: int) -> None:
    alone = numbers(list(Loader(store, StreamConfig(batch_size=2 * world_size))))
    ranks = [
        numbers(list(Loader(store, StreamConfig(batch_size=2, rank=rank, world_size=world_size))))
        for rank in range(world_size)
    ]
    full = [batch for batch in alone if len(batch) == 2 * world_size]
    for step, batch in enumerate(full):
        dealt = [ranks[rank][step] for rank in range(world_size)]
        assert sorted(number for part in dealt for number in part) == sorted(batch)
    assert all(len(rank) == len(full) for rank in ranks)


def test_a_state_of_another_stream_is_refused(store: Store, tmp_path: Path) -> None:
    state = Loader(store, StreamConfig(batch_size=2)).state_dict()
    other = tiny.write_store(tmp_path / "other", rows=ROWS, seed=5, hidden={"final": 4})
    for loader in (Loader(other, StreamConfig(batch_size=2)), Loader(store, StreamConfig(batch_size=3))):
        with pytest.raises(MismatchError, match="another stream"):
            loader.load_state_dict(state)
    resumed = Loader(store, StreamConfig(batch_size=1, world_size=2))
    resumed.load_state_dict(state)  # the same global batch over more ranks goes on


def test_columns_the_store_lacks_are_refused_before_the_first_batch(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"hidden\.3"):
        Loader(store, StreamConfig(hidden=("3",)))
    with pytest.raises(ConfigError, match="draw_ids"):
        Loader(store, StreamConfig(draws=True))


def test_damage_reaches_the_consumer_as_its_own_error(tmp_path: Path) -> None:
    damaged = tiny.write_store(tmp_path / "s", rows=ROWS)
    path = tmp_path / "s" / "columns" / "head_ids" / "c" / "2" / "0"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptObjectError):
        list(Loader(damaged, StreamConfig(batch_size=2)))


@pytest.mark.parametrize("workers", [1, 3])
def test_damage_found_by_a_process_is_the_same_error(workers: int, tmp_path: Path) -> None:
    damaged = tiny.write_store(tmp_path / "s", rows=ROWS)
    path = tmp_path / "s" / "columns" / "head_ids" / "c" / "2" / "0"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptObjectError) as caught:
        list(Loader(damaged, StreamConfig(batch_size=2, workers=workers)))
    assert "head_ids" in caught.value.where
    assert caught.value.hint


def test_processes_live_from_epoch_to_epoch_and_end_with_the_loader(store: Store) -> None:
    loader = Loader(store, StreamConfig(batch_size=2, workers=2))
    others = {one.pid for one in multiprocessing.active_children()}
    list(loader)
    first = {one.pid for one in multiprocessing.active_children()} - others
    list(loader)
    assert {one.pid for one in multiprocessing.active_children()} - others == first
    assert len(first) == (2 if FORKS else 0)
    del loader
    gc.collect()
    assert ended(first)


def test_an_iterator_left_early_does_not_disturb_the_next(store: Store) -> None:
    loader = Loader(store, StreamConfig(batch_size=1, pool_shards=1, workers=2))
    for _ in range(5):
        left = iter(loader)
        next(left)
        left.close()  # type: ignore[attr-defined]
        loader.set_epoch(0)
    for batch in loader:
        sample = store[int(batch.sample_index[0])]
        assert np.array_equal(batch.input_ids.numpy(), sample.input_ids[:-1])


@pytest.mark.skipif(not FORKS, reason="processes are used on Linux only")
def test_a_killed_reader_is_an_error_with_a_hint(store: Store) -> None:
    loader = Loader(store, StreamConfig(batch_size=1, workers=1))
    others = multiprocessing.active_children()
    list(loader)
    for child in set(multiprocessing.active_children()) - set(others):
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    with pytest.raises(KdcacheError, match="killed"):
        list(loader)
    assert len(list(loader)) == len(store)  # new ones take their place


@pytest.mark.skipif(not FORKS, reason="processes are used on Linux only")
def test_reading_processes_end_when_their_trainer_is_killed(store: Store) -> None:
    code = (
        "import multiprocessing, time\n"
        "from kdcache.stream import Loader, StreamConfig\n"
        f"loader = Loader({str(store.path)!r}, StreamConfig(batch_size=1, workers=2))\n"
        "list(loader)\n"
        "print(*[one.pid for one in multiprocessing.active_children()], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        children = {int(one) for one in trainer.stdout.readline().split()}
        trainer.kill()
    assert len(children) == 2
    assert ended(children)


def ended(processes: set[Any]) -> bool:
    """Say whether all of them are gone within a while."""
    until = time.monotonic() + 10
    while time.monotonic() < until and any(running(one) for one in processes):
        time.sleep(0.05)
    return not any(running(one) for one in processes)


def running(process: int) -> bool:
    """Say whether a process is there and more than a name."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_leaving_an_epoch_early_stops_the_reading_thread(store: Store) -> None:
    import threading

    iterator = iter(Loader(store, StreamConfig(batch_size=1)))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert not [one for one in threading.enumerate() if one.name == "kdcache-prefetch"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_that_ends_in_the_middle_of_an_epoch_ends_cleanly(tmp_path: Path, workers: int) -> None:
    tiny.write_store(tmp_path, rows=[(20, 20, 20)] * 40, vocabulary=300)
    code = (
        "import atexit, threading\n"
        "from kdcache.stream import Loader, StreamConfig\n"
        "def last():\n"
        "    assert 'kdcache-prefetch' not in [one.name for one in threading.enumerate()]\n"
        "atexit.register(last)  # runs after what is registered later\n"
        f"held = iter(Loader({str(tmp_path)!r}, StreamConfig(batch_size=1, workers={workers})))\n"
        "next(held)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_padded_view_is_the_same_batch(store: Store) -> None:
    batch = next(iter(Loader(store, StreamConfig(batch_size=4))))
    padded = batch.padded(pad_id=49)
    assert torch.equal(padded.input_ids.flatten()[padded.index], batch.input_ids)
    assert torch.equal(padded.attention_mask.sum(1), batch.offsets.diff())
    assert (padded.input_ids[padded.attention_mask == 0] == 49).all()
    assert batch.to("cpu").num_samples == 4


@pytest.mark.parametrize("preset", ["compact", "raw", "exact"])
def test_batches_of_every_preset_hold_what_the_store_holds_though_memory_is_used_again(
    preset: str, tmp_path: Path
) -> None:
    kept = {
        "compact": Kept("levels", {"steps_per_nat": 64}, ranked=True, differences=2),
        "raw": Kept("float32", compressed=False),
        "exact": Kept("bits", {"kind": "float32"}, ranked=True),
    }[preset]
    store = tiny.write_store(tmp_path, rows=[(9, 7, 3), (11, 2), (5, 5, 5), (30,)], vocabulary=300, kept=kept)
    loader = Loader(store, StreamConfig(batch_size=2, pool_shards=1))
    given = [batch for _ in range(3) for batch in loader]  # all kept: a batch must not change under its holder
    assert sum(batch.num_samples for batch in given) == 3 * len(store)
    for batch in given:
        for number, (start, stop) in zip(batch.sample_index.tolist(), pairwise(batch.offsets.tolist()), strict=True):
            sample = store[number]
            assert batch.targets is not None
            assert np.array_equal(batch.targets.ids[start:stop], sample.targets.ids)
            assert np.array_equal(batch.targets.logits[start:stop], sample.targets.logits)
            assert np.array_equal(batch.targets.tail[start:stop], sample.targets.tail)
            assert np.array_equal(batch.input_ids[start:stop], sample.input_ids[:-1])


@pytest.mark.parametrize("preset", ["compact", "raw", "exact", "plain"])
def test_packed_targets_are_the_same_once_they_are_where_they_go(preset: str, tmp_path: Path) -> None:
    kept = {
        "compact": Kept("levels", {"steps_per_nat": 64}, ranked=True, differences=2),
        "raw": Kept("float32", compressed=False),
        "exact": Kept("bits", {"kind": "float32"}, ranked=True),
        "plain": Kept(),
    }[preset]
    store = tiny.write_store(tmp_path, rows=[(9, 7, 3), (11, 2), (5, 5, 5)], vocabulary=300, kept=kept)
    plain = Loader(store, StreamConfig(batch_size=2))
    packed = Loader(store, StreamConfig(batch_size=2, packed=True))
    for ours, theirs in zip(packed, plain, strict=True):
        assert ours.targets is None
        moved = ours.to("cpu")
        assert moved.packed is None
        assert moved.targets is not None
        assert theirs.targets is not None
        for name in ("ids", "logits", "tail", "label_logit"):
            assert torch.equal(getattr(moved.targets, name), getattr(theirs.targets, name)), name
        assert torch.equal(ours.input_ids, theirs.input_ids)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("vocabulary", [50, 300])
def test_a_head_id_beyond_the_vocabulary_is_refused(vocabulary: int, packed: bool, tmp_path: Path) -> None:
    tiny.write_store(tmp_path, rows=[(3, 2)], vocabulary=vocabulary, kept=Kept())
    sample = list(open_store(tmp_path))
    highest = max(int(one.targets.ids.max()) for one in sample)
    assert max(int(one.input_ids.max()) for one in sample) < highest
    document = json.loads((tmp_path / "manifest.json").read_bytes())
    document["vocab_size"] = highest  # so the highest id is one too many, and no label is
    (tmp_path / "manifest.json").write_text(json.dumps(seal(document)))
    with pytest.raises(CorruptObjectError, match="head_ids has an id beyond the vocabulary"):
        list(Loader(tmp_path, StreamConfig(packed=packed)))


def test_two_iterators_at_once_do_not_share_memory(store: Store) -> None:
    dataset = StreamDataset(store, StreamConfig(batch_size=1, pool_shards=1))
    whole = {int(batch.sample_index[0]): batch.input_ids for batch in dataset}
    first, second = iter(dataset), iter(dataset)
    dataset.epoch = 1
    third = iter(dataset)
    for batches in zip(first, second, third, strict=True):
        for batch in batches:
            assert torch.equal(batch.input_ids, whole[int(batch.sample_index[0])])
