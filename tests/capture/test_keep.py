"""What a capture keeps: presets, codecs, the ranking of ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.capture import CaptureProgress, SamplesProgress, capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import CorruptObjectError
from kdcache.store import check, open_store
from kdcache.store.ranking import ranks
from tests import tiny


def config_of(tree: dict[str, Any], **store: Any) -> CaptureConfig:
    return parse_config(CaptureConfig, {**tree, "store": {**tree["store"], **store}})


@pytest.mark.parametrize(("preset", "error"), [("compact", 0.5 / 128 + 1e-6), ("lossless", 0.0), ("raw", 0.0)])
def test_every_preset_gives_the_teachers_rows_back(preset: str, error: float, tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    capture(config_of(tree, preset=preset), tmp_path / "s")
    capture(config_of({**tree, "targets": {"k": 8, "logits": "float32"}}), tmp_path / "plain")
    store, plain = open_store(tmp_path / "s"), open_store(tmp_path / "plain")
    assert check(store) == []
    for ours, theirs in zip(store, plain, strict=True):
        assert np.array_equal(ours.targets.ids, theirs.targets.ids)
        assert np.abs(ours.targets.logits - theirs.targets.logits).max() <= error
        assert np.array_equal(ours.targets.tail, theirs.targets.tail)
        assert np.array_equal(ours.input_ids, theirs.input_ids)
    model = AutoModelForCausalLM.from_pretrained(tree["teacher"]["model"])
    with torch.no_grad():
        live = model(torch.from_numpy(store[0].input_ids[None])).logits[0, :-1]
    assert np.array_equal(live.topk(8).indices.numpy(), store[0].targets.ids)


def test_raw_is_larger_and_has_no_compressor(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    for preset in ("compact", "raw"):
        capture(config_of(tree, preset=preset), tmp_path / preset)
    raw = open_store(tmp_path / "raw")
    parts = [part for column in raw.columns.values() for _, part in column.arrays().values()]
    assert {part.compressor for part in parts} == {"none"}
    assert raw.bytes_per_column()["head_ids"] > open_store(tmp_path / "compact").bytes_per_column()["head_ids"]


def test_common_ids_have_low_ranks(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    capture(config_of(tree), tmp_path / "s")
    store = open_store(tmp_path / "s")
    ids = np.concatenate([sample.targets.ids.reshape(-1) for sample in store])
    place = ranks(store.ids_by_rank[: store.vocab_size])
    counts = np.bincount(ids, minlength=store.vocab_size)
    assert place[ids].mean() < np.arange(store.vocab_size).mean() / 2
    assert counts[store.ids_by_rank[:5]].min() > np.median(counts)


def test_a_capture_that_goes_on_keeps_the_ranking_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny.capture_tree(tmp_path)
    whole = capture(config_of(tree), tmp_path / "whole").digest

    def stop(state: CaptureProgress | SamplesProgress) -> None:
        if isinstance(state, CaptureProgress) and state.shard == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(config_of(tree), tmp_path / "s", progress=stop)

    def again(*_: Any) -> Any:
        raise AssertionError("the ranking was made twice")

    monkeypatch.setattr("kdcache.capture.survey", again)
    assert capture(config_of(tree), tmp_path / "s").digest == whole


def test_a_damaged_ranking_is_found(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    capture(config_of(tree), tmp_path / "s")
    path = tmp_path / "s" / "ranking" / "c" / "0"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptObjectError):
        open_store(tmp_path / "s")[0]
