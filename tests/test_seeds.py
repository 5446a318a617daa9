"""Variants over seeds: every run is its own, resumes, and the table says what the runs say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from kdcache import seeds as module
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers.module import ModuleClassifier
from kdcache.cli import app
from kdcache.config import parse_config
from kdcache.errors import ConfigError
from kdcache.examples import write_examples
from kdcache.seeds import compare_variants, merged, teacher_on
from kdcache.store import open_store
from kdcache.train import train
from tests import networks

VARIANTS: dict[str, Any] = {"hard labels": {"loss": {"alpha": 0.0}}, "soft": {"loss": {"temperature": 2.0}}}


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (40, 1, 8, 8)).astype(np.uint8), random.integers(0, 3, 40)
    write_examples(tmp_path / "ex", pixels=images, label=labels)
    tree: dict[str, Any] = {
        "examples": {"path": str(tmp_path / "ex"), "augment": {"views": 2, "flip": True}},
        "teacher": {"model": "tests.networks:conv", "device": "cpu"},
    }
    config = parse_config(CaptureConfig, tree)
    capture(
        config, tmp_path / "store", classifier=ModuleClassifier(config.teacher, networks.teacher(networks.Conv, 8, 3))
    )
    return {
        "student": {"factory": "tests.networks:conv"},
        "data": {"examples": str(tmp_path / "ex"), "validation": str(tmp_path / "store"), "batch_size": 8},
        "run": {"steps": 4, "device": "cpu"},
    }


def test_the_table_is_of_the_runs(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **rest: Any) -> Any:
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **rest)

    monkeypatch.setattr(module, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        compare_variants(base, VARIANTS, tmp_path / "store", tmp_path / "out", seeds=(0, 1))
    table = compare_variants(base, VARIANTS, tmp_path / "store", tmp_path / "out", seeds=(0, 1))
    assert [row.name for row in table.rows] == list(VARIANTS)
    for row in table.rows:
        found = []
        for seed in (0, 1):
            folder = tmp_path / "out" / row.name.replace(" ", "-") / str(seed)
            found.append(json.loads((folder / "train.json").read_text())["result"]["validation"]["accuracy"])
        assert row.metrics["accuracy"] == (pytest.approx(np.mean(found)), pytest.approx(np.std(found, ddof=1)))
        assert row.seeds == 2
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == json.loads(json.dumps(table.as_dict()))
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("\n") == 5
    assert "| hard labels |" in text


def test_the_teacher_is_measured_on_the_first_view(base: dict[str, Any], tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    counted, teacher = teacher_on(store)
    firsts = list(store)
    assert counted == 40
    right = [one.targets.ids[0, 0] == one.labels[0] for one in firsts]
    loss = [-one.targets.label_log_probability(1.0)[0] for one in firsts]
    assert teacher == {"accuracy": pytest.approx(np.mean(right)), "cross_entropy": pytest.approx(np.mean(loss))}


def test_groups_are_joined_and_all_else_replaced() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merged(base, {"a": {"c": [3]}, "d": {"e": 1}}) == {"a": {"b": 1, "c": [3]}, "d": {"e": 1}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_without_a_held_out_store_nothing_is_compared(base: dict[str, Any], tmp_path: Path) -> None:
    del base["data"]["validation"]
    with pytest.raises(ConfigError, match="one held-out store"):
        compare_variants(base, VARIANTS, tmp_path / "store", tmp_path / "out")
    with pytest.raises(ConfigError, match="Did you mean 'alpha'"):
        compare_variants(base, {"x": {"loss": {"alhpa": 1}}}, tmp_path / "store", tmp_path / "out")


def test_the_command(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "variants.yaml").write_text(yaml.safe_dump(VARIANTS))
    args = ["compare", str(tmp_path / "train.yaml"), "--variants", str(tmp_path / "variants.yaml"), "--seeds", "3"]
    args += ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "-q"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0
    assert "| soft |" in done.output
    again = CliRunner().invoke(app, [*args, "--json"])
    assert json.loads(again.stdout)["rows"][0]["metrics"]["accuracy"][1] is None
