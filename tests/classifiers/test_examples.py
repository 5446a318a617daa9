"""A classifier's store: captured with views, features and values, trained from, and refused where it does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.augment.image import NUMBERS, PARTNER, SAME, ImageViews, apply, draw
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers.module import ModuleClassifier
from kdcache.config import parse_config
from kdcache.describe import first_samples
from kdcache.edit import merge, select
from kdcache.errors import ConfigError, Interrupted, MismatchError, SourceError, TeacherNumericsError
from kdcache.evaluate import evaluate
from kdcache.examples import Examples, view_inputs, views_digest, write_examples
from kdcache.share import pull, push
from kdcache.store import Store, check, open_store
from kdcache.stream import Loader, StreamConfig
from kdcache.teachers import TeacherConfig
from kdcache.train import train
from kdcache.train.config import TrainConfig
from kdcache.train.feed import Feed
from tests import networks

COUNT, CLASSES = 90, 5


def module(model: Any) -> ModuleClassifier:
    return ModuleClassifier(TeacherConfig(model="tests.networks:conv", device="cpu"), model)


@pytest.fixture
def pixels(tmp_path: Path) -> Examples:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, 1, 8, 8)).astype(np.uint8)
    labels = random.integers(0, CLASSES, COUNT)
    return write_examples(tmp_path / "pixels", ids=[f"i{n}" for n in range(COUNT)], pixels=images, label=labels)


def config_of(folder: Path, **sections: Any) -> CaptureConfig:
    own = {"path": str(folder), "batch_size": 16, **sections.pop("examples", {})}
    tree = {
        "examples": own,
        "teacher": {"model": "tests.networks:conv", "device": "cpu"},
        "store": {"shard_positions": 64, "chunk_positions": 16, "preset": "lossless"},
        **sections,
    }
    return parse_config(CaptureConfig, tree)


OPERATIONS = ["none", "contrast", "brightness", "erase", "invert"]
VIEWS: dict[str, Any] = {"views": 3, "crop": 1, "flip": True, "operations": OPERATIONS, "mix": 0.3}
FEATURES = [
    {"name": "conv", "tap": "conv|mean", "dtype": "float32"},
    {"name": "map", "tap": "conv", "dtype": "float32"},
]


@pytest.fixture
def teacher() -> Any:
    return networks.teacher(networks.Conv, 8, CLASSES)


def viewed(pixels: Examples, folder: Path, teacher: Any) -> Store:
    config = config_of(pixels.folder, examples={"augment": VIEWS, "features": FEATURES})
    capture(config, folder, classifier=module(teacher))
    return open_store(folder)


def test_every_view_is_what_the_teacher_says_of_it(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    store = viewed(pixels, tmp_path / "store", teacher)
    assert (len(store), store.num_positions, store.manifest.kind) == (COUNT, 3 * COUNT, "classifier")
    assert check(store) == []
    settings = ImageViews(**VIEWS)
    for number in (0, 41, 89):
        sample = store[number]
        drawn = draw(settings, [sample.id], np.asarray([number]), COUNT)
        views = view_inputs(pixels, np.asarray([number]), {"pixels": "pixels"}, settings, drawn)
        images = torch.from_numpy(np.concatenate([one["pixels"] for one in views]))
        with torch.no_grad():
            logits, maps = teacher(images), teacher.conv(images.float() / 255)
        order = logits.sort(dim=1, descending=True, stable=True)
        assert np.array_equal(sample.targets.ids, order.indices.numpy())
        assert np.allclose(sample.targets.logits, order.values.numpy(), atol=1e-5)
        assert np.allclose(sample.hidden["map"], maps.numpy(), atol=1e-5)
        assert np.allclose(sample.hidden["conv"], maps.mean((2, 3)).numpy(), atol=1e-5)
        assert sample.labels.tolist() == [int(pixels.fields["label"][number])] * 3


def test_a_captured_shard_is_not_made_again_and_the_digest_is_the_same(
    pixels: Examples, tmp_path: Path, teacher: Any
) -> None:
    straight = viewed(pixels, tmp_path / "straight", teacher)
    calls = []

    class Dies(ModuleClassifier):
        def forward(self, *args: Any) -> Any:
            calls.append(None)
            if len(calls) == 8:
                raise KeyboardInterrupt
            return super().forward(*args)

    config = config_of(pixels.folder, examples={"augment": VIEWS, "features": FEATURES})
    with pytest.raises(KeyboardInterrupt):
        capture(config, tmp_path / "store", classifier=Dies(TeacherConfig(model="a:b", device="cpu"), teacher))
    before = len(calls)
    result = capture(config, tmp_path / "store", classifier=Dies(TeacherConfig(model="a:b", device="cpu"), teacher))
    assert result.digest == straight.digest
    assert len(calls) - before > 0
    assert capture(config, tmp_path / "store", classifier=module(teacher)).already_complete


def test_the_feed_gives_the_pixels_that_the_teacher_saw_view_by_view(
    pixels: Examples, tmp_path: Path, teacher: Any
) -> None:
    store = viewed(pixels, tmp_path / "store", teacher)
    data = parse_config(TrainConfig, train_tree(pixels)).data
    feed = Feed(store, data)
    assert feed.views == 3
    loader = Loader(store, StreamConfig(batch_size=7, extra=feed.extra))
    seen = set()
    for epoch in range(3):
        loader.set_epoch(epoch)
        for read in loader:
            batch = feed.fill(read, epoch)
            assert batch.num_positions == batch.num_samples == len(batch.inputs["pixels"])
            assert batch.extra["augmentation"][:, 7].tolist() == [float(epoch)] * batch.num_samples
            with torch.no_grad():
                logits = teacher(batch.inputs["pixels"])
            assert batch.targets is not None
            assert torch.allclose(logits.gather(1, batch.targets.ids.long()), batch.targets.logits, atol=1e-5)
            seen |= {(int(one), epoch) for one in batch.sample_index}
    assert len(seen) == 3 * COUNT


def train_tree(pixels: Examples, **sections: Any) -> dict[str, Any]:
    return {
        "student": {"factory": "tests.networks:conv"},
        "data": {"examples": str(pixels.folder), "batch_size": 16},
        "optim": {"learning_rate": 0.01, "warmup_steps": 0},
        "run": {"epochs": 2, "device": "cpu"},
        **sections,
    }


KINDS = [
    {"teacher": "conv", "student": "conv|mean", "kind": kind}
    for kind in (
        "mse",
        "cosine",
        "smooth_l1",
        "rkd_distance",
        "rkd_angle",
        "similarity_preserving",
        "pkt",
        "cka",
        "crd",
    )
]


@pytest.mark.parametrize(
    "loss",
    [
        {"temperature": 2.0, "alpha": 0.5},
        *({"divergence": one, "alpha": 0.5} for one in ("dkd", "dist", "logit_mse", "standardised_kl", "ranking")),
        *({"divergence": one} for one in ("skew_kl", "skew_reverse_kl", "total_variation", "adaptive_kl", "jsd")),
        {"hidden": KINDS, "alpha": 0.5},
        {"hidden": [{"teacher": "map", "student": "conv", "kind": "attention_transfer"}], "alpha": 0.5},
        {"hidden": [{"teacher": "conv", "student": "conv|mean", "normalise": True, "weight": 0.1}], "alpha": 0.5},
        *(
            {"weights": {"by": one, "power": 0.5}, "alpha": 0.5}
            for one in ("teacher_loss", "entropy", "confidence", "margin", "correct", "student_loss")
        ),
    ],
    ids=lambda one: "-".join(str(value)[:24] for value in one.values()),
)
def test_every_loss_trains_from_a_store_and_goes_down(
    loss: dict[str, Any], pixels: Examples, tmp_path: Path, teacher: Any
) -> None:
    viewed(pixels, tmp_path / "store", teacher)
    tree = train_tree(pixels, loss=loss, run={"epochs": 12, "device": "cpu"})
    result = train(parse_config(TrainConfig, tree), tmp_path / "store", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = np.mean([one["loss"] for one in lines[:6]])
    assert result.loss < first


def test_training_resumes_in_the_middle_of_an_epoch_of_views(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    viewed(pixels, tmp_path / "store", teacher)
    config = parse_config(TrainConfig, train_tree(pixels, run={"epochs": 3, "device": "cpu", "checkpoint_every": 4}))
    straight = train(config, tmp_path / "store", tmp_path / "straight")

    def stop(progress: Any) -> None:
        if progress.step == 9:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(config, tmp_path / "store", tmp_path / "run", progress=stop)
    again = train(config, tmp_path / "store", tmp_path / "run")
    assert again.loss == straight.loss


def test_a_held_out_store_is_measured(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    viewed(pixels, tmp_path / "store", teacher)
    tree = train_tree(
        pixels, data={"examples": str(pixels.folder), "batch_size": 16, "validation": str(tmp_path / "store")}
    )
    result = train(parse_config(TrainConfig, tree), tmp_path / "store", tmp_path / "run")
    assert result.validation is not None
    assert result.validation["positions"] == COUNT
    found = evaluate(tmp_path / "run")
    assert found.accuracy == pytest.approx(result.validation["accuracy"])
    assert 0 <= found.top1_agreement <= 1
    store = open_store(tmp_path / "store")
    labels = np.asarray([one.labels[0] for one in store])
    theirs = np.asarray([one.targets.ids[0, 0] for one in store])
    assert found.scores["teacher_accuracy"] == pytest.approx((labels == theirs).mean())
    assert found.scores["micro_f1"] == pytest.approx(found.accuracy)
    assert {"macro_f1", "brier", "teacher_brier", "expected_calibration_error"} <= found.scores.keys()


def test_answers_for_every_token(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    ids, mask = random.integers(0, 20, (40, 6)), np.ones((40, 6), dtype=np.int64)
    labels = np.where(random.random((40, 6)) < 0.4, random.integers(0, 3, (40, 6)), -100)
    labels[:, 0] = 1
    examples = write_examples(tmp_path / "ex", input_ids=ids, attention_mask=mask, label=labels)
    teacher = networks.teacher(networks.Tagger, 6, 3)
    capture(config_of(examples.folder), tmp_path / "store", classifier=module(teacher))
    store = open_store(tmp_path / "store")
    assert store.num_positions == int((labels >= 0).sum())
    with torch.no_grad():
        logits = teacher(torch.from_numpy(ids), torch.from_numpy(mask))
    sample = store[7]
    assert np.array_equal(sample.labels, labels[7][labels[7] >= 0])
    rows = logits[7][torch.from_numpy(labels[7] >= 0)]
    assert np.allclose(np.take_along_axis(rows.numpy(), sample.targets.ids, 1), sample.targets.logits, atol=1e-5)
    tree = {
        "student": {"factory": "tests.networks:tagger"},
        "data": {"examples": str(examples.folder), "batch_size": 8, "validation": str(tmp_path / "store")},
        "optim": {"learning_rate": 0.02},
        "run": {"epochs": 12, "device": "cpu"},
    }
    result = train(parse_config(TrainConfig, tree), tmp_path / "store", tmp_path / "run")
    assert result.validation is not None
    assert result.validation["top1_agreement"] > 0.6
    wrong = {
        **tree,
        "student": {"factory": "tests.networks:values"},
        "data": {"examples": str(examples.folder), "inputs": {"numbers": "attention_mask"}},
    }
    with pytest.raises((MismatchError, RuntimeError)):
        train(parse_config(TrainConfig, wrong), tmp_path / "store", tmp_path / "wrong")


@pytest.mark.parametrize(("hard", "divergence"), [("sigmoid", "sigmoid"), ("mse", "regression")])
def test_values_in_place_of_classes(hard: str, divergence: str, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    numbers = random.normal(size=(60, 4)).astype(np.float32)
    labels = (random.random((60, 3)) < 0.5).astype(np.float32)
    examples = write_examples(tmp_path / "ex", numbers=numbers, label=labels)
    capture(config_of(examples.folder), tmp_path / "store", classifier=module(networks.teacher(networks.Values, 8, 3)))
    tree = {
        "student": {"factory": "tests.networks:values"},
        "data": {"examples": str(examples.folder), "batch_size": 10},
        "loss": {"hard": hard, "divergence": divergence, "alpha": 0.8},
        "optim": {"learning_rate": 0.02},
        "run": {"epochs": 15, "device": "cpu"},
    }
    result = train(parse_config(TrainConfig, tree), tmp_path / "store", tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert result.loss < json.loads(lines[0])["loss"]
    scores = evaluate(tmp_path / "run", tmp_path / "store").scores
    assert scores["imitation_pearson"] > 0.3
    assert scores["teacher_mean_absolute_error"] > 0
    for loss in ({"hard": hard}, {"divergence": "forward_kl"}):
        with pytest.raises((ConfigError, MismatchError)):
            train(parse_config(TrainConfig, {**tree, "loss": loss}), tmp_path / "store", tmp_path / "no")


def test_another_modality_is_joined_by_id(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    capture(config_of(pixels.folder), tmp_path / "store", classifier=module(teacher))
    order = np.random.default_rng(3).permutation(COUNT)
    means = pixels.fields["pixels"].reshape(COUNT, 4, 16).mean(2).astype(np.float32)
    other = write_examples(tmp_path / "other", ids=[pixels.ids[n] for n in order], numbers=means[order])
    tree = train_tree(pixels, student={"factory": "tests.networks:values"})
    tree["data"] = {"examples": str(other.folder), "inputs": {"numbers": "numbers"}, "batch_size": 16}
    data = parse_config(TrainConfig, tree).data
    batch = next(iter(Loader(tmp_path / "store", StreamConfig(batch_size=5))))
    given = Feed(open_store(tmp_path / "store"), data).fill(batch, 0).inputs["numbers"]
    assert np.array_equal(given.numpy(), means[batch.sample_index.numpy()])
    assert train(parse_config(TrainConfig, tree), tmp_path / "store", tmp_path / "run").steps == 12


def test_other_examples_than_the_teachers_are_refused(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    store = viewed(pixels, tmp_path / "store", teacher)
    data = parse_config(TrainConfig, train_tree(pixels)).data
    changed = pixels.fields["pixels"].copy()
    changed[3, 0, 0, 0] ^= 1
    write_examples(tmp_path / "changed", ids=pixels.ids, pixels=changed, label=pixels.fields["label"])
    with pytest.raises(MismatchError, match="'i3' is not what the teacher was given"):
        Feed(store, data.model_copy(update={"examples": str(tmp_path / "changed")}))
    write_examples(tmp_path / "fewer", ids=pixels.ids[:50], pixels=changed[:50])
    with pytest.raises(SourceError, match="no sample 'i50'"):
        Feed(store, data.model_copy(update={"examples": str(tmp_path / "fewer")}))
    with pytest.raises(ConfigError, match="does not hold its inputs"):
        Feed(store, data.model_copy(update={"examples": None}))
    with pytest.raises(ConfigError, match="no field 'sound'"):
        Feed(store, data.model_copy(update={"inputs": {"pixels": "sound"}}))


def test_a_store_without_labels_trains_on_the_teacher_alone(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    bare = write_examples(tmp_path / "bare", pixels=pixels.fields["pixels"])
    capture(config_of(bare.folder), tmp_path / "store", classifier=module(teacher))
    tree = train_tree(bare, loss={"alpha": 0.9})
    with pytest.raises(MismatchError, match="no labels"):
        train(parse_config(TrainConfig, tree), tmp_path / "store", tmp_path / "run")
    # scores of labels that are not there would be those of class 0
    by, store = {"by": "correct"}, open_store(tmp_path / "store")
    for loss, data in (({"weights": by}, {}), ({}, {"sampling": by})):
        tree = train_tree(bare, loss={"alpha": 1.0, **loss})
        config = parse_config(TrainConfig, {**tree, "data": {**tree["data"], **data}})
        with pytest.raises(MismatchError, match="have no labels"):
            Feed(store, config.data).require_labels(config.loss)
    entropy = train_tree(bare, loss={"alpha": 1.0, "weights": {"by": "entropy"}})
    config = parse_config(TrainConfig, entropy)
    Feed(store, config.data).require_labels(config.loss)
    values = config.loss.model_copy(update={"divergence": "regression"})
    with pytest.raises(MismatchError, match="outputs are values"):
        Feed(store, config.data).require_labels(values)
    assert train(
        parse_config(TrainConfig, train_tree(bare, loss={"alpha": 1.0})), tmp_path / "store", tmp_path / "run"
    ).steps


def test_parts_and_unions_of_stores_keep_their_digests(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    viewed(pixels, tmp_path / "store", teacher)
    select(tmp_path / "store", tmp_path / "a", samples="0:40")
    select(tmp_path / "store", tmp_path / "b", samples="40:90")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    both = open_store(tmp_path / "both")
    assert check(both) == []
    data = parse_config(TrainConfig, train_tree(pixels)).data
    assert Feed(both, data).views == 3
    assert np.array_equal(both[77].targets.logits, open_store(tmp_path / "store")[77].targets.logits)


def test_what_a_classifier_may_not_say(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    def broken(pixels: torch.Tensor) -> torch.Tensor:
        logits = teacher(pixels)
        logits[5:] = torch.nan
        return logits

    with pytest.raises(TeacherNumericsError, match="NaN"):
        capture(config_of(pixels.folder), tmp_path / "a", classifier=module(broken))
    few = networks.teacher(networks.Conv, 8, 2)
    with pytest.raises(ConfigError, match="has 2 outputs"):
        capture(config_of(pixels.folder), tmp_path / "b", classifier=module(few))
    with pytest.raises(ConfigError, match="nothing called 'head'"):
        capture(
            config_of(pixels.folder, examples={"features": [{"name": "head"}]}),
            tmp_path / "c",
            classifier=module(teacher),
        )
    with pytest.raises(ConfigError, match="hidden, exact"):
        capture(config_of(pixels.folder, targets={"hidden": ["1"]}), tmp_path / "d", classifier=module(teacher))


def test_what_a_store_holds_is_shown_and_shared(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    store = viewed(pixels, tmp_path / "store", teacher)
    rows = first_samples(store.path, 1, positions=3, candidates=2, temperature=1.0)[0]["rows"]
    assert [row["candidates"][0]["id"] for row in rows] == store[0].targets.ids[:, 0].tolist()
    url = f"file://{tmp_path}/there"
    assert push(store.path, url).digest == store.digest
    assert pull(url, tmp_path / "back").digest == store.digest


def test_a_small_store_has_a_small_shard(pixels: Examples, tmp_path: Path, teacher: Any) -> None:
    sizes = {"shard_positions": 65536, "chunk_positions": 64}
    features = [{"name": "map", "tap": "conv", "dtype": "float32"}]
    capture(
        config_of(pixels.folder, store=sizes, examples={"features": features}),
        tmp_path / "s",
        classifier=module(teacher),
    )
    store = open_store(tmp_path / "s")
    assert (
        store.num_positions > 64
    )  # more than one chunk: they are of like size, and less than a row of each is left over
    assert 0 <= store.manifest.shard_rows - store.num_positions < -(-store.num_positions // 64)
    assert check(store) == []


def test_draws_depend_on_the_sample_and_the_view_alone() -> None:
    config = ImageViews(**VIEWS)
    ids = [f"s{n}" for n in range(20)]
    whole = draw(config, ids, np.arange(20), 20)
    assert whole.shape == (20, 3, NUMBERS)
    some = draw(config, ids[7:9][::-1], np.asarray([8, 7]), 20)
    assert np.array_equal(some, whole[7:9][::-1])
    assert whole[:, 0, SAME].all()
    assert not whole[:, 1:, SAME].any()
    assert (whole[:, :, PARTNER] != np.arange(20)[:, None]).all()
    other = draw(ImageViews(**{**VIEWS, "seed": 1}), ids, np.arange(20), 20)
    assert not np.array_equal(whole, other)


def test_augmented_pixels_are_the_same_bits_as_ever() -> None:
    # a change of these digests is a change of image.VERSION
    images = np.arange(6 * 2 * 5 * 7, dtype=np.uint32).reshape(6, 2, 5, 7).astype(np.uint8)
    config = ImageViews(**{**VIEWS, "views": 6, "plain_first": False})
    drawn = draw(config, [f"s{n}" for n in range(6)], np.arange(6), 6)
    views = [apply(config, images, drawn[:, view], images[::-1]) for view in range(6)]
    found = views_digest([{"x": np.stack(views, 1)}], 0).hex()
    assert found == DIGEST
    floats = apply(config, (images / 255).astype(np.float32), drawn[:, 0], images[::-1] / np.float32(255))
    assert floats.dtype == np.float32
    assert 0 <= floats.min() <= floats.max() <= 1


DIGEST = "42e62f60b36076f844c02383cc1e7d81"


def test_examples_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no examples"):
        Examples(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    np.save(tmp_path / "b.npy", np.zeros(4))
    with pytest.raises(SourceError, match="different lengths"):
        Examples(tmp_path)
    (tmp_path / "b.npy").unlink()
    np.save(tmp_path / "id.npy", np.asarray(["x", "y", "x"]))
    with pytest.raises(SourceError, match="twice"):
        Examples(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    np.save(tmp_path / "a.npy", np.asarray([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match="does not load"):
        Examples(tmp_path)


class Constant(torch.nn.Module):
    """Three values that never change."""

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(numbers), 3) * 0.5


def test_a_constant_teacher_has_errors_and_no_correlation(tmp_path: Path) -> None:
    numbers = np.random.default_rng(2).normal(size=(20, 4)).astype(np.float32)
    examples = write_examples(tmp_path / "ex", numbers=numbers, label=numbers[:, :3])
    capture(config_of(examples.folder), tmp_path / "store", classifier=module(Constant()))
    tree = {
        "student": {"factory": "tests.networks:values"},
        "data": {"examples": str(examples.folder), "batch_size": 10},
        "loss": {"hard": "mse", "divergence": "regression"},
        "run": {"epochs": 1, "device": "cpu"},
    }
    train(parse_config(TrainConfig, tree), tmp_path / "store", tmp_path / "run")
    scores = evaluate(tmp_path / "run", tmp_path / "store").scores
    assert scores["teacher_mean_absolute_error"] > 0
    assert {"pearson", "r_squared", "teacher_r_squared"} <= set(scores)
    assert not {"teacher_pearson", "imitation_pearson", "imitation_r_squared"} & set(scores)
