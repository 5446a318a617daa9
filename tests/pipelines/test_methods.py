"""Every loss and every way to weigh stands in a recipe, and what recipes say is a config."""

from pathlib import Path
from pkgutil import iter_modules
from typing import Any, get_args

import numpy as np
import pytest

from kdcache.config import parse_config
from kdcache.losses import attention, divergences, features, relations, responses
from kdcache.train.config import LossConfig, PairsConfig, TrainConfig, WeightConfig
from pipelines.digits import methods as digits
from pipelines.digits import recipe, values
from pipelines.spam import methods as spam

TRAININGS: list[dict[str, Any]] = [
    *recipe.VARIANTS.values(),
    *(one for group in digits.VARIANTS for one in group.values()),
    *({"loss": {**loss, **one["loss"]}} for _, loss, variants in values.TASKS.values() for one in variants.values()),
    *(
        one
        for stores in spam.groups(Path("teacher")).values()
        for _, _, variants in stores
        for one in variants.values()
    ),
]
CONFIGS = [parse_config(TrainConfig, {"student": {"factory": "a:b"}, **one}) for one in TRAININGS]
LOSSES = [one.loss for one in CONFIGS]


def modules(package: Any) -> set[str]:
    return {one.name for one in iter_modules(package.__path__)}


def choices(annotation: Any) -> set[str]:
    inner = get_args(annotation)
    return {annotation} if not inner else {found for one in inner for found in choices(one)}


def test_every_loss_of_responses_stands_in_a_recipe() -> None:
    assert {one.divergence for one in LOSSES} == modules(divergences) | modules(responses)


def test_every_loss_of_layers_stands_in_a_recipe() -> None:
    kinds = {pair.kind for one in LOSSES for pair in one.hidden}
    assert kinds == modules(features) | modules(relations) | modules(attention)


@pytest.mark.parametrize(
    ("section", "key", "found"),
    [
        (WeightConfig, "by", {one.weights.by for one in LOSSES if one.weights}),
        (PairsConfig, "rule", {one.pairs.rule for one in LOSSES if one.pairs}),
        (LossConfig, "combine", {one.combine for one in LOSSES}),
        (LossConfig, "hard", {one.hard for one in LOSSES}),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_every_choice_stands_in_a_recipe(section: Any, key: str, found: set[str]) -> None:
    assert found == choices(section.model_fields[key].annotation)


def test_where_the_ink_lies() -> None:
    pixels = np.zeros((2, 1, 28, 28), np.uint8)
    pixels[0, 0, 27, 0] = 255  # one corner
    pixels[1] = 255
    down, wide_down, right, wide_right, much = values.ink(pixels, np.zeros(2)).T
    assert down.tolist() == pytest.approx([1, 0], abs=1e-6)
    assert right.tolist() == pytest.approx([-1, 0], abs=1e-6)
    assert wide_down.tolist() == wide_right.tolist() == pytest.approx([0, 0.5976], abs=1e-3)
    assert much.tolist() == pytest.approx([4 / 784, 4])


def test_sets_of_digits() -> None:
    found = values.sets(np.zeros(10), np.arange(10))
    assert found.sum(0).tolist() == [5, 4, 4, 4, 5]
    assert found[4].tolist() == [1, 0, 1, 0, 0]
