"""The recipe of a black box: what its server tells over HTTP is what the model says, and a student learns from it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError
from kdcache.store import open_store
from kdcache.teachers import BlackBox, TeacherConfig, load_teacher
from kdcache.train import train
from pipelines.smollm2_served.recipe import TOP
from pipelines.smollm2_served.server import MOST, Served, http
from tests import tiny
from tests.train.test_train import config_of, losses


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Served, str]]:
    model = Served(tiny.save_teacher(tmp_path / "served"))
    server = http(model)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield model, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_told_is_what_the_model_says(served: tuple[Served, str], tmp_path: Path) -> None:
    model, url = served
    tree = tiny.capture_tree(tmp_path)
    tree["teacher"] = {"model": url, "tokenizer": str(tmp_path / "served"), "top": TOP}
    tree["targets"] = {}
    capture(parse_config(CaptureConfig, tree), tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert store.k == TOP
    for number in (0, len(store) - 1):
        sample = store[number]
        with torch.inference_mode():
            ids = torch.from_numpy(sample.input_ids[:-1].astype(np.int64))[None]
            said = model.model(ids).logits[0].float().log_softmax(-1)
        # sixteen bits have ties, whose ids may change places
        told = said.gather(1, torch.from_numpy(sample.targets.ids.astype(np.int64)))
        assert np.abs(sample.targets.logits - told.numpy()).max() < 1e-5
        assert np.abs(sample.targets.logits - said.topk(TOP).values.numpy()).max() < 1e-5
    config = config_of(loss={"alpha": 1.0}, run={"steps": 20, "device": "cpu"})
    train(config, store, tmp_path / "student")
    assert losses(tmp_path / "student")[-1] < losses(tmp_path / "student")[0]


def test_more_candidates_than_it_tells_are_refused_in_words(served: tuple[Served, str], tmp_path: Path) -> None:
    teacher = load_teacher(TeacherConfig(model=served[1], tokenizer=str(tmp_path / "served"), top=MOST + 5))
    assert isinstance(teacher, BlackBox)
    with pytest.raises(ConfigError, match=str(MOST)):
        teacher.tell([np.arange(9)])
