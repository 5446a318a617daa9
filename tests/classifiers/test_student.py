"""Students and ensembles as teachers of examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache import train as training
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers import load_classifier
from kdcache.classifiers import student as student_module
from kdcache.config import parse_config
from kdcache.errors import AccessError, ConfigError, TeacherError
from kdcache.evaluate import evaluate
from kdcache.examples import Examples, write_examples
from kdcache.store import open_store
from kdcache.teachers import TeacherConfig
from kdcache.train import train
from kdcache.train.config import TrainConfig

COUNT, CLASSES = 48, 5
VIT = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


class Dropping(nn.Module):
    """Pixels [S, 1, 8, 8] to classes, with dropout of units and of channels, and one weight under two names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.channels, self.units = nn.Dropout2d(0.4), nn.Dropout(0.5)
        self.conv, self.again = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
        self.again.weight = self.conv.weight
        self.fc = nn.Linear(6, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        scaled = pixels.float() / 255
        found = self.channels(torch.relu(self.conv(scaled) + self.again(scaled)))
        return self.fc(self.units(found.mean((2, 3))))


def dropping(vocab_size: int) -> nn.Module:
    return Dropping(vocab_size)


def fixed() -> nn.Module:
    torch.manual_seed(3)
    return Dropping(CLASSES)


def other() -> nn.Module:
    torch.manual_seed(4)
    return Dropping(CLASSES)


def few() -> nn.Module:
    return Dropping(2)


HERE = "tests.classifiers.test_student"


@pytest.fixture
def pixels(tmp_path: Path) -> Examples:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, 1, 8, 8)).astype(np.uint8)
    return write_examples(tmp_path / "pixels", pixels=images, label=random.integers(0, CLASSES, COUNT))


def captured(pixels: Examples, out: Path, **teacher: Any) -> str:
    tree = {
        "examples": {"path": str(pixels.folder), "batch_size": 16},
        "teacher": teacher,
        "store": {"shard_positions": 16, "chunk_positions": 8, "preset": "lossless"},
    }
    return capture(parse_config(CaptureConfig, tree), out).digest


def trained(pixels: Examples, folder: Path, **student: Any) -> Path:
    captured(pixels, folder / "labels", model=f"{HERE}:fixed()")
    tree = {
        "student": student,
        "data": {"examples": str(pixels.folder), "batch_size": 16},
        "optim": {"learning_rate": 0.01, "warmup_steps": 0},
        "run": {"epochs": 3, "device": "cpu"},
    }
    train(parse_config(TrainConfig, tree), folder / "labels", folder / "run")
    return folder / "run"


def answers(pixels: Examples, config: dict[str, Any], field: str = "pixels") -> Tensor:
    model = load_classifier(TeacherConfig(**config))
    return model.forward({field: np.array(pixels.fields["pixels"])}).logits.cpu()


def test_the_name_of_the_result_is_that_of_training() -> None:
    assert student_module.RESULT == training.RESULT


@pytest.mark.parametrize(
    "student",
    [{"factory": f"{HERE}:dropping"}, {"config": VIT, "task": "image-classification"}],
    ids=["factory", "transformers"],
)
def test_a_student_answers_as_it_was_trained_to(pixels: Examples, tmp_path: Path, student: dict[str, Any]) -> None:
    if "config" in student:
        scaled = pixels.fields["pixels"].astype(np.float32) / 255
        pixels = write_examples(tmp_path / "values", pixel_values=scaled, label=np.asarray(pixels.label))
        captured(pixels, tmp_path / "labels", model="tests.classifiers.test_student:flat")
        tree = {
            "student": student,
            "data": {"examples": str(pixels.folder), "batch_size": 16},
            "run": {"steps": 4, "device": "cpu"},
        }
        train(parse_config(TrainConfig, tree), tmp_path / "labels", tmp_path / "run")
        run = tmp_path / "run"
    else:
        run = trained(pixels, tmp_path, **student)
    captured(pixels, tmp_path / "says", kind="student", model=str(run), device="cpu")
    found = evaluate(run, tmp_path / "says")
    assert (found.kl, found.top1_agreement) == (pytest.approx(0, abs=1e-5), 1.0)
    recorded = open_store(tmp_path / "says").manifest.part("teacher")
    assert recorded["kind"] == "student"
    assert str(tmp_path) not in json.dumps(recorded)
    last = max(int(one.name.removeprefix("step-")) for one in (run / "checkpoints").glob("step-*"))
    whole = load_classifier(TeacherConfig(kind="student", model=str(run)))
    snapshot = load_classifier(TeacherConfig(kind="student", model=str(run), checkpoint=last))
    assert snapshot.fingerprint == whole.fingerprint


def flat(pixel_values: Tensor) -> Tensor:
    return torch.zeros(len(pixel_values), CLASSES)


def test_a_checkpoint_is_an_earlier_student(pixels: Examples, tmp_path: Path) -> None:
    run = trained(pixels, tmp_path, factory=f"{HERE}:dropping")
    first, last = (int(one.name.removeprefix("step-")) for one in sorted((run / "checkpoints").glob("step-*")))
    own = {"kind": "student", "model": str(run), "device": "cpu"}
    assert torch.equal(answers(pixels, {**own, "checkpoint": last}), answers(pixels, own))
    assert not torch.equal(answers(pixels, {**own, "checkpoint": first}), answers(pixels, own))
    with pytest.raises(ConfigError, match="no checkpoint of step 1"):
        answers(pixels, {**own, "checkpoint": 1})


def test_what_is_no_student(pixels: Examples, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="no student of a finished run"):
        captured(pixels, tmp_path / "s", kind="student", model=str(tmp_path))
    run = trained(pixels, tmp_path, factory=f"{HERE}:dropping")
    document = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps({**document, "outputs": 3}))
    with pytest.raises(AccessError, match="does not load"):
        captured(pixels, tmp_path / "s", kind="student", model=str(run))
    document["config"]["data"]["examples"] = None
    (run / "train.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="trained on text"):
        captured(pixels, tmp_path / "s", kind="student", model=str(run))


MEMBERS = [{"model": f"{HERE}:fixed()", "device": "cpu"}, {"model": f"{HERE}:other()", "device": "cpu"}]


def test_the_mean_of_logits_and_of_probabilities(pixels: Examples) -> None:
    one, two = (answers(pixels, member) for member in MEMBERS)
    assert torch.allclose(answers(pixels, {"members": MEMBERS}), (one + two) / 2, atol=1e-6)
    mean = answers(pixels, {"members": MEMBERS, "ensemble": "probabilities"}).exp()
    assert torch.allclose(mean, (one.softmax(1) + two.softmax(1)) / 2, atol=1e-6)
    prints = [
        load_classifier(TeacherConfig(**keys)).fingerprint
        for keys in ({"members": MEMBERS}, {"members": MEMBERS[::-1]}, {"members": MEMBERS, "passes": 2})
    ]
    assert all(prints.count(one) == 1 for one in prints)


def test_passes_of_dropout_depend_on_nothing_but_their_number(pixels: Examples, tmp_path: Path) -> None:
    own = {"members": MEMBERS[:1], "passes": 6}
    whole = answers(pixels, own)
    assert not torch.allclose(whole, answers(pixels, MEMBERS[0]), atol=1e-3)
    torch.manual_seed(9)
    model = load_classifier(TeacherConfig(**own))
    parts = [
        model.forward({"pixels": np.array(pixels.fields["pixels"][at : at + 7])}).logits for at in range(0, COUNT, 7)
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    many = answers(pixels, {**own, "passes": 400})
    assert (many - answers(pixels, MEMBERS[0])).abs().mean() < (whole - answers(pixels, MEMBERS[0])).abs().mean()
    assert captured(pixels, tmp_path / "a", **own) == captured(pixels, tmp_path / "b", **own)


def test_what_an_ensemble_may_not_be(pixels: Examples, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no dropout layer"):
        answers(pixels, {"members": [{"model": f"{HERE}:flat"}], "passes": 2}, "pixel_values")
    with pytest.raises(TeacherError, match="different shapes"):
        answers(pixels, {"members": [*MEMBERS, {"model": f"{HERE}:few()", "device": "cpu"}]})
    with pytest.raises(ConfigError, match="no features"):
        load_classifier(TeacherConfig(**{"members": MEMBERS})).forward(
            {"pixels": np.array(pixels.fields["pixels"])}, ["fc"]
        )
    for wrong, said in (
        ({"model": "a", "kind": "ensemble"}, "go together"),
        ({"model": "a", "members": [{"model": "b"}], "kind": "module"}, "go together"),
        ({"model": "a", "passes": 2}, "name the model in members"),
        ({"model": "a", "checkpoint": 2}, "of kind student"),
        ({}, "'model' is missing"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_config(TeacherConfig, wrong)
