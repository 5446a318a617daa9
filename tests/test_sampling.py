"""Hard samples more often: right in the mean, whole in number, the same whatever reads, and resumed exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError, MismatchError
from kdcache.losses.difficulty import scores
from kdcache.store import open_store
from kdcache.store.schema import COUNTS
from kdcache.stream import Loader, SamplingConfig, StreamConfig, sample_order
from kdcache.stream.sampling import drawn_counts, sample_weights
from kdcache.targets.tensor import TensorTargets
from kdcache.train import train
from tests import tiny
from tests.killed import killed_at
from tests.train.test_train import config_of, losses


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the tiny teacher."""
    folder = tmp_path_factory.mktemp("sampling")
    capture(parse_config(CaptureConfig, tiny.capture_tree(folder)), folder / "store")
    return folder / "store"


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=40), st.integers(0, 1000))
def test_every_sample_comes_as_often_as_its_weight_rounded(weights: list[float], seed: int) -> None:
    own = np.asarray(weights) * (len(weights) / sum(weights))
    times = drawn_counts(own, np.random.default_rng(seed))
    assert times.sum() == len(own)
    assert (np.abs(times - own) < 1 + 1e-9).all()


def test_the_draws_are_right_in_the_mean() -> None:
    own = np.asarray([0.2, 0.3, 2.0, 1.5])
    random = np.random.default_rng(0)
    mean = np.mean([drawn_counts(own, random) for _ in range(4000)], axis=0)
    assert np.abs(mean - own).max() < 0.03


def test_an_order_without_weights_is_as_before_and_one_with_them_repeats() -> None:
    plain = sample_order([10] * 4, seed=1, epoch=0, pool_shards=2)
    weights = np.where(np.arange(40) % 2, 1.75, 0.25)
    drawn = sample_order([10] * 4, seed=1, epoch=0, pool_shards=2, weights=weights)
    assert sorted(plain) == list(range(40))
    assert len(drawn) == 40
    assert (drawn % 2).sum() > 30
    first = {one // 10 for one in drawn[: int(np.isin(drawn // 10, drawn[:1] // 10).sum())].tolist()}
    assert len(first) <= 2  # pools stay together


@pytest.mark.parametrize("by", ["teacher_loss", "entropy", "confidence", "margin", "correct"])
def test_a_samples_weight_is_the_mean_score_of_its_positions(captured: Path, by: str) -> None:
    store = open_store(captured)
    found = sample_weights(store, SamplingConfig(by=by, power=2.0, least=0.25))
    expected = []
    for index in range(len(store.shards)):
        shard = store.read_shard(
            index, ["labels", "loss_mask", "head_ids", "head_logits", "tail_log_partition", "label_logit"]
        )
        targets = shard.targets()
        assert targets is not None
        p = targets.probabilities(1.0)
        tail = targets.tail_mass(1.0)
        every = np.concatenate([p, tail[:, None]], 1)
        score = {
            "teacher_loss": -targets.label_log_probability(1.0),
            "entropy": -(every * np.log(every)).sum(1),
            "confidence": p[:, 0],
            "margin": p[:, 0] - p[:, 1],
            "correct": np.where(targets.ids[:, 0] == shard.columns["labels"], 1.0, 0.1),
        }[by]
        for begin, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            counted = shard.columns["loss_mask"][begin:end] == COUNTS
            expected.append(score[begin:end][counted].mean())
    squared = np.maximum(1e-3, expected) ** 2
    assert np.allclose(found, 0.25 + 0.75 * squared * len(squared) / squared.sum(), rtol=1e-4)
    assert found.sum() == pytest.approx(len(store))


def read(captured: Path, **changed: Any) -> list[list[int]]:
    config = StreamConfig(batch_size=2, sampling=SamplingConfig(by="teacher_loss", power=3.0), **changed)
    return [batch.sample_index.tolist() for batch in Loader(captured, config)]


def test_the_order_is_the_same_whatever_reads_and_ranks_share_it(captured: Path) -> None:
    whole = read(captured)
    assert read(captured, workers=2) == whole
    ranks = [read(captured, world_size=2, rank=rank) for rank in (0, 1)]
    both = [sorted(a + b) for a, b in zip(*ranks, strict=True)]
    flat = [one for batch in whole for one in batch]
    assert both == [sorted(flat[at : at + 4]) for at in range(0, 4 * len(both), 4)]


def test_training_goes_on_exactly_and_another_sampling_is_refused(captured: Path, tmp_path: Path) -> None:
    data = {"batch_size": 2, "sampling": {"by": "entropy"}}
    run = {"steps": 6, "device": "cpu", "checkpoint_every": 1}
    train(config_of(data=data, run=run), captured, tmp_path / "whole")

    killed_at(3, config_of(data=data, run=run), captured, tmp_path / "killed")
    train(config_of(data=data, run=run), captured, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    state = Loader(captured, StreamConfig(sampling=SamplingConfig(by="entropy"))).state_dict()
    with pytest.raises(MismatchError):
        Loader(captured, StreamConfig(sampling=SamplingConfig(by="margin"))).load_state_dict(state)
    with pytest.raises(MismatchError):
        Loader(captured, StreamConfig()).load_state_dict(state)


def test_what_sampling_does_not_go_with_is_refused() -> None:
    by = {"by": "entropy"}
    with pytest.raises(ConfigError, match="sampling goes with shuffle"):
        config_of(data={"sampling": by, "shuffle": False})
    with pytest.raises(ValueError, match="sampling goes with shuffle"):
        StreamConfig(sampling=SamplingConfig(by="entropy"), shuffle=False)
    with pytest.raises(ConfigError, match=r"fit: data\.sampling repeats samples"):
        config_of(data={"sampling": by}, loss={"hidden": [{"kind": "crd"}]})
    with pytest.raises(ConfigError, match=r"data\.sampling\.power"):
        config_of(data={"sampling": {**by, "power": float("nan")}})


@pytest.mark.parametrize("power", [-900.0, 900.0])
def test_no_power_makes_weights_that_are_no_numbers(captured: Path, power: float) -> None:
    store = open_store(captured)
    weights = sample_weights(store, SamplingConfig(by="entropy", power=power, least=0.5))
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(len(store))
    plain = sample_weights(store, SamplingConfig(by="entropy"))
    assert (weights.argmax() == plain.argmax()) == (power > 0)


def test_a_label_that_the_teacher_holds_impossible_is_hard_and_not_all_there_is() -> None:
    ids, logits = torch.tensor([[0, 1]] * 3), torch.tensor([[0.7, 0.3]] * 3).log()
    label = torch.tensor([-torch.inf, torch.nan, logits[0, 1]])
    targets = TensorTargets(ids, logits, torch.full((3, 8), -torch.inf), label, 2)
    found = scores("teacher_loss", targets, torch.tensor([1, 1, 1]))
    assert found.tolist() == pytest.approx([1e4, 0.0, -float(logits[0, 1])])
