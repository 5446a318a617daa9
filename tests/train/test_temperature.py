"""Temperatures that are not one number: by the teacher's entropy, and learned; against dense float64 maths."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError, Interrupted
from kdcache.store import open_store
from kdcache.stream import Loader, StreamConfig
from kdcache.targets.tensor import TensorTargets
from kdcache.train import TrainProgress, train
from kdcache.train.config import EntropyTemperature, LearnedTemperature, LossConfig, TrainConfig
from kdcache.train.objective import Objective
from kdcache.train.student import build_student
from kdcache.train.temperature import LEVELS, Learned, by_entropy
from tests import tiny
from tests.train.test_train import config_of, losses

BOTH = {"sure": 4.0, "unsure": 1.0}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the tiny teacher that keeps every logit."""
    folder = tmp_path_factory.mktemp("temperature")
    tree = {**tiny.capture_tree(folder), "targets": {"k": 300, "logits": "float32", "exact": True}}
    capture(parse_config(CaptureConfig, tree), folder / "whole")
    return folder


def dense(logits: Tensor) -> TensorTargets:
    """Return whole rows as targets."""
    top = logits.sort(1, descending=True)
    empty = torch.full((len(logits), 8), -math.inf)
    return TensorTargets(top.indices, top.values, empty, logits[:, 0], logits.shape[1])


def test_the_temperature_goes_from_sure_to_unsure_by_the_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 11) * torch.linspace(0, 12, 50)[:, None]
    found = by_entropy(EntropyTemperature(**BOTH), dense(logits))
    log_p = torch.log_softmax(logits.double(), 1)
    share = -(log_p.exp() * log_p).sum(1) / math.log(11)
    assert (found - (4 - 3 * share)).abs().max() <= 1.5 / (LEVELS - 1) + 1e-6
    assert found[0] == 1.0  # all alike
    assert len(found.unique()) <= LEVELS


def objective(folder: Path, temperature: Any, **loss: Any) -> tuple[Objective, Any]:
    store = open_store(folder / "whole")
    student = build_student(config_of().student, store, seed=0)
    config = parse_config(LossConfig, {"alpha": 0.7, "temperature": temperature, **loss})
    batch = next(iter(Loader(store, StreamConfig(batch_size=2))))
    return Objective(config, student, store), batch


def test_each_position_has_the_loss_of_its_own_temperature(captured: Path) -> None:
    mixed, batch = objective(captured, BOTH)
    rows = batch.mask.nonzero()[:, 0]
    own = by_entropy(EntropyTemperature(**BOTH), batch.targets[rows])
    assert len(own.unique()) > 1
    mixed.zero_grad()
    loss = mixed(batch, 0.7, 1.0, float(len(rows)))["loss"]
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    gradients = [torch.zeros_like(one) for one in mixed.parameters()]
    for value in own.unique():
        single, _ = objective(captured, float(value))
        mask = torch.zeros_like(batch.mask)
        mask[rows[own == value]] = True
        part = single(replace(batch, mask=mask), 0.7, float(value), float(len(rows)))["loss"]
        part.backward()
        total += part.detach().double()
        for sums, one in zip(gradients, single.parameters(), strict=True):
            sums += one.grad
    assert float(loss.detach()) == pytest.approx(float(total), rel=1e-6)
    for sums, one in zip(gradients, mixed.parameters(), strict=True):
        assert torch.allclose(sums, one.grad, atol=1e-6)


def test_one_temperature_for_both_ends_is_that_temperature(captured: Path, tmp_path: Path) -> None:
    for name, temperature in (("entropy", {"sure": 2.0, "unsure": 2.0}), ("number", 2.0)):
        train(config_of(loss={"temperature": temperature}), captured / "whole", tmp_path / name)
    assert np.allclose(losses(tmp_path / "entropy"), losses(tmp_path / "number"), rtol=1e-6)
    assert losses(tmp_path / "entropy", "temperature") == [2.0] * 6


@pytest.mark.parametrize("towards", ["harder", "easier"])
def test_the_slope_is_that_of_autograd(towards: str) -> None:
    torch.manual_seed(1)
    teacher, student = torch.randn(2, 20, 9, dtype=torch.float64) * 3

    def loss(temperature: Any) -> Tensor:
        log_p, log_q = (torch.log_softmax(one / temperature, 1) for one in (teacher, student))
        return (log_p.exp() * (log_p - log_q)).sum(1).mean() * temperature**2

    learned = Learned(LearnedTemperature(start=3.0, towards=towards)).double()
    assert float(learned().detach()) == pytest.approx(3.0)
    nothing = learned.pull(loss)
    nothing.backward()
    assert float(nothing.detach()) == 0
    got, learned.x.grad = learned.x.grad, None
    loss(learned()).backward()
    sign = -1 if towards == "harder" else 1
    assert float(got) == pytest.approx(sign * float(learned.x.grad), rel=1e-3)


def test_a_learned_temperature_goes_by_the_positions_that_weigh(captured: Path, tmp_path: Path) -> None:
    found = {}
    for power in (0.0, 3.0):
        weights = {"by": "entropy", "power": power}
        config = config_of(loss={"temperature": {"towards": "harder"}, "alpha": 1.0, "weights": weights})
        train(config, captured / "whole", tmp_path / str(power))
        found[power] = losses(tmp_path / str(power), "temperature")
    assert found[0.0][0] == found[3.0][0]
    assert found[0.0][-1] != found[3.0][-1]


def test_a_learned_temperature_moves_and_resumes_to_the_bit(captured: Path, tmp_path: Path) -> None:
    run = {"steps": 8, "device": "cpu", "checkpoint_every": 1}
    config = config_of(loss={"temperature": {"towards": "harder"}, "alpha": 1.0}, run=run)
    train(config, captured / "whole", tmp_path / "whole")

    def stop(progress: TrainProgress) -> None:
        if progress.step == 4:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        train(config, captured / "whole", tmp_path / "stopped", progress=stop)
    train(config, captured / "whole", tmp_path / "stopped")
    temperatures = losses(tmp_path / "whole", "temperature")
    assert temperatures[0] == pytest.approx(4.0)
    assert len(set(temperatures)) > 1
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert losses(tmp_path / "stopped", "temperature") == temperatures


def test_a_batch_in_which_nothing_counts_has_a_gradient_of_zero(captured: Path) -> None:
    # ranks wait for the gradients of all parameters, whatever their batches hold
    learned, batch = objective(captured, {"towards": "harder"})
    learned(replace(batch, mask=torch.zeros_like(batch.mask)), 0.7, 1.0, 1.0)["loss"].backward()
    assert learned.learned is not None
    assert learned.learned.x.grad is not None
    assert float(learned.learned.x.grad) == 0


def test_the_learned_temperature_is_no_part_of_the_student(captured: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    train(config_of(loss={"temperature": {"towards": "easier"}}), captured / "whole", tmp_path / "run")
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "learned" in name]  # noqa: SIM118


@pytest.mark.parametrize(
    "loss",
    [
        {"temperature": BOTH, "tail": "exact"},
        {"temperature": BOTH, "alpha": 0.0},
        {"temperature": {"towards": "harder"}, "divergence": "dist"},
        {"temperature": {"towards": "harder"}, "divergence": "logit_mse"},
        {"temperature": BOTH, "divergence": "ranking"},
        {"temperature": {"sure": math.nan, "unsure": 1.0}},
        {"temperature": {"sure": -1.0, "unsure": 1.0}},
        {"temperature": {"towards": "harder", "low": 5.0}},
    ],
)
def test_temperatures_without_sense_are_refused(captured: Path, tmp_path: Path, loss: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        train(config_of(loss=loss), captured / "whole", tmp_path / "run")


def test_the_config_says_which_form_a_temperature_has() -> None:
    forms = [2.0, {"start": 4.0, "end": 1.0}, BOTH, {"towards": "harder", "start": 2.0}]
    trees = [{"student": {"model": "x"}, "loss": {"temperature": one}} for one in forms]
    found = [type(parse_config(TrainConfig, tree).loss.temperature).__name__ for tree in trees]
    assert found == ["float", "Schedule", "EntropyTemperature", "LearnedTemperature"]
