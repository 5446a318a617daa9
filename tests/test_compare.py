"""A comparison: every step a command in its own process, kept when finished, one table at the end."""

import json
from pathlib import Path
from typing import Any

import pytest

from kdcache import compare as module
from kdcache.compare import CompareConfig, StepError, compare
from kdcache.config import parse_config
from tests import tiny
from tests.train.test_train import STUDENT


def recipe(folder: Path) -> dict[str, Any]:
    return {
        "title": "tiny to tinier",
        "capture": tiny.capture_tree(folder),
        "held_out": {"targets": {"exact": True}, "source": {"limit": 3}},
        "train": {"student": STUDENT, "run": {"steps": 2, "device": "cpu"}, "loss": {"alpha": 1.0}},
        "variants": [
            {"name": "hard labels", "train": {"loss": {"alpha": 0.0}}},
            {"name": "cached"},
            {"name": "online", "online": True},
        ],
    }


@pytest.mark.slow
def test_the_whole_way_ends_in_a_table_and_is_not_gone_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(CompareConfig, recipe(tmp_path))
    result = compare(config, tmp_path / "out", quiet=True)
    assert [row[0] for row in result["rows"]] == ["teacher", "hard labels", "cached", "online"]
    assert {len(row) for row in result["rows"]} == {len(result["columns"])}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    runs = result["measurements"]["runs"]
    assert not runs["cached"][0]["train"]["teacher_in_memory"]
    assert not runs["hard labels"][0]["train"]["teacher_in_memory"]
    assert runs["online"][0]["train"]["teacher_in_memory"]
    assert all(run[0]["train"]["peak_memory_bytes"] > 1e8 for run in runs.values())
    # the same head, tail and order: the online student learns what the cached one learns, to the codec's rounding
    losses = [runs[name][0]["train"]["loss"] for name in ("cached", "online")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert any("bytes a position" in note for note in result["notes"])
    assert any("throughput, cached / online" in note for note in result["notes"])

    def no_more(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a finished step was run again")

    monkeypatch.setattr(module.subprocess, "run", no_more)
    assert compare(config, tmp_path / "out", quiet=True)["rows"] == result["rows"]


@pytest.mark.slow
def test_a_step_that_fails_says_which_and_why(tmp_path: Path) -> None:
    tree = recipe(tmp_path)
    tree["capture"]["targets"]["k"] = 10_000
    with pytest.raises(StepError, match=r"The step 'capture' failed: k = 10000") as error:
        compare(parse_config(CompareConfig, tree), tmp_path / "out", quiet=True)
    assert error.value.code == "KD800"


def test_keys_are_laid_over_keys_at_any_depth() -> None:
    below = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert module._laid_over(below, {"a": {"c": [2]}, "e": 3}) == {"a": {"b": 1, "c": [2]}, "d": 2, "e": 3}
    assert below == {"a": {"b": 1, "c": [1]}, "d": 2}
