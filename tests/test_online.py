"""The baseline gives the batches that a store gives, from a live teacher."""

from pathlib import Path

import pytest
import torch

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError, MismatchError
from kdcache.online import online_targets, train_online
from kdcache.store import Store, open_store
from kdcache.stream import Loader, StreamConfig
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.train import TrainConfig
from tests import tiny
from tests.train.test_train import STUDENT


@pytest.fixture
def captured(tmp_path: Path) -> tuple[Store, str]:
    tree = tiny.capture_tree(tmp_path, logits="float32")
    capture(parse_config(CaptureConfig, tree), tmp_path / "store")
    return open_store(tmp_path / "store"), tree["teacher"]["model"]


def test_a_live_batch_is_the_stored_one(captured: tuple[Store, str]) -> None:
    store, model = captured
    fill = online_targets(load_teacher(TeacherConfig(model=model, dtype="float32")), k=store.k)
    for stored in Loader(store, StreamConfig(batch_size=4)):
        live = fill(stored)
        assert live.targets is not None
        assert stored.targets is not None
        assert torch.equal(live.targets.ids, stored.targets.ids)
        torch.testing.assert_close(live.targets.logits, stored.targets.logits, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(live.targets.tail, stored.targets.tail, rtol=1e-5, atol=2e-3)
        assert torch.equal(live.labels, stored.labels)


def test_the_whole_distribution_comes_as_hidden_state_and_output_layer(captured: tuple[Store, str]) -> None:
    store, model = captured
    teacher = load_teacher(TeacherConfig(model=model, dtype="float32"))
    batch = online_targets(teacher, k=None)(next(iter(Loader(store, StreamConfig(batch_size=4, targets=False)))))
    assert batch.targets is None
    assert batch.output_head is not None
    rows = batch.output_head.logits(batch.hidden["final"])
    assert rows.shape == (batch.num_positions, store.vocab_size)
    assert not batch.hidden["final"].is_inference()  # a student's backward pass may keep it


def test_what_the_baseline_cannot_do_is_refused_before_it_starts(captured: tuple[Store, str], tmp_path: Path) -> None:
    store, model = captured
    base = {"student": STUDENT, "run": {"steps": 1, "device": "cpu"}}
    other = tiny.save_teacher(tmp_path / "other", vocabulary=310)
    with pytest.raises(MismatchError, match="vocabulary of 310"):
        train_online(parse_config(TrainConfig, base), store, tmp_path / "a", teacher=str(other))
    for loss in ({"tail": "sampled"}, {"hidden": [{"teacher": "final"}]}):
        with pytest.raises(ConfigError, match="no tail draws and no hidden features"):
            train_online(parse_config(TrainConfig, {**base, "loss": loss}), store, tmp_path / "b", teacher=model)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
