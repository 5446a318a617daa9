"""Several teachers: a dense oracle, joined by id and never by position, refused before the first step."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.augment import ImageViews
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers.module import ModuleClassifier
from kdcache.config import parse_config
from kdcache.edit import merge, select
from kdcache.errors import ConfigError, MismatchError
from kdcache.examples import write_examples
from kdcache.online import train_online
from kdcache.store import Store, open_store
from kdcache.stream import Loader, StreamConfig
from kdcache.targets.tensor import TensorTargets
from kdcache.teachers import TeacherConfig
from kdcache.train import METRICS, train
from kdcache.train import teachers as several
from kdcache.train.config import TrainConfig
from kdcache.train.feed import Feed
from kdcache.train.objective import Objective
from kdcache.train.student import build_student
from kdcache.train.teachers import Companions, teacher_weights
from tests import networks, tiny
from tests.train.test_train import STUDENT, losses

WEIGHT = 3.0
"""Of the second teacher, in all tests that do not say otherwise."""


def config_of(*others: Path, **sections: Any) -> TrainConfig:
    data = {"batch_size": 3, "teachers": [{"store": str(one), "weight": WEIGHT} for one in others]}
    tree = {"student": STUDENT, "run": {"steps": 6, "device": "cpu"}, "loss": {"alpha": 1.0}, **sections}
    return parse_config(TrainConfig, {**tree, "data": {**data, **sections.get("data", {})}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of two tiny teachers `a` and `b` over one text: whole rows, and the top eight with draws."""
    root = tmp_path_factory.mktemp("teachers")
    tree = tiny.capture_tree(root)
    for name, seed in (("a", 0), ("b", 5)):
        tree["teacher"]["model"] = str(tiny.save_teacher(root / f"teacher-{name}", seed=seed))
        for kind, targets in (("whole", {"k": 300, "logits": "float32"}), ("top", {"k": 8, "draws": 4})):
            capture(parse_config(CaptureConfig, {**tree, "targets": targets}), root / f"{kind}-{name}")
    return root


def permuted(store: Path, out: Path) -> Path:
    """Write a store's samples in another order, to other shards."""
    count = len(open_store(store))
    cuts = [0, 2, 5, count // 2, count - 1, count]
    parts = []
    for first, last in pairwise(cuts):
        parts.append(out / f"{first}")
        select(store, parts[-1], samples=f"{first}:{last}")
    merge([parts[at] for at in (3, 0, 4, 2, 1)], out / "all")
    return out / "all"


def one_batch(store: Store, config: TrainConfig, **options: Any) -> Any:
    stream = StreamConfig(batch_size=len(store), seed=1, targets=True, **options)
    return Companions(store, config.data, config.loss).fill(next(iter(Loader(store, stream))))


def dense(targets: TensorTargets) -> Tensor:
    """Return the raw logits of whole rows in the order of ids."""
    return torch.empty_like(targets.logits).scatter_(1, targets.ids.long(), targets.logits).double()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("combine", ["fixed", "confidence", "loss"])
def test_two_teachers_are_what_dense_rows_say(folder: Path, combine: str, temperature: float) -> None:
    config = config_of(folder / "whole-b", loss={"combine": combine, "temperature": temperature}, data={"weight": 2.0})
    store = open_store(folder / "whole-a")
    batch = one_batch(store, config)
    student = build_student(config.student, store, seed=0)
    terms = Objective(config.loss, student, store, teachers=(2.0, WEIGHT))(
        batch, 1.0, temperature, float(batch.num_positions)
    )
    padded = batch.padded()
    logits = student(padded.input_ids, padded.attention_mask).logits.flatten(0, 1)[padded.index].double()
    rows = [dense(batch.targets), dense(batch.others[0])]
    scores = []
    for weight, row in zip((2.0, WEIGHT), rows, strict=True):
        p = row.softmax(1)
        told = p.gather(1, batch.labels[:, None])[:, 0]
        scores.append(weight * {"fixed": torch.ones_like(told), "confidence": p.amax(1), "loss": told}[combine])
    shares = torch.stack(scores) / torch.stack(scores).sum(0)
    log_q = (logits / temperature).log_softmax(1)
    each = [
        ((row / temperature).log_softmax(1).exp() * ((row / temperature).log_softmax(1) - log_q)).sum(1) for row in rows
    ]
    expected = (shares * torch.stack(each)).sum(0).mean()
    assert terms["divergence"].item() == pytest.approx(expected.item(), rel=1e-5)
    # of the forward KL, the gradient is that of the KL from the mixture of the teachers
    mixture = sum(share[:, None] * (row / temperature).softmax(1) for share, row in zip(shares, rows, strict=True))
    weight = student.lm_head.weight if hasattr(student, "lm_head") else next(student.parameters())
    ours = torch.autograd.grad(terms["loss"], weight)[0]
    whole = (mixture * (mixture.log() - log_q)).sum(1).mean() * temperature**2
    theirs = torch.autograd.grad(whole, weight)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_rows_are_those_of_the_sample_whatever_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = permuted(folder / "top-b", tmp_path)
    config = config_of(other, folder / "whole-b", loss={"tail": "bucket"})
    for room in (several.CACHE_BYTES, 1):
        monkeypatch.setattr(several, "CACHE_BYTES", room)
        store = open_store(folder / "top-a")
        companions = Companions(store, config.data, config.loss)
        batches = Loader(store, StreamConfig(batch_size=2))
        for batch in map(companions.fill, batches):
            for at, name in enumerate((other, folder / "whole-b")):
                ids = {sample.id: sample for sample in open_store(name)}
                wanted = [ids[store[int(number)].id].targets for number in batch.sample_index]
                got = batch.others[at].numpy()
                for field in ("ids", "logits", "tail", "label_logit"):
                    assert np.array_equal(getattr(got, field), np.concatenate([getattr(w, field) for w in wanted]))


def test_another_order_and_other_shards_give_the_same_losses(folder: Path, tmp_path: Path) -> None:
    other = permuted(folder / "top-b", tmp_path / "p")
    for name, store in (("same", folder / "top-b"), ("permuted", other)):
        loss = {"alpha": 0.8, "combine": "confidence", "tail": "sampled", "temperature": 2.0}
        train(config_of(store, loss=loss), folder / "top-a", tmp_path / name)
    assert losses(tmp_path / "same") == losses(tmp_path / "permuted")


def test_the_same_teacher_twice_is_that_teacher(folder: Path, tmp_path: Path) -> None:
    train(config_of(), folder / "top-a", tmp_path / "one")
    for combine in ("fixed", "confidence", "loss"):
        config = config_of(folder / "top-a", loss={"alpha": 1.0, "combine": combine})
        train(config, folder / "top-a", tmp_path / combine)
        assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / combine), rtol=1e-5)


def test_resuming_in_the_middle_is_exact_and_another_teacher_is_another_run(folder: Path, tmp_path: Path) -> None:
    run = {"steps": 7, "device": "cpu", "checkpoint_every": 2}
    config = config_of(folder / "top-b", loss={"alpha": 0.7, "combine": "loss"}, run=run)
    train(config, folder / "top-a", tmp_path / "whole")

    def die(state: Any) -> None:
        if state.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, folder / "top-a", tmp_path / "r", progress=die)
    train(config, folder / "top-a", tmp_path / "r")
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")
    assert (tmp_path / "r/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    with pytest.raises(MismatchError, match="another run"):
        train(config_of(folder / "whole-b", loss=config.loss.model_dump(), run=run), folder / "top-a", tmp_path / "r")


def test_a_position_counts_where_every_teacher_said_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = tiny.write_store(tmp_path / "main")
    whole = tiny.shard_columns

    def holed(*arguments: Any) -> dict[str, Any]:
        columns = whole(*arguments)
        columns["loss_mask"][[0, 25]] = 2
        return columns

    monkeypatch.setattr(tiny, "shard_columns", holed)
    other = tiny.write_store(tmp_path / "other")
    config = config_of(other.path)
    batch = next(iter(Loader(main, StreamConfig(batch_size=len(main), shuffle=False))))
    filled = Companions(main, config.data, config.loss).fill(batch)
    first = main.shards[0].rows
    assert (~filled.mask).nonzero()[:, 0].tolist() == [0, 25, first, first + 25]


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ({"tail": "exact"}, ConfigError, "one teacher's output layer"),
        ({"tail": "sampled"}, MismatchError, "needs tail draws"),
        ({"divergence": "regression", "combine": "loss"}, ConfigError, "not weighed by loss"),
    ],
)
def test_losses_that_do_not_work_from_the_others(
    folder: Path, tmp_path: Path, loss: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(config_of(folder / "whole-b", loss=loss), folder / "top-a", tmp_path / "r")
    assert not (tmp_path / "r" / METRICS).exists()


def test_stores_that_are_not_of_the_same_samples_are_refused(folder: Path, tmp_path: Path) -> None:
    main = tiny.write_store(tmp_path / "main")
    wrong = {
        "no sample 'sample-1-1'": tiny.write_store(tmp_path / "fewer", rows=((20, 20, 11), (30,))),
        "another number of rows": tiny.write_store(tmp_path / "rows", rows=((20, 20, 12), (30, 9))),
        "other inputs": tiny.write_store(tmp_path / "tokens", seed=1),
        "The vocab_size": tiny.write_store(tmp_path / "vocabulary", vocabulary=60),
    }
    for message, other in wrong.items():
        with pytest.raises(MismatchError, match=message):
            train(config_of(other.path), main, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    select(folder / "top-b", tmp_path / "some", samples="0:4")
    with pytest.raises(MismatchError, match="no sample"):
        train(config_of(tmp_path / "some"), folder / "top-a", tmp_path / "r")
    train(config_of(folder / "top-b"), tmp_path / "some", tmp_path / "more")  # the other may have more


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    words = tiny.tokenizer(300, text="entirely different words make different merges " * 4)
    words.save_pretrained(tmp_path / "teacher")
    tiny.llama(len(tiny.tokenizer(300))).save_pretrained(tmp_path / "teacher")
    capture(parse_config(CaptureConfig, tree), tmp_path / "other")
    with pytest.raises(MismatchError, match=r"vocab_size|tokenizer is not the main one's"):
        train(config_of(tmp_path / "other"), folder / "top-a", tmp_path / "r")


def test_hard_labels_alone_read_no_other_rows_and_the_baseline_has_one_teacher(folder: Path, tmp_path: Path) -> None:
    hard = config_of(folder / "top-b", loss={"alpha": 0.0})
    train(hard, folder / "top-a", tmp_path / "hard")
    assert losses(tmp_path / "hard", "divergence") == [0.0] * 6
    with pytest.raises(ConfigError, match="baseline has one teacher"):
        train_online(config_of(folder / "top-b"), folder / "top-a", tmp_path / "r", teacher=str(folder / "teacher-a"))


def targets_of(logits: list[list[float]], label_logit: list[float]) -> TensorTargets:
    values = torch.tensor(logits)
    ids = torch.arange(values.shape[1]).repeat(len(values), 1)
    tail = torch.full((len(values), 1), -torch.inf)
    return TensorTargets(ids, values, tail, torch.tensor(label_logit), values.shape[1])


def test_weights_sum_to_one_and_a_loss_that_was_not_told_is_refused() -> None:
    sure, flat = targets_of([[9.0, 0.0], [0.0, 0.0]], [9.0, 0.0]), targets_of([[0.0, 0.0], [0.0, 9.0]], [0.0, 0.0])
    for mode in ("fixed", "confidence", "loss"):
        found = teacher_weights(mode, (1.0, 3.0), [sure, flat])
        assert torch.allclose(found.sum(0), torch.ones(2))
        if mode == "fixed":
            assert torch.allclose(found[0], torch.full((2,), 0.25))
    impossible = targets_of([[0.0, 0.0]], [-torch.inf])
    left = teacher_weights("loss", (1.0, 3.0), [impossible] * 2)[:, 0]
    assert torch.allclose(left, torch.tensor([0.25, 0.75]), atol=1e-3)
    with pytest.raises(MismatchError, match="did not tell its loss"):
        teacher_weights("loss", (1.0, 1.0), [sure, targets_of([[0.0, 0.0]], [torch.nan])])


VIEWS: dict[str, Any] = {"views": 2, "crop": 1, "flip": True}


def classifier_store(examples: Path, out: Path, model: Any, **own: Any) -> Store:
    tree = {
        "examples": {"path": str(examples), "batch_size": 16, **own},
        "teacher": {"model": "tests.networks:conv", "device": "cpu"},
        "store": {"shard_positions": 32, "chunk_positions": 16, "preset": "lossless"},
    }
    wrapped = ModuleClassifier(TeacherConfig(model="tests.networks:conv", device="cpu"), model)
    capture(parse_config(CaptureConfig, tree), out, classifier=wrapped)
    return open_store(out)


def test_teachers_of_views_of_examples(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (40, 1, 8, 8)).astype(np.uint8), random.integers(0, 5, 40)
    ids = [f"i{n}" for n in range(40)]
    examples = write_examples(tmp_path / "ex", ids=ids, pixels=images, label=labels)
    models = [networks.teacher(networks.Conv, width, 5) for width in (8, 6)]
    settings = ImageViews(**VIEWS).model_dump(mode="json")
    main = classifier_store(examples.folder, tmp_path / "a", models[0], augment=settings)
    classifier_store(examples.folder, tmp_path / "b", models[1], augment=settings)
    other = permuted(tmp_path / "b", tmp_path / "p")
    tree = {
        "student": {"factory": "tests.networks:conv"},
        "data": {"examples": str(examples.folder), "batch_size": 7, "teachers": [{"store": str(other)}]},
        "loss": {"combine": "loss", "temperature": 2.0},
        "run": {"epochs": 2, "device": "cpu", "checkpoint_every": 2},
    }
    config = parse_config(TrainConfig, tree)
    feed, companions = Feed(main, config.data), Companions(main, config.data, config.loss)
    loader = Loader(main, StreamConfig(batch_size=7, extra=feed.extra))
    for epoch in range(2):
        loader.set_epoch(epoch)
        for read in loader:
            batch = feed.fill(companions.fill(read), epoch)
            with torch.no_grad():
                logits = models[1](batch.inputs["pixels"])
            assert torch.allclose(logits.gather(1, batch.others[0].ids), batch.others[0].logits, atol=1e-5)
    train(config, main, tmp_path / "r")
    first, last = (json.loads((tmp_path / "r" / METRICS).read_text().splitlines()[at])["loss"] for at in (0, -1))
    assert last < first

    numbers = random.normal(size=(40, 4)).astype(np.float32)[::-1]
    sound = networks.teacher(networks.Values, 8, 5)
    plain = classifier_store(examples.folder, tmp_path / "plain", models[0])
    for name, own, message in (("same", labels, ""), ("labels", 4 - labels, "other labels")):
        write_examples(tmp_path / f"ex-{name}", ids=ids[::-1], numbers=numbers, label=own[::-1])
        store = classifier_store(tmp_path / f"ex-{name}", tmp_path / f"store-{name}", sound)
        data = config.data.model_copy(update={"teachers": config_of(store.path).data.teachers})
        if not message:  # another modality of the same things: joined, though its inputs are others
            batch = Companions(plain, data, config.loss).fill(next(iter(Loader(plain, StreamConfig(batch_size=4)))))
            at = [39 - int(one) for one in batch.sample_index]
            with torch.no_grad():
                wanted = sound(torch.from_numpy(numbers[at].copy()))
            assert torch.allclose(wanted.gather(1, batch.others[0].ids), batch.others[0].logits, atol=1e-5)
            with pytest.raises(MismatchError, match="another number of rows"):
                Companions(main, data, config.loss)
            continue
        with pytest.raises(MismatchError, match=message):
            Companions(plain, data, config.loss)
    bare = write_examples(tmp_path / "bare", ids=ids, pixels=images)
    unlabelled = classifier_store(bare.folder, tmp_path / "unlabelled", models[1])
    data = config.data.model_copy(update={"teachers": config_of(unlabelled.path).data.teachers})
    with pytest.raises(MismatchError, match="without classes"):
        Companions(plain, data, config.loss)


def test_teachers_of_values(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    numbers, values = random.normal(size=(30, 4)).astype(np.float32), (random.random((30, 3)) < 0.5).astype(np.float32)
    examples = write_examples(tmp_path / "ex", numbers=numbers, label=values)
    models = [networks.teacher(networks.Values, width, 3) for width in (8, 5)]
    stores = [
        classifier_store(examples.folder, tmp_path / name, model) for name, model in zip("ab", models, strict=True)
    ]
    tree = {
        "student": {"factory": "tests.networks:values"},
        "data": {
            "examples": str(examples.folder),
            "batch_size": 30,
            "shuffle": False,
            "teachers": [{"store": str(stores[1].path), "weight": WEIGHT}],
        },
        "loss": {"hard": "sigmoid", "divergence": "sigmoid", "alpha": 1.0},
        "run": {"steps": 1, "device": "cpu"},
    }
    config = parse_config(TrainConfig, tree)
    train(config, stores[0], tmp_path / "r")
    student = build_student(config.student, stores[0], seed=0)
    each = []
    with torch.no_grad():
        q = student(torch.from_numpy(numbers)).double().sigmoid()
        for model in models:
            p = model(torch.from_numpy(numbers)).double().sigmoid()
            each.append((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean())
    expected = (each[0] + WEIGHT * each[1]) / (1 + WEIGHT)
    assert losses(tmp_path / "r", "divergence")[0] == pytest.approx(float(expected), rel=1e-4)
