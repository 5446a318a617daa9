"""Layers paired by a rule."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from kdcache.errors import ConfigError
from kdcache.train.config import LossConfig, PairsConfig
from kdcache.train.features import with_pairs


def paired(rule: dict[str, Any], kept: list[str], layers: int) -> list[tuple[str, str]]:
    columns = dict.fromkeys(f"hidden.{name}" for name in kept)
    store: Any = SimpleNamespace(columns=columns, manifest=SimpleNamespace(kind="causal_lm"))
    student = nn.Linear(1, 1)
    student.config = SimpleNamespace(num_hidden_layers=layers)  # type: ignore[assignment]
    found = with_pairs(LossConfig(pairs=PairsConfig(**rule)), store, student)
    assert found.pairs is None
    return [(one.teacher, one.student) for one in found.hidden]


def test_layers_are_paired_by_a_rule() -> None:
    kept = ["final", "2", "10", "6", "12", "4", "8"]
    assert paired({"rule": "last", "count": 2}, kept, 3) == [("10", "2"), ("12", "3")]
    assert paired({"rule": "last", "count": 9}, kept, 3) == [("8", "1"), ("10", "2"), ("12", "3")]
    assert paired({"rule": "every"}, kept, 3) == [("4", "1"), ("8", "2"), ("12", "3")]
    assert paired({"rule": "every"}, ["12"], 2) == [("12", "1"), ("12", "2")]
    with pytest.raises(ConfigError, match="paired by their numbers"):
        paired({"rule": "every"}, ["final"], 3)
