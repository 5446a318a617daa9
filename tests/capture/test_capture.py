"""The store holds what the live teacher says, however the capture was interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdcache.capture import CaptureProgress, SamplesProgress, capture, plan_shards
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import (
    AccessError,
    ConfigError,
    MismatchError,
    SourceError,
    TeacherError,
    TeacherMemoryError,
    TeacherNumericsError,
)
from kdcache.store import Store, check, open_store, progress
from kdcache.teachers import TeacherConfig
from kdcache.teachers.callable import CallableTeacher
from tests import tiny


def config_of(tree: dict[str, Any]) -> CaptureConfig:
    return parse_config(CaptureConfig, tree)


def dense(tree: dict[str, Any], store: Store) -> list[Tensor]:
    """The live model's logits of every sample, one at a time, L - 1 rows each."""
    model = AutoModelForCausalLM.from_pretrained(tree["teacher"]["model"])
    with torch.no_grad():
        return [model(torch.from_numpy(one.input_ids)[None]).logits[0, :-1] for one in store]


def test_every_row_is_the_live_teachers_prediction_of_the_next_token(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, logits="float32")
    result = capture(config_of(tree), tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert len(store.shards) > 2
    assert (result.samples, result.positions, result.digest) == (len(store), store.num_positions, store.digest)
    assert result.bytes_per_position == pytest.approx(store.bytes_per_position, abs=1e-3)
    assert store.bytes_per_position * store.num_positions < result.bytes  # the tokenizer is not counted
    for sample, logits in zip(store, dense(tree, store), strict=True):
        assert len(logits) == len(sample.input_ids) - 1 == len(sample.targets)
        rows = torch.arange(len(logits))[:, None]
        assert np.allclose(logits[rows, torch.from_numpy(sample.targets.ids).long()], sample.targets.logits, atol=1e-4)
        assert np.array_equal(logits.argmax(1), sample.targets.ids[:, 0])
        assert np.allclose(logits[rows[:, 0], sample.input_ids[1:]], sample.targets.label_logit, atol=1e-4)
        for temperature in (0.5, 1.0, 2.0):
            expected = torch.logsumexp(logits.double() / temperature, 1)
            assert np.allclose(sample.targets.log_partition(temperature), expected, atol=2e-3)
    assert check(store) == []


def test_no_row_is_shifted(tmp_path: Path) -> None:
    """A teacher that says input + 1 must be found at the row of that input."""

    def successor(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((ids + 1) % 300, 300).float() * 9

    tree = tiny.capture_tree(tmp_path)
    teacher = CallableTeacher(TeacherConfig(model="x:y", tokenizer=tree["teacher"]["model"]), successor)
    capture(config_of(tree), tmp_path / "s", teacher=teacher)
    for sample in open_store(tmp_path / "s"):
        assert np.array_equal(sample.targets.ids[:, 0], (sample.input_ids[:-1] + 1) % 300)


def test_a_finished_capture_does_nothing_again(tmp_path: Path) -> None:
    config = config_of(tiny.capture_tree(tmp_path))
    first = capture(config, tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    again = capture(config, tmp_path / "s")
    assert again.already_complete
    assert not first.already_complete
    assert again.digest == first.digest
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}


def test_stopped_at_every_shard_it_goes_on_to_the_same_digest(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, draws=3)
    undisturbed = capture(config_of(tree), tmp_path / "whole").digest
    shards = len(open_store(tmp_path / "whole").shards)

    class Killed(BaseException):
        pass

    for shard in range(shards):

        def die(state: CaptureProgress | SamplesProgress, shard: int = shard) -> None:
            if isinstance(state, CaptureProgress) and state.shard == shard:
                raise Killed

        with pytest.raises(Killed):
            capture(config_of(tree), tmp_path / f"s{shard}", progress=die)
        assert capture(config_of(tree), tmp_path / f"s{shard}").digest == undisturbed


@pytest.mark.slow
def test_sigkill_and_sigterm_lose_nothing(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    tree["source"]["path"] = str(tiny.write_text(tmp_path, documents=150))
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


def test_batching_changes_nothing_but_low_bits(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, logits="float32")
    capture(config_of(tree), tmp_path / "a")
    tree["teacher"]["batch_positions"] = 1
    capture(config_of(tree), tmp_path / "b")
    for one, other in zip(open_store(tmp_path / "a"), open_store(tmp_path / "b"), strict=True):
        assert one.id == other.id
        assert np.array_equal(one.targets.ids, other.targets.ids)
        assert np.allclose(one.targets.logits, other.targets.logits, atol=1e-4)


def test_out_of_memory_shrinks_the_batch_and_goes_on(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)

    def greedy(ids: Tensor, mask: Tensor) -> Tensor:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.one_hot((ids + 1) % 300, 300).float()

    keys = TeacherConfig(model="x:y", tokenizer=tree["teacher"]["model"])
    result = capture(config_of(tree), tmp_path / "s", teacher=CallableTeacher(keys, greedy))
    assert result.memory_retries > 0
    for sample in open_store(tmp_path / "s"):
        assert np.array_equal(sample.targets.ids[:, 0], (sample.input_ids[:-1] + 1) % 300)

    def hopeless(ids: Tensor, mask: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return torch.zeros(*ids.shape, 300)

    with pytest.raises(TeacherMemoryError, match="one sample"):
        capture(config_of(tree), tmp_path / "t", teacher=CallableTeacher(keys, hopeless))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_or_masked_and_counted(tmp_path: Path, bad: float) -> None:
    tree = tiny.capture_tree(tmp_path)

    def sick(ids: Tensor, mask: Tensor) -> Tensor:
        logits = torch.randn(*ids.shape, 300, generator=torch.Generator().manual_seed(0))
        logits[ids % 11 == 3] = bad
        return logits

    teacher = CallableTeacher(TeacherConfig(model="x:y", tokenizer=tree["teacher"]["model"]), sick)
    with pytest.raises(TeacherNumericsError, match="NaN or infinite") as caught:
        capture(config_of(tree), tmp_path / "s", teacher=teacher)
    assert "sample doc-" in caught.value.where
    tree["targets"]["on_invalid"] = "skip"
    result = capture(config_of(tree), tmp_path / "t", teacher=teacher)
    store = open_store(tmp_path / "t")
    hit = sum(int((sample.input_ids[:-1] % 11 == 3).sum()) for sample in store)
    assert result.skipped["rows with NaN or infinite logits"] == hit > 0
    for sample in store:
        assert not sample.loss_mask[sample.input_ids[:-1] % 11 == 3].any()
        assert np.isfinite(sample.targets.logits).all()


def test_hidden_features_are_the_models_own(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    tree["targets"]["hidden"] = [
        {"layer": "final", "dtype": "float32"},
        {"layer": 1, "dtype": "int8"},
        {"layer": "embedding", "keep": "pooled"},
        {"layer": 2, "dtype": "bfloat16", "keep": "masked"},
    ]
    capture(config_of(tree), tmp_path / "s")
    store = open_store(tmp_path / "s")
    model = AutoModelForCausalLM.from_pretrained(tree["teacher"]["model"])
    for sample in store:
        with torch.no_grad():
            states = model(torch.from_numpy(sample.input_ids)[None], output_hidden_states=True).hidden_states
        live = {name: states[index][0, :-1].numpy() for name, index in (("final", -1), ("1", 1), ("2", 2))}
        assert np.allclose(sample.hidden["final"], live["final"], atol=1e-4)
        cosine = torch.cosine_similarity(torch.tensor(sample.hidden["1"]), torch.tensor(live["1"]))
        assert cosine.min() >= 0.999
        assert np.allclose(sample.hidden["embedding"], states[0][0, :-1].numpy().mean(0), atol=1e-5)
        assert np.allclose(sample.hidden["2"], live["2"], rtol=2**-7, atol=1e-4)


def test_exact_gives_the_whole_distribution_back(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, exact=True)
    capture(config_of(tree), tmp_path / "s")
    store = open_store(tmp_path / "s")
    head = store.output_head()
    assert head is not None
    for sample, logits in zip(store, dense(tree, store), strict=True):
        assert np.allclose(sample.hidden["final"] @ head.weight.T, logits, atol=1e-3)


def test_with_every_logit_kept_the_row_is_whole(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, k=300, logits="float32")
    capture(config_of(tree), tmp_path / "s")
    store = open_store(tmp_path / "s")
    for sample, logits in zip(store, dense(tree, store), strict=True):
        back = np.zeros_like(logits.numpy())
        np.put_along_axis(back, sample.targets.ids.astype(np.int64), sample.targets.logits, 1)
        assert np.allclose(back, logits, atol=1e-4)
        assert (sample.targets.tail_mass(3.0) == 0).all()


def test_draws_are_the_same_whatever_the_batching_and_lie_in_the_tail(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, draws=5)
    capture(config_of(tree), tmp_path / "a")
    tree["teacher"]["batch_positions"] = 7
    capture(config_of(tree), tmp_path / "b")
    same = 0
    for one, other in zip(open_store(tmp_path / "a"), open_store(tmp_path / "b"), strict=True):
        assert one.targets.draw_ids is not None
        assert other.targets.draw_ids is not None
        same += int((one.targets.draw_ids == other.targets.draw_ids).sum())
        for drawn, kept in zip(one.targets.draw_ids, one.targets.ids, strict=True):
            assert not set(drawn.tolist()) & set(kept.tolist())
    # the last bits of a logit depend on the batch's padding: a mark at an id's very edge may move
    assert same >= 0.999 * 5 * open_store(tmp_path / "a").num_positions


def test_the_width_of_the_vocabulary_never_meets_all_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from kdcache.targets import measure

    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (300,) and out.dtype == torch.float32:
                largest[0] = max(largest[0], out.numel() // 300)
            return out

    monkeypatch.setattr(measure, "PRODUCT_ELEMENTS", 300 * 6)
    monkeypatch.setitem(measure.TILE_ELEMENTS, "cpu", 300 * 3)
    tree = tiny.capture_tree(tmp_path)
    config = config_of(tree)
    capture(config, tmp_path / "warm")
    with Largest():
        capture(config, tmp_path / "s")
    assert 0 < largest[0] <= 8  # tiles of 6 positions; the probe of the output layer has 8


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    capture(config_of(tree), tmp_path / "s")
    tree["targets"]["k"] = 9
    with pytest.raises(MismatchError, match="k was 8, now 9"):
        capture(config_of(tree), tmp_path / "s")


def test_a_changed_source_or_teacher_is_noticed(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    capture(config_of(tree), tmp_path / "s")
    tiny.write_text(tmp_path, documents=13)
    with pytest.raises(MismatchError, match="source"):
        capture(config_of(tree), tmp_path / "s")
    tiny.write_text(tmp_path)
    tiny.save_teacher(Path(tree["teacher"]["model"]), seed=5)
    with pytest.raises(MismatchError, match=r"teacher\.weights"):
        capture(config_of(tree), tmp_path / "s")


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"targets": {"k": 301}}, ConfigError, "k = 301"),
        ({"source": {"path": "nowhere.txt"}}, SourceError, "no such file"),
        ({"teacher": {"model": "./nowhere"}}, AccessError, "cannot be found"),
        ({"teacher": {"model": "os:nothing"}}, ConfigError, "There is no 'os:nothing'"),
        ({"store": {"shard_positions": 16, "chunk_positions": 16}}, ConfigError, "room for 16"),
        ({"store": {"shard_positions": 100, "chunk_positions": 16}}, ConfigError, "whole number of chunks"),
        ({"targets": {"hidden": ["7"]}}, ConfigError, "no layer '7'"),
        ({"teacher": {"model": "", "device": "tpu9"}}, ConfigError, "cannot be used"),
    ],
)
def test_mistakes_are_said_before_anything_is_captured(
    tmp_path: Path, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    tree = tiny.capture_tree(tmp_path)
    for section, values in keys.items():
        given = {key: value for key, value in values.items() if value != ""}
        tree[section] = {**tree[section], **given}
    with pytest.raises(error, match=message):
        capture(config_of(tree), tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_a_teacher_that_fails_says_so(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)

    def broken(ids: Tensor, mask: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(len(ids), 300))

    teacher = CallableTeacher(TeacherConfig(model="x:y", tokenizer=tree["teacher"]["model"]), broken)
    with pytest.raises(TeacherError, match="gave logits of shape"):
        capture(config_of(tree), tmp_path / "s", teacher=teacher)


def test_shards_are_filled_in_order_and_no_sample_straddles() -> None:
    plans = list(plan_shards(np.array([5, 5, 5, 1, 10, 3]), 11))
    assert [(one.first_sample, one.samples, one.rows) for one in plans] == [
        (0, 2, 10),
        (2, 2, 6),
        (4, 1, 10),
        (5, 1, 3),
    ]
