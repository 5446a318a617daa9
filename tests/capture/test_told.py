"""A store of what a served model tells: the model's own log-probabilities, said to be partial, however it was made."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kdcache.capture import CaptureProgress, SamplesProgress, capture, told
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import AccessError, ConfigError, MismatchError, TeacherError
from kdcache.store import Store, StoreWriter, check, open_store, progress
from kdcache.teachers import TeacherConfig
from kdcache.teachers.served import ServedTeacher
from kdcache.train import train
from kdcache.train.config import TrainConfig
from tests import tiny
from tests.teachers.openai_server import Faults, Server, save_talker

KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("told") / "teacher")


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(AutoModelForCausalLM.from_pretrained(folder), tiny.tokenizer(), Faults(by_id=True)) as running:
        yield running


@pytest.fixture
def tree(server: Server, folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "source": {"path": str(tiny.write_text(tmp_path)), "id_field": "id"},
        "samples": {"max_length": 24},
        "teacher": {"model": server.url, "tokenizer": str(folder), "batch_positions": 40},
        "store": {"shard_positions": 64, "chunk_positions": 16},
    }


def config_of(tree: dict[str, Any]) -> CaptureConfig:
    return parse_config(CaptureConfig, tree)


def rows_of(server: Server, store: Store) -> Iterator[tuple[Any, np.ndarray]]:
    for sample in store:
        with torch.no_grad():
            logits = server.model(torch.from_numpy(sample.input_ids)[None]).logits[0, :-1].float()
        yield sample, torch.log_softmax(logits, -1).numpy()


def test_a_store_holds_what_the_model_says(server: Server, tree: dict[str, Any], tmp_path: Path) -> None:
    seen = list[CaptureProgress | SamplesProgress]()
    result = capture(config_of(tree), tmp_path / "s", progress=seen.append)
    store = open_store(tmp_path / "s")
    assert check(store) == []
    assert store.manifest.document["required_features"] == ["partial_targets"]
    assert (result.k, result.positions, result.digest, result.skipped) == (5, store.num_positions, store.digest, {})
    assert len(store.shards) > 2
    last = seen[-1]
    assert isinstance(last, CaptureProgress)
    assert last.positions_done == last.positions_total == store.num_positions
    assert store.manifest.part("teacher")["name"] == "tiny"
    assert store.manifest.part("teacher")["weights"] is None
    for sample, rows in rows_of(server, store):
        order = np.argsort(-rows, 1, kind="stable")
        assert np.array_equal(sample.targets.ids, order[:, :5])
        assert np.abs(sample.targets.logits - np.take_along_axis(rows, order[:, :5], 1)).max() < 1e-4
        assert np.abs(sample.targets.label_logit - rows[np.arange(len(rows)), sample.labels]).max() < 1e-4
        tail = 1 - np.exp(np.take_along_axis(rows, order[:, :5], 1).astype(np.float64)).sum(1)
        assert np.abs(sample.targets.tail_mass(1.0) - tail).max() < 2e-3
    # the samples that settled k were asked about once
    asked = [tuple(one["prompt"]) for one in server.requests if one.get("echo")]
    probe = asked[0]
    assert len([one for one in asked if one != probe]) == result.samples


def test_finished_it_asks_nothing_more(server: Server, tree: dict[str, Any], tmp_path: Path) -> None:
    first = capture(config_of(tree), tmp_path / "s")
    before = len(server.requests)
    again = capture(config_of(tree), tmp_path / "s")
    assert (again.already_complete, again.digest, len(server.requests)) == (True, first.digest, before)
    tree["teacher"]["top"] = 4
    with pytest.raises(MismatchError, match=r"teacher\.top was 5, now 4"):
        capture(config_of(tree), tmp_path / "s")


def test_fewer_may_be_kept_than_are_told(server: Server, tree: dict[str, Any], tmp_path: Path) -> None:
    tree["targets"] = {"k": 3}
    tree["store"]["preset"] = "raw"
    assert capture(config_of(tree), tmp_path / "s").k == 3
    for sample, rows in rows_of(server, open_store(tmp_path / "s")):
        assert np.array_equal(sample.targets.ids, np.argsort(-rows, 1, kind="stable")[:, :3])


def test_stopped_at_every_shard_it_goes_on_to_the_same_digest(tree: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_text(tmp_path, documents=5)
    undisturbed = capture(config_of(tree), tmp_path / "whole").digest

    class Killed(BaseException):
        pass

    for shard in range(len(open_store(tmp_path / "whole").shards)):

        def die(state: CaptureProgress | SamplesProgress, shard: int = shard) -> None:
            if isinstance(state, CaptureProgress) and state.shard == shard:
                raise Killed

        with pytest.raises(Killed):
            capture(config_of(tree), tmp_path / f"s{shard}", progress=die)
        assert capture(config_of(tree), tmp_path / f"s{shard}").digest == undisturbed


@pytest.mark.slow
def test_sigkill_and_sigterm_lose_nothing(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["source"]["path"] = str(tiny.write_text(tmp_path, documents=40))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    undisturbed = capture(config_of(tree), tmp_path / "whole").digest
    line = [sys.executable, "-m", "kdcache", "capture", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "s"), "-q"]
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        job = subprocess.Popen(line, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        begun = progress(tmp_path / "s")
        had = begun.committed if begun else 0
        deadline = time.monotonic() + 60
        while job.poll() is None and time.monotonic() < deadline:
            now = progress(tmp_path / "s")
            if now is not None and now.committed > had:
                break
            time.sleep(0.002)
        job.send_signal(sent)
        assert job.wait(timeout=30) == code
        job.stderr.close()  # type: ignore[union-attr]
    assert subprocess.run(line, check=False).returncode == 0
    assert open_store(tmp_path / "s").digest == undisturbed


def test_another_process_that_began_with_another_k_is_joined(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, plan_of = told._Asking.entries, told._plan

    def slower(self: Any) -> int:
        k = real(self)
        StoreWriter.open(tmp_path / "s", plan_of(self.config, self._teacher, self.samples, noted[0], 2))
        return k

    noted = list[dict[str, Any]]()

    def noting(config: Any, root: Path, teacher: Any, samples: Any, about: Any, progress: Any) -> Any:
        noted.append(about)
        return told.capture_told(config, root, teacher, samples, about, progress)

    monkeypatch.setattr("kdcache.capture.capture_told", noting)
    monkeypatch.setattr(told._Asking, "entries", slower)
    assert capture(config_of(tree), tmp_path / "s").k == 2


def test_what_a_text_server_cannot_say_is_masked_and_counted(
    server: Server, tree: dict[str, Any], tmp_path: Path
) -> None:
    server.faults = Faults(refuses_ids=422, early=True)
    result = capture(config_of(tree), tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert check(store) == []
    invalid = result.skipped["positions of which too little was told"]
    assert len(store) <= invalid < store.num_positions
    assert any("share a text" in name for name in result.skipped)
    assert capture(config_of(tree), tmp_path / "s").skipped == result.skipped
    masked = 0
    for sample, rows in rows_of(server, store):
        good = sample.loss_mask
        assert not good[0]
        masked += int((~good).sum())
        order = np.argsort(-rows, 1, kind="stable")[:, : store.k]
        assert np.array_equal(sample.targets.ids[good], order[good])
        outside = ~(sample.targets.ids == sample.labels[:, None]).any(1)
        assert np.isnan(sample.targets.label_logit[good & outside]).all()
    assert masked == invalid


def test_a_student_learns_from_it_at_one_temperature(tree: dict[str, Any], tmp_path: Path) -> None:
    capture(config_of(tree), tmp_path / "s")
    keys = {
        "student": {"model": str(tiny.save_teacher(tmp_path / "student", seed=3))},
        "data": {"batch_size": 4},
        "run": {"steps": 2, "device": "cpu"},
    }
    done = train(parse_config(TrainConfig, keys), tmp_path / "s", tmp_path / "run")
    assert np.isfinite(done.loss)
    with pytest.raises(MismatchError, match="T = 1 alone"):
        train(parse_config(TrainConfig, {**keys, "loss": {"temperature": 2}}), tmp_path / "s", tmp_path / "hot")


@pytest.mark.parametrize(
    "targets",
    [
        {"hidden": ["final"]},
        {"draws": 4},
        {"exact": True},
        {"logits": "float16"},
        {"bytes_per_position": 20},
        {"fused": True},
    ],
)
def test_what_only_weights_can_give_is_refused(targets: dict[str, Any], tree: dict[str, Any], tmp_path: Path) -> None:
    tree["targets"] = targets
    with pytest.raises(ConfigError, match="log-probabilities of a few tokens") as caught:
        capture(config_of(tree), tmp_path / "s")
    assert caught.value.where == f"targets.{next(iter(targets))}"
    assert not (tmp_path / "s").exists()


def test_a_server_that_names_nothing_is_no_teacher(
    server: Server, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = ServedTeacher(TeacherConfig(**tree["teacher"]))
    tell = teacher.tell

    def nothing(samples: Any) -> Any:
        told = tell(samples)
        for one in told:
            one.log_probabilities[:] = -np.inf
        return told

    monkeypatch.setattr(teacher, "tell", nothing)
    tree["teacher"]["model"] = server.url.replace("//", f"//me:{KEY}@")
    with pytest.raises(TeacherError, match="tells nothing of most positions") as caught:
        capture(config_of(tree), tmp_path / "s", teacher=teacher)
    assert KEY not in str(caught.value)


def test_numbers_that_stop_being_probabilities_are_the_teachers_fault(
    server: Server, tree: dict[str, Any], tmp_path: Path
) -> None:
    teacher = ServedTeacher(TeacherConfig(**tree["teacher"]))
    teacher.tell([np.arange(6)])
    server.faults.scale = 0.0
    with pytest.raises(TeacherError, match="add up to") as caught:
        capture(config_of(tree), tmp_path / "s", teacher=teacher)
    assert "sample doc-" in caught.value.where


def test_the_key_is_nowhere_in_the_store(
    server: Server, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = Faults(by_id=True, key=KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    capture(config_of(tree), tmp_path / "s")
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}-old")
    with pytest.raises(AccessError, match="401") as caught:
        capture(config_of(tree), tmp_path / "t")
    assert KEY not in str(caught.value)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not any(KEY.encode() in path.read_bytes() for path in files)
