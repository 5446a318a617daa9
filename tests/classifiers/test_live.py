"""A classifier's store against its live teacher: compared with what it says, and mended by it to the same bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers.module import ModuleClassifier
from kdcache.cli import app
from kdcache.config import parse_config
from kdcache.edit import select
from kdcache.errors import ConfigError, MismatchError
from kdcache.examples import Examples, write_examples
from kdcache.repair import repair
from kdcache.store import check, open_store
from kdcache.teachers import TeacherConfig
from kdcache.verify import verify
from tests import networks
from tests.damage import harm

HERE = "tests.classifiers.test_live"
COUNT, CLASSES = 60, 5
VIEWS = {"views": 2, "crop": 1, "flip": True, "mix": 0.3}
FEATURES = [
    {"name": "map", "tap": "conv", "dtype": "int8"},
    {"name": "conv", "tap": "conv|mean", "dtype": "bfloat16"},
]


def fixed() -> torch.nn.Module:
    return networks.teacher(networks.Conv, 8, CLASSES)


def other() -> torch.nn.Module:
    return networks.teacher(networks.Conv, 9, CLASSES)


KINDS = ("zarr.json", "columns/head_ids/c/1", "columns/hidden.map/c/0", "samples/00001", "columns/augmentation/c/0")


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, 1, 8, 8)).astype(np.uint8)
    names = [f"i{n}" for n in range(COUNT)]
    write_examples(tmp_path / "ex", ids=names, pixels=images, label=random.integers(0, CLASSES, COUNT))
    made = {
        "examples": {"path": str(tmp_path / "ex"), "batch_size": 16, "features": FEATURES, "augment": VIEWS},
        "teacher": {"model": f"{HERE}:fixed()", "device": "cpu"},
        "store": {"shard_positions": 64, "chunk_positions": 16},
    }
    capture(parse_config(CaptureConfig, made), tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(made))
    return made


def test_answers_and_features_are_compared_with_the_live_teacher(tmp_path: Path, tree: dict[str, Any]) -> None:
    for teacher in (TeacherConfig(**tree["teacher"]), tree["teacher"]["model"]):
        report = verify(tmp_path / "s", teacher=teacher, examples=tmp_path / "ex", rows=100)
        assert report.problems == ()
        assert report.rows_compared == 2 * COUNT
        assert report.top1_agreement == 1.0
        assert report.max_logit_difference is not None
        assert report.max_logit_difference < 1 / 250  # half a step of 1/128, and a little
        assert {name: value < 0.02 for name, value in report.feature_differences.items()} == {"map": True, "conv": True}
    select(tmp_path / "s", tmp_path / "part", columns=["hidden.conv"], top=2)
    report = verify(tmp_path / "part", teacher=TeacherConfig(**tree["teacher"]), examples=tmp_path / "ex")
    assert (report.problems, list(report.feature_differences)) == ((), ["conv"])


def test_a_teacher_that_claims_to_be_the_captured_one_is_found(tmp_path: Path, tree: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="weights differ"):
        verify(tmp_path / "s", teacher=f"{HERE}:other()", examples=tmp_path / "ex")
    own = ModuleClassifier(TeacherConfig(**tree["teacher"]))
    for scale, path in ((3.0, "columns/head_logits"), (1.5, "columns/hidden.map")):
        liar = ModuleClassifier(TeacherConfig(**tree["teacher"]))
        with torch.no_grad():
            (liar._module.fc if "logits" in path else liar._module.conv).weight.mul_(scale)
        liar.__dict__["fingerprint"] = own.fingerprint
        report = verify(tmp_path / "s", teacher=liar, examples=tmp_path / "ex")
        assert path in [problem.path for problem in report.problems]


def test_other_examples_are_refused(tmp_path: Path, tree: dict[str, Any]) -> None:
    teacher = TeacherConfig(**tree["teacher"])
    with pytest.raises(ConfigError, match="does not hold its inputs"):
        verify(tmp_path / "s", teacher=teacher)
    found = Examples(tmp_path / "ex")
    pixels, labels = np.array(found.fields["pixels"]), np.array(found.fields["label"])
    write_examples(tmp_path / "pixels", ids=found.ids, pixels=pixels ^ 1, label=labels)
    with pytest.raises(MismatchError, match="is not what the teacher was given"):
        verify(tmp_path / "s", teacher=teacher, examples=tmp_path / "pixels")
    write_examples(tmp_path / "labels", ids=found.ids, pixels=pixels, label=(labels + 1) % CLASSES)
    with pytest.raises(MismatchError, match="labels of the examples"):
        verify(tmp_path / "s", teacher=teacher, examples=tmp_path / "labels")
    harm(tmp_path / "s", KINDS)
    problems = verify(tmp_path / "s").problems
    tree["examples"]["path"] = str(tmp_path / "pixels")
    with pytest.raises(MismatchError, match=r"source\.source\.fields\.pixels"):
        repair(tmp_path / "s", problems, config=parse_config(CaptureConfig, tree))


def test_the_teacher_gives_back_what_is_damaged(tmp_path: Path, tree: dict[str, Any]) -> None:
    hurt = harm(tmp_path / "s", KINDS)
    problems = verify(tmp_path / "s").problems
    wrong = {**tree, "teacher": {"model": f"{HERE}:other()", "device": "cpu"}}
    with pytest.raises(MismatchError, match=r"teacher\.weights"):
        repair(tmp_path / "s", problems, config=parse_config(CaptureConfig, wrong))
    changed = {**tree, "examples": {**tree["examples"], "augment": {**VIEWS, "seed": 4}}}
    with pytest.raises(MismatchError, match=r"capture\.examples\.augment"):
        repair(tmp_path / "s", problems, config=parse_config(CaptureConfig, changed))
    assert sorted(repair(tmp_path / "s", problems, config=parse_config(CaptureConfig, tree))) == hurt
    assert check(open_store(tmp_path / "s")) == []
    for name in open_store(tmp_path / "s").manifest.objects:
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()


def test_the_command_compares_and_mends(tmp_path: Path, tree: dict[str, Any]) -> None:
    line = ["verify", str(tmp_path / "s"), "-q", "--json", "--config", str(tmp_path / "c.yaml")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows_compared"] == 2 * COUNT
    harm(tmp_path / "s", KINDS)
    assert CliRunner().invoke(app, line).exit_code == 3
    done = CliRunner().invoke(app, [*line, "--repair"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ok"]
    model = ["--teacher", f"{HERE}:fixed()", "--examples", str(tmp_path / "ex")]
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "s"), "-q", *model])
    assert "same first candidate 1.0000" in done.stdout
