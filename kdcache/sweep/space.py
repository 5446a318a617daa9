"""Where a search looks: keys of the training config, each with an axis of values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from kdcache.config import Section, parse_config
from kdcache.errors import ConfigError
from kdcache.fingerprint import canonical_json
from kdcache.store import Store
from kdcache.train import TrainConfig
from kdcache.train.objective import needs
from kdcache.train.schedule import extremes

TEMPERATURE, TAIL = "loss.temperature", "tail_log_partition"


class Axis(Section):
    """Where the value of one key is looked for: either low and high, or choices.

    Attributes:
        low: Smallest value.
        high: Largest value.
        log: Look evenly in the logarithm.
        integer: Whole numbers only.
        choices: The values, of any kind that the key takes.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "Axis":
        ends = (self.low, self.high)
        if self.choices is not None:
            if ends != (None, None) or self.log or self.integer:
                raise ValueError("give low and high, or choices alone")
            if not self.choices or len({canonical_json(one) for one in self.choices}) < len(self.choices):
                raise ValueError("choices are one or more values, each once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give both low and high, or choices")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low is a number below high, not {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic axis begins above 0")
        if self.integer and any(one != int(one) for one in (self.low, self.high)):
            raise ValueError("an axis of whole numbers begins and ends with one")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that have to be possible for all of them to be."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None  # the validator has refused an axis without
        assert self.high is not None
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)


def default_space() -> dict[str, Axis]:
    """Return what is searched where nothing else is said: alpha, temperature and learning rate."""
    return {
        "loss.alpha": Axis(low=0.1, high=1.0),
        "loss.temperature": Axis(low=1.0, high=8.0, log=True),
        "optim.learning_rate": Axis(low=1e-4, high=1e-2, log=True),
    }


class SweepConfig(Section):
    """The file that `--space` names.

    Attributes:
        sweep: Keys of the training config, such as `loss.alpha`, and where each is looked for.
    """

    sweep: dict[str, Axis] = Field(default_factory=default_space, min_length=1)


def placed(config: TrainConfig, point: Mapping[str, Any]) -> TrainConfig:
    """Return a training config with the values of a point in place of its own.

    Raises:
        ConfigError: There is no such key, or a value does not fit.
    """
    tree = config.model_dump(mode="json")
    for key, value in point.items():
        *groups, last = key.split(".")
        here = tree
        for group in groups:
            here = here.setdefault(group, {})
            if not isinstance(here, dict):
                raise ConfigError(f"{group!r} is a value, not a group of keys.", where=f"sweep: {key}")
        here[last] = value
    return parse_config(TrainConfig, tree, where=f"sweep: {', '.join(point)}")


def held_at_one(config: TrainConfig, space: Mapping[str, Axis], stores: Sequence[Store]) -> list[str]:
    """Return the keys of a space that stores cannot vary: the temperature, where one knows its tail at T = 1 alone."""
    hot = [key for key in space if key == TEMPERATURE or key.startswith(f"{TEMPERATURE}.")]
    bound = (needs(config.loss).targets and config.loss.tail != "renormalise") or "loss.tail" in space
    tails = [store.columns[TAIL].shape for store in stores if TAIL in store.columns]
    return hot if bound and (1,) in tails else []


def require_fit(config: TrainConfig, axes: Mapping[str, Axis]) -> None:
    """Refuse a space before the first trial: every end of every axis has to make a config.

    Raises:
        ConfigError: There is no such key, or a value does not fit.
    """
    for key, axis in axes.items():
        for value in axis.ends:
            loss = placed(config, {key: value}).loss
            low, high = extremes(loss.alpha)
            if not (0 <= low <= high <= 1 and extremes(loss.temperature)[0] > 0):
                raise ConfigError(
                    f"{value} is no value of {key}.",
                    where=f"sweep: {key}",
                    hint="Alpha goes from 0 to 1, and a temperature is positive.",
                )
