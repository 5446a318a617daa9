"""Trainings that end in the middle, as if their process had been killed after a step."""

from pathlib import Path

import pytest

from kdcache.train import TrainProgress, train
from kdcache.train.config import TrainConfig


class _Killed(BaseException):
    """No error of the package's: nothing may catch it."""


def killed_at(step: int, config: TrainConfig, store: Path, out: Path) -> None:
    """Train up to a step and no further."""

    def die(state: TrainProgress) -> None:
        if state.step == step:
            raise _Killed

    with pytest.raises(_Killed):
        train(config, store, out, progress=die)
