"""Samples of the store that a contrastive loss holds a sample against."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError
from kdcache.store import open_store
from kdcache.train import train
from kdcache.train.bank import Bank
from kdcache.train.config import TrainConfig
from tests import tiny
from tests.killed import killed_at
from tests.train.test_train import config_of, losses


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the tiny teacher with its last hidden state, in several shards."""
    folder = tmp_path_factory.mktemp("bank")
    tree = tiny.capture_tree(folder)
    tree["targets"] = {"k": 8, "hidden": ["final"]}
    tree["store"] = {"shard_positions": 64}
    capture(parse_config(CaptureConfig, tree), folder / "store")
    return folder / "store"


def test_the_bank_holds_each_samples_mean_and_draws_none_of_the_batch(captured: Path) -> None:
    store = open_store(captured)
    assert len(store.shards) > 1
    means = []
    for index in range(len(store.shards)):
        shard = store.read_shard(index, ["hidden.final"])
        values = shard.columns["hidden.final"]
        means += [values[a:b].mean(0) for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
    bank = Bank(store, "final")
    assert len(bank) == len(store) == len(means)
    torch.manual_seed(0)
    without = torch.tensor([0, 2])
    found = bank.draw(500, without)
    distance = torch.cdist(found.double(), torch.from_numpy(np.stack(means)).double())
    assert float(distance.min(1).values.max()) < 1e-5
    assert all(float(distance[:, one].min()) < 1e-5 for one in range(len(store)) if one not in (0, 2))
    assert len(found) < 500
    alone = bank.draw(500, torch.arange(1, len(store)))
    assert float((alone - torch.from_numpy(means[0])).abs().max()) < 1e-5


def test_negatives_make_the_contrast_harder_and_resume_to_the_bit(captured: Path, tmp_path: Path) -> None:
    def config(negatives: int) -> TrainConfig:
        pair = {"kind": "crd", "negatives": negatives, "weight": 1.0}
        run = {"steps": 6, "device": "cpu", "checkpoint_every": 1}
        return config_of(loss={"hidden": [pair], "alpha": 1.0}, run=run)

    for count in (0, 64):
        train(config(count), captured, tmp_path / str(count))
    few, many = (losses(tmp_path / str(count), "hidden")[0] for count in (0, 64))
    assert many > few

    killed_at(3, config(64), captured, tmp_path / "killed")
    train(config(64), captured, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "64")


def test_negatives_without_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="negatives are for the kind crd"):
        config_of(loss={"hidden": [{"kind": "pkt", "negatives": 4}]})
