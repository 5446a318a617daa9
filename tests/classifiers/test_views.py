"""Views of texts, captured and trained from: the student is given what the teacher was, token by token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers.module import ModuleClassifier
from kdcache.config import parse_config
from kdcache.errors import ConfigError, MismatchError
from kdcache.examples import Examples, write_examples
from kdcache.store import Store, check, open_store
from kdcache.stream import Loader, StreamConfig
from kdcache.teachers import TeacherConfig
from kdcache.train import train
from kdcache.train.config import TrainConfig
from kdcache.train.feed import Feed
from tests import networks

COUNT, LENGTH, CLASSES = 48, 10, 3
TOKENS = {
    "kind": "tokens",
    "mask_field": "attention_mask",
    "views": 3,
    "token_mask": 0.2,
    "token_drop": 0.2,
    "token_swap": 0.2,
    "mask_id": 19,
    "keep": [1],
}


class Bag(torch.nn.Module):
    """Token ids [S, T] to classes of the text, by place too: an order that is lost would show."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.tagger = networks.Tagger(width, classes)
        self.places = torch.nn.Parameter(torch.randn(LENGTH, classes))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (self.tagger(input_ids, attention_mask) * self.places).sum(1)


def bag(vocab_size: int) -> torch.nn.Module:
    return Bag(6, vocab_size)


@pytest.fixture
def texts(tmp_path: Path) -> Examples:
    random = np.random.default_rng(0)
    lengths = random.integers(3, LENGTH + 1, COUNT)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    ids = np.where(mask, random.integers(2, 18, (COUNT, LENGTH)), 0).astype(np.int32)
    ids[:, 0] = 1
    label = random.integers(0, CLASSES, COUNT)
    names = [f"t{n}" for n in range(COUNT)]
    return write_examples(tmp_path / "texts", ids=names, input_ids=ids, attention_mask=mask, label=label)


def captured(own: Examples, out: Path, teacher: Any, **examples: Any) -> Store:
    tree = {
        "examples": {"path": str(own.folder), "batch_size": 16, **examples},
        "teacher": {"model": "tests.networks:tagger", "device": "cpu"},
        "store": {"shard_positions": 64, "chunk_positions": 16, "preset": "lossless"},
    }
    model = ModuleClassifier(TeacherConfig(model="a:b", device="cpu"), teacher)
    capture(parse_config(CaptureConfig, tree), out, classifier=model)
    return open_store(out)


@pytest.fixture
def teacher() -> Any:
    return networks.teacher(Bag, 6, CLASSES)


def tree(own: Examples, **data: Any) -> dict[str, Any]:
    return {
        "student": {"factory": "tests.classifiers.test_views:bag"},
        "data": {"examples": str(own.folder), "batch_size": 8, **data},
        "optim": {"learning_rate": 0.02},
        "run": {"epochs": 12, "device": "cpu"},
    }


def agrees(store: Store, own: Examples, teacher: Any) -> None:
    """The teacher says of what a student is given what the store says, in every view."""
    feed = Feed(store, parse_config(TrainConfig, tree(own)).data)
    loader = Loader(store, StreamConfig(batch_size=7, extra=feed.extra))
    given = set()
    for epoch in range(feed.views):
        loader.set_epoch(epoch)
        for read in loader:
            batch = feed.fill(read, epoch)
            with torch.no_grad():
                logits = teacher(**batch.inputs)
            assert batch.targets is not None
            assert torch.allclose(logits.gather(1, batch.targets.ids.long()), batch.targets.logits, atol=1e-5)
            given |= {one.numpy().tobytes() for one in batch.inputs["input_ids"]}
    assert len(given) > 1.5 * len(store)  # the views are not all the same


def test_a_student_is_given_the_tokens_that_the_teacher_saw(texts: Examples, tmp_path: Path, teacher: Any) -> None:
    store = captured(texts, tmp_path / "store", teacher, augment=TOKENS)
    assert (len(store), store.num_positions) == (COUNT, 3 * COUNT)
    assert check(store) == []
    assert store.columns["augmentation"].shape == (3,)
    agrees(store, texts, teacher)
    config = parse_config(TrainConfig, tree(texts, validation=str(store.path)))
    result = train(config, tmp_path / "store", tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert result.loss < 0.9 * json.loads(lines[0])["loss"]
    assert result.validation is not None
    assert result.validation["positions"] == COUNT


def test_texts_whose_views_would_differ_are_refused(texts: Examples, tmp_path: Path, teacher: Any) -> None:
    store = captured(texts, tmp_path / "store", teacher, augment=TOKENS)
    ids = texts.fields["input_ids"].copy()
    ids[5, 2] ^= 1
    other = write_examples(
        tmp_path / "other", ids=texts.ids, input_ids=ids, attention_mask=texts.fields["attention_mask"]
    )
    with pytest.raises(MismatchError, match="'t5' is not what"):
        Feed(store, parse_config(TrainConfig, tree(other)).data)


def test_copies_of_a_text_are_its_views(texts: Examples, tmp_path: Path, teacher: Any) -> None:
    ids = np.stack([texts.fields["input_ids"], np.roll(texts.fields["input_ids"], 1, 1)], 1)
    mask = np.stack([texts.fields["attention_mask"], np.roll(texts.fields["attention_mask"], 1, 1)], 1)
    label = texts.fields["label"]
    own = write_examples(tmp_path / "copies", ids=texts.ids, input_ids=ids, attention_mask=mask, label=label)
    augment = {"kind": "copies", "fields": ["input_ids", "attention_mask"], "views": 2}
    store = captured(own, tmp_path / "store", teacher, augment=augment)
    assert store.num_positions == 2 * COUNT
    agrees(store, own, teacher)
    assert train(parse_config(TrainConfig, tree(own)), tmp_path / "store", tmp_path / "run").steps == 72
    with pytest.raises(ConfigError, match="not 3 copies"):
        captured(own, tmp_path / "three", teacher, augment={**augment, "views": 3})
    alone = {**augment, "fields": ["input_ids"]}
    shared = write_examples(tmp_path / "shared", input_ids=ids, attention_mask=mask[:, 0], label=label)
    with pytest.raises(ConfigError, match="'attention_mask' has a value for each token"):
        captured(shared, tmp_path / "alone", teacher, augment=alone)


def test_what_belongs_to_tokens_is_not_left_behind(texts: Examples, tmp_path: Path) -> None:
    fields = {name: texts.fields[name] for name in ("input_ids", "attention_mask")}
    tags = np.where(fields["attention_mask"] > 0, 1, -100)
    tagged = write_examples(tmp_path / "tagged", **fields, label=tags)
    tagger = networks.teacher(networks.Tagger, 6, CLASSES)
    with pytest.raises(ConfigError, match="move tokens away from their labels"):
        captured(tagged, tmp_path / "a", tagger, augment=TOKENS)
    hidden = {**TOKENS, "token_drop": 0.0, "token_swap": 0.0}
    assert captured(tagged, tmp_path / "b", tagger, augment=hidden).num_positions == 3 * int((tags >= 0).sum())
    unnamed = {**TOKENS, "token_drop": 0.0, "mask_field": None}
    with pytest.raises(ConfigError, match="'attention_mask' has a value for each token"):
        captured(texts, tmp_path / "c", networks.teacher(Bag, 6, CLASSES), augment=unnamed)
    with pytest.raises(ConfigError, match="given no field 'attention_mask'"):
        captured(
            texts,
            tmp_path / "d",
            networks.teacher(Bag, 6, CLASSES),
            augment=TOKENS,
            fields={"input_ids": "input_ids"},
        )
