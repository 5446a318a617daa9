"""Teachers of vision libraries: what the library's model says is kept, and its weights come from safetensors only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers import load_classifier
from kdcache.classifiers._vision import ImageClassifier
from kdcache.config import parse_config
from kdcache.errors import AccessError, ConfigError, TeacherError
from kdcache.examples import write_examples
from kdcache.store import check, open_store
from kdcache.teachers import TeacherConfig
from kdcache.train import train
from kdcache.train.config import TrainConfig
from tests import networks

CLASSES = 6
NAMES = {"timm": "test_resnet", "torchvision": "squeezenet1_1"}
TAPS = {"timm": "layer2|mean", "torchvision": "features.5|mean"}


def library(kind: str) -> Any:
    return pytest.importorskip(kind, exc_type=(ImportError, RuntimeError))  # one of another build than torch's raises


@pytest.fixture(params=["timm", "torchvision"])
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, dict[str, Any]]:
    kind = request.param
    package = library(kind)
    torch.manual_seed(3)
    if kind == "timm":
        model = package.create_model(NAMES[kind], pretrained=False, num_classes=CLASSES)
    else:
        model = package.models.get_model(NAMES[kind], weights=None, num_classes=CLASSES)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    own = {"kind": kind, "model": NAMES[kind], "weights": str(tmp_path / "weights.safetensors"), "device": "cpu"}
    return model.eval(), {**own, "options": {"num_classes": CLASSES}}


def images(folder: Path, count: int = 24) -> Path:
    random = np.random.default_rng(0)
    pixels = random.normal(size=(count, 3, 32, 32))  # float64, as numpy makes them
    write_examples(folder, pixels=pixels, label=random.integers(0, CLASSES, count))
    return folder


def test_a_store_holds_what_the_librarys_model_says(teacher: tuple[nn.Module, dict[str, Any]], tmp_path: Path) -> None:
    model, own = teacher
    folder = images(tmp_path / "images")
    tree = {
        "examples": {"path": str(folder), "batch_size": 8, "features": [{"name": "map", "tap": TAPS[own["kind"]]}]},
        "teacher": own,
        "store": {"shard_positions": 16, "chunk_positions": 8, "preset": "lossless"},
    }
    capture(parse_config(CaptureConfig, tree), tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert check(store) == []
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(folder / "pixels.npy")).float())
    for number in (0, 13, 23):
        targets = store[number].targets
        assert np.allclose(targets.logits[0], logits[number].numpy()[targets.ids[0]], atol=1e-4)
    recorded = store.manifest.part("teacher")
    assert (recorded["kind"], recorded["name"], recorded["options"]) == (own["kind"], own["model"], own["options"])
    assert str(tmp_path) not in json.dumps(recorded)
    train_tree = {
        "student": {"factory": "tests.classifiers.test_vision:small"},
        "data": {"examples": str(folder), "batch_size": 8},
        "loss": {"hidden": [{"teacher": "map", "student": "conv|mean"}]},
        "run": {"epochs": 2, "device": "cpu"},
    }
    assert train(parse_config(TrainConfig, train_tree), tmp_path / "store", tmp_path / "run").steps == 6


def small(vocab_size: int) -> nn.Module:
    class Colours(networks.Conv):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels.float().mean(1, keepdim=True))

    return Colours(4, vocab_size)


def test_weights_come_from_safetensors_and_must_be_the_models(
    teacher: tuple[nn.Module, dict[str, Any]], tmp_path: Path
) -> None:
    _, own = teacher

    def said(**changed: Any) -> Any:
        return load_classifier(TeacherConfig(**{**own, **changed})).fingerprint

    with pytest.raises(ConfigError, match="has no weights"):
        said(weights=None)
    with pytest.raises(ConfigError, match="has no model 'resnet_of_my_own'"):
        said(model="resnet_of_my_own")
    torch.save({}, tmp_path / "weights.pth")
    for wrong in (tmp_path / "weights.pth", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(AccessError, match="no safetensors file"):
            said(weights=str(wrong))
    with pytest.raises(AccessError, match="size mismatch") as found:
        said(options={})
    assert "num_classes" in str(found.value.hint)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(AccessError, match="not the model's"):
        said(weights=str(tmp_path / "text.safetensors"))
    with pytest.raises(ConfigError, match="is not made"):
        said(options={"nonsense": 3})


def test_what_the_images_should_have_been_is_said(teacher: tuple[nn.Module, dict[str, Any]]) -> None:
    _, own = teacher
    model = load_classifier(TeacherConfig(**own))
    with pytest.raises(TeacherError) as found:
        model.forward({"pixels": np.zeros((2, 3, 32, 32), dtype=np.uint8)})
    assert "divided by [0." in str(found.value.hint)
    with pytest.raises(ConfigError, match="given one field"):
        model.forward({"pixels": np.zeros((2, 3, 32, 32)), "mask": np.zeros((2, 3))})
    with pytest.raises(ConfigError, match="nothing called 'layer9'"):
        model.forward({"pixels": np.zeros((2, 3, 32, 32))}, ["layer9"])
    half = load_classifier(TeacherConfig(**{**own, "dtype": "bfloat16"}))
    assert half.forward({"pixels": np.zeros((2, 3, 32, 32))}).logits.dtype == torch.bfloat16


def test_a_folder_of_timm_names_its_own_architecture(tmp_path: Path) -> None:
    timm = library("timm")
    made = {"num_classes": CLASSES, "in_chans": 1}
    model = timm.create_model("test_resnet", pretrained=False, **made).eval()
    settings = {
        "architecture": "test_resnet",
        "num_classes": CLASSES,
        "model_args": made,
        "pretrained_cfg": {"mean": [0.4]},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    pixels = np.random.default_rng(0).normal(size=(3, 1, 32, 32)).astype(np.float32)
    classifier = load_classifier(TeacherConfig(kind="timm", model=str(tmp_path), device="cpu"))
    with torch.no_grad():
        own = model(torch.from_numpy(pixels))
    assert torch.allclose(classifier.forward({"x": pixels}).logits, own, atol=1e-5)
    assert classifier.fingerprint["name"] == "test_resnet"
    with pytest.raises(ConfigError, match="weights of its own"):
        _ = load_classifier(TeacherConfig(kind="timm", model=str(tmp_path), weights="a.safetensors")).fingerprint
    (tmp_path / "config.json").unlink()
    with pytest.raises(AccessError, match=r"no config\.json"):
        _ = load_classifier(TeacherConfig(kind="timm", model=str(tmp_path))).fingerprint


def test_a_hubs_model_is_asked_for_where_the_name_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library("timm")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AccessError, match="not fetched"):
        _ = load_classifier(TeacherConfig(kind="timm", model="timm/none.of_this_name")).fingerprint


@pytest.mark.parametrize("name", ["pretrained", "checkpoint_path", "weights_backbone"])
def test_no_option_may_fetch_or_unpickle(name: str) -> None:
    for kind in ("timm", "torchvision"):
        with pytest.raises(ConfigError, match="may not be made"):
            load_classifier(TeacherConfig(kind=kind, model="a", options={name: "b"}))


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_a_missing_package_names_its_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in (kind, f"{kind}.models"):
        monkeypatch.setitem(sys.modules, name, None)
    classifier = load_classifier(TeacherConfig(kind=kind, model="a", weights="b"))
    assert isinstance(classifier, ImageClassifier)
    with pytest.raises(ConfigError) as found:
        _ = classifier.fingerprint
    assert "kdcache[vision]" in str(found.value.hint)


def test_weights_of_other_kinds_are_refused() -> None:
    for keys in ({"weights": "a"}, {"options": {"num_classes": 2}}):
        with pytest.raises(ConfigError, match="of the kinds timm and torchvision"):
            parse_config(TeacherConfig, {"model": "a", "kind": "transformers", **keys})
