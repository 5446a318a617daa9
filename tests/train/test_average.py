"""The mean of a student's weights, and its earlier states: right, resumed exactly, and usable as a run is."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import Interrupted, MismatchError
from kdcache.evaluate import evaluate
from kdcache.train import TrainProgress, train
from kdcache.train.average import Average
from tests import tiny
from tests.killed import killed_at
from tests.train.test_train import config_of, losses


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the tiny teacher."""
    folder = tmp_path_factory.mktemp("average")
    capture(parse_config(CaptureConfig, tiny.capture_tree(folder)), folder / "store")
    return folder / "store"


def test_the_mean_is_the_recursion_over_weights_and_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = Average(model, 0.9)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for step in range(30):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
        model(torch.randn(5, 3))
        average.update(model)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            moving = decay * expected[name] + (1 - decay) * value.double()
            expected[name] = moving if value.is_floating_point() else value.double()
    for name, value in average.averaged(model).state_dict().items():
        assert torch.allclose(value.double(), expected[name], atol=1e-6), name


def test_the_mean_is_kept_and_resumed_to_the_bit(captured: Path, tmp_path: Path) -> None:
    run = {"steps": 6, "device": "cpu", "checkpoint_every": 1, "ema": 0.5, "snapshot_every": 2}
    train(config_of(run=run), captured, tmp_path / "whole")

    killed_at(4, config_of(run=run), captured, tmp_path / "killed")
    result = train(config_of(run=run), captured, tmp_path / "killed")
    for part in (".", "ema", "snapshots/step-00000002", "snapshots/step-00000006"):
        one, other = (load_file(tmp_path / name / part / "model.safetensors") for name in ("whole", "killed"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    last, mean, middle = (
        load_file(tmp_path / "whole" / part / "model.safetensors") for part in (".", "ema", "snapshots/step-00000004")
    )
    assert any(not torch.equal(last[name], mean[name]) for name in last)
    assert any(not torch.equal(last[name], middle[name]) for name in last)
    # the report covers the steps of the process that was killed, too
    assert result.loss == pytest.approx(losses(tmp_path / "whole")[-1])


def test_the_mean_and_a_snapshot_are_measured_and_taught_from_like_a_run(captured: Path, tmp_path: Path) -> None:
    run = {"steps": 4, "device": "cpu", "ema": 0.9, "snapshot_every": 2}
    train(config_of(run=run), captured, tmp_path / "run")
    for part in ("ema", "snapshots/step-00000002"):
        folder = tmp_path / "run" / part
        assert evaluate(folder, captured).perplexity > 1
        own = tmp_path / part.replace("/", "-")
        own.mkdir()
        tree = tiny.capture_tree(own)
        tree["teacher"]["model"] = str(folder)
        made = capture(parse_config(CaptureConfig, tree), tmp_path / "stores" / part)
        assert made.positions > 0
        with pytest.raises(MismatchError):
            train(config_of(run=run), captured, folder)
    record = json.loads((tmp_path / "run" / "snapshots/step-00000002" / "train.json").read_text())
    assert record["result"] == {"steps": 2}
    assert not list((tmp_path / "run").glob("snapshots/step-00000003"))


def test_a_stop_at_a_snapshots_step_leaves_the_snapshot(captured: Path, tmp_path: Path) -> None:
    config = config_of(run={"steps": 6, "device": "cpu", "snapshot_every": 2})

    def stop(progress: TrainProgress) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config, captured, tmp_path / "run", progress=stop)
    train(config, captured, tmp_path / "run")
    found = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())
    assert found == ["step-00000002", "step-00000004", "step-00000006"]
