"""What is written is what is read, whichever way it is read."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from kdcache.errors import ConfigError, MismatchError, UnsupportedError
from kdcache.store import Kept, StoreWriter, check, open_store, standard_columns
from tests import tiny


def test_samples_come_back_with_L_tokens_and_L_minus_one_rows(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s", hidden={"final": 6})
    assert (len(store), store.num_positions, store.k, store.vocab_size) == (5, 90, 8, 50)
    for number, rows in enumerate([20, 20, 11, 30, 9]):
        sample = store[number]
        assert len(sample.input_ids) == rows + 1
        assert len(sample.labels) == len(sample.loss_mask) == len(sample.targets) == rows
        assert np.array_equal(sample.labels, sample.input_ids[1:])
        assert sample.hidden["final"].shape == (rows, 6)
    assert store[-1].id == store[4].id == "sample-1-1"
    with pytest.raises(IndexError):
        store[5]
    with pytest.raises(TypeError):
        store["0"]


def test_random_access_whole_shards_and_iteration_agree(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s", kept=Kept("steps16"))
    for number, sample in enumerate(store):
        again = store[number]
        assert again.id == sample.id
        assert np.array_equal(again.targets.logits, sample.targets.logits)
        assert np.array_equal(again.targets.tail, sample.targets.tail)
    shard = store.read_shard(1, ["labels"])
    assert list(shard.columns) == ["labels"]
    assert np.array_equal(shard.columns["labels"][:30], store[3].labels)
    with pytest.raises(ConfigError, match="no column"):
        store.read_shard(0, ["logits"])


def test_values_are_those_that_were_measured(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s", rows=((40,),))
    logits = tiny.dense_rows(40, 50)
    targets = store[0].targets
    order = np.argsort(-logits, axis=1, kind="stable")[:, :8]
    assert np.array_equal(targets.ids, order)
    assert np.array_equal(targets.logits, np.take_along_axis(logits, order, 1))
    assert np.array_equal(targets.label_logit, logits[np.arange(40), store[0].labels])
    dense = np.log(np.exp(logits.astype(np.float64)).sum(1))
    assert np.abs(targets.log_partition(1.0) - dense).max() < 1e-3


def test_a_stranger_reads_it_with_zarr_and_pyarrow_alone(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s")
    group = zarr.open_group(str(tmp_path / "s"), mode="r")
    table = pq.read_table(sorted((tmp_path / "s" / "samples").glob("*.parquet")), page_checksum_verification=True)
    for number in range(5):
        start, rows = table["first_row"][number].as_py(), table["rows"][number].as_py()
        assert np.array_equal(group["columns/head_ids"][start : start + rows], store[number].targets.ids)
        assert np.array_equal(group["columns/head_logits"][start : start + rows], store[number].targets.logits)


def test_a_store_travels_to_another_process(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s")
    assert pickle.loads(pickle.dumps(store))[2].id == store[2].id  # noqa: S301


def test_opening_says_when_the_digest_is_another(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s")
    assert open_store(tmp_path / "s", digest=store.digest).digest == store.digest
    with pytest.raises(MismatchError, match="digest"):
        open_store(tmp_path / "s", digest="0" * 64)


def test_equal_content_has_equal_digests_whatever_the_order_of_shards(tmp_path: Path) -> None:
    first = tiny.write_store(tmp_path / "a")
    columns = standard_columns(k=8, vocab_size=50, kept=Kept("float32"))
    writer = StoreWriter.open(tmp_path / "b", tiny.plan(columns, ((20, 20, 11), (30, 9)), vocabulary=50, k=8))
    for index in (1, 0):
        shard = first.read_shard(index)
        ids = shard.table["sample_id"].to_pylist()
        writer.write_shard(index, shard.columns, tiny.SampleTable(ids, np.diff(shard.offsets)))
    assert writer.finish({"other": "provenance"}) == first.digest


def test_a_sound_store_has_no_problem(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s", kept=Kept("steps8"))
    assert check(store) == []
    assert check(store, quick=True) == []


def test_bytes_of_columns_and_the_rest_add_up(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s")
    assert sum(store.bytes_per_column().values()) == store.nbytes


def test_the_writer_refuses_what_the_plan_does_not_say(tmp_path: Path) -> None:
    columns = standard_columns(k=8, vocab_size=50, kept=Kept("float32"))
    writer = StoreWriter.open(tmp_path / "s", tiny.plan(columns, ((10,),), vocabulary=50, k=8))
    labels = np.arange(10)
    good = tiny.shard_columns(tiny.dense_rows(10, 50), labels, labels, 8)
    with pytest.raises(MismatchError, match="columns"):
        writer.write_shard(0, {"labels": labels}, tiny.SampleTable(["a"], np.array([10])))
    with pytest.raises(MismatchError, match="samples"):
        writer.write_shard(0, good, tiny.SampleTable(["a"], np.array([9])))
    with pytest.raises(MismatchError, match="beyond the vocabulary"):
        writer.write_shard(0, {**good, "labels": labels + 45}, tiny.SampleTable(["a"], np.array([10])))


def test_a_codec_of_no_name_we_know_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not know the codec"):
        standard_columns(k=8, vocab_size=50, kept=Kept("pickle"))


def test_the_store_never_imports_torch() -> None:
    code = "import sys, kdcache.store, kdcache.describe, kdcache.samples; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
