"""Exports of trained students, run by onnxruntime and compared with torch: the same words, and measured."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import export as package
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import AccessError, ConfigError, MismatchError, SourceError, UnsupportedError
from kdcache.evaluate import evaluate
from kdcache.export import ExportResult, export
from kdcache.export.finished import load_finished
from kdcache.export.measure import compare
from kdcache.export.text import random_inputs
from kdcache.export.trial import Inputs
from kdcache.store import open_store
from kdcache.train import RESULT, train
from kdcache.train.config import TrainConfig
from tests import tiny
from tests.test_cli import run  # noqa: F401
from tests.train.test_train import STUDENT

Run = Callable[..., tuple[int, str, str]]


def trained(store: Path, out: Path, **student: Any) -> Path:
    tree = {
        "student": student,
        "data": {"batch_size": 2},
        "run": {"steps": 12, "device": "cpu"},
        "optim": {"learning_rate": 0.02, "warmup_steps": 0},
    }
    train(parse_config(TrainConfig, tree), store, out)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a captured `store` and the `student` of a run on it, tokenizer beside."""
    folder = tmp_path_factory.mktemp("export")
    capture(parse_config(CaptureConfig, tiny.capture_tree(folder)), folder / "store")
    trained(folder / "store", folder / "student", **STUDENT)
    return folder


def inputs(samples: int, tokens: int, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = random_inputs(samples, tokens, vocab_size, seed).values()
    return ids, mask


def session_logits(path: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    return logits


@pytest.fixture(scope="module")
def exported(made: Path) -> dict[str, ExportResult]:
    """The student in every format, measured on the store."""
    names = ("safetensors", "onnx", "int8")
    return {name: export(made / "student", made / name, name, store=made / "store") for name in names}


@pytest.mark.slow
def test_every_format_says_what_it_is_and_measured(made: Path, exported: dict[str, ExportResult]) -> None:
    reference = evaluate(made / "student", made / "store")
    for name, result in exported.items():
        assert json.loads(json.dumps(result.as_dict()))["format"] == name
        assert {one.name for one in result.files} | {"export.json"} == {one.name for one in (made / name).iterdir()}
        assert all((made / name / one.name).stat().st_size == one.bytes for one in result.files)
        assert "tokenizer.json" in {one.name for one in result.files}
        assert result.student_bytes == (made / "student" / "model.safetensors").stat().st_size
        assert [(one.input, one.shape) for one in result.speeds] == [("input_ids", (1, 32)), ("input_ids", (8, 128))]
        for speed in result.speeds:
            for side in (speed.before, speed.after):
                assert side.runs >= 20
                assert 0 < side.low_ms <= side.median_ms <= side.high_ms
        before, after = result.quality_before, result.quality_after
        assert before is not None
        assert after is not None
        for score in ("cross_entropy", "perplexity", "kl", "top1_agreement", "accuracy"):
            assert before.scores[score] == pytest.approx(getattr(reference, score), rel=1e-4)
        assert before.positions == after.positions == reference.positions
        tolerance = 0.05 if name == "int8" else 1e-5
        assert after.scores["cross_entropy"] == pytest.approx(before.scores["cross_entropy"], rel=tolerance)
        assert result.store_digest == open_store(made / "store").digest
        assert not result.already_complete
        assert not list(made.glob(".*.partial"))


@pytest.mark.slow
def test_an_onnx_graph_takes_any_batch_and_length(made: Path, exported: dict[str, ExportResult]) -> None:
    path = made / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    result = exported["onnx"]
    assert result.made_by == "torch.onnx, torch.export"
    assert result.parity.largest_difference <= 1e-4 * max(1.0, result.parity.largest_logit)
    student = AutoModelForCausalLM.from_pretrained(str(made / "student"))
    for samples, tokens in ((1, 1), (1, 2), (5, 3), (2, 61), (7, 100)):
        ids, mask = inputs(samples, tokens, 300, 4)
        with torch.no_grad():
            expected = student(torch.from_numpy(ids), torch.from_numpy(mask)).logits.numpy()
        found = session_logits(path, ids, mask)
        assert found.shape == expected.shape
        real = mask.astype(bool)
        assert np.abs(found - expected)[real].max() < 1e-4
    taken = [(one.name, one.shape) for one in onnxruntime.InferenceSession(str(path)).get_inputs()]
    assert taken == [("input_ids", ["batch", "sequence"]), ("attention_mask", ["batch", "sequence"])]


@pytest.mark.slow
def test_safetensors_is_the_student_and_loads_with_its_tokenizer(made: Path, exported: dict[str, ExportResult]) -> None:
    folder = made / "safetensors"
    assert exported["safetensors"].parity.largest_difference == 0
    ours = AutoModelForCausalLM.from_pretrained(str(folder)).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(str(made / "student")).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    words = AutoTokenizer.from_pretrained(str(folder))
    assert words.decode(words(tiny.TEXT)["input_ids"]) == tiny.TEXT
    assert not (folder / "checkpoints").exists()
    assert not (folder / RESULT).exists()


@pytest.mark.slow
def test_int8_is_8_bits_with_one_copy_of_tied_embeddings(made: Path, exported: dict[str, ExportResult]) -> None:
    path = made / "int8" / "model_int8.onnx"
    assert exported["int8"].parity.tolerance is None
    assert 0 < exported["int8"].parity.largest_difference < 0.2 * exported["int8"].parity.largest_logit
    assert [one.name for one in (made / "int8").glob("*.onnx*")] == ["model_int8.onnx"]
    graph = onnx.load(str(path)).graph
    large = [one for one in graph.initializer if np.prod(one.dims) == 300 * 16]
    assert [one.data_type for one in large] == [onnx.TensorProto.INT8]
    assert all(one.op_type != "MatMul" or not _has_constant(graph, one) for one in graph.node)
    ids, mask = inputs(3, 20, 300, 2)
    wide = session_logits(made / "onnx" / "model.onnx", ids, mask)
    assert np.corrcoef(session_logits(path, ids, mask).ravel(), wide.ravel())[0, 1] > 0.99


def _has_constant(graph: Any, node: Any) -> bool:
    return bool({one.name for one in graph.initializer} & set(node.input))


@pytest.mark.slow
def test_the_same_call_does_nothing_again_and_another_is_refused(
    made: Path, exported: dict[str, ExportResult], tmp_path: Path
) -> None:
    again = export(made / "student", made / "onnx", "onnx", store=made / "store")
    assert again.already_complete
    assert {**again.as_dict(), "already_complete": False} == exported["onnx"].as_dict()
    with pytest.raises(MismatchError, match="format"):
        export(made / "student", made / "onnx", "int8", store=made / "store")
    with pytest.raises(MismatchError, match="store"):
        export(made / "student", made / "onnx", "onnx")
    other = trained(made / "store", tmp_path / "other", **{**STUDENT, "dtype": "bfloat16"})
    with pytest.raises(MismatchError, match="student"):
        export(other, made / "onnx", "onnx", store=made / "store")
    with pytest.raises(MismatchError, match="not an empty folder"):
        export(made / "student", made / "student", "onnx")
    assert (made / "student" / RESULT).is_file()


@pytest.mark.slow
def test_a_bfloat16_student_is_widened_where_the_format_has_to(made: Path, tmp_path: Path) -> None:
    student = trained(made / "store", tmp_path / "half", **{**STUDENT, "dtype": "bfloat16"})
    result = export(student, tmp_path / "onnx", "onnx")
    assert result.notes[0] == "The weights were widened to float32."
    assert result.parity.largest_difference < 1e-4
    kept = export(student, tmp_path / "kept", "safetensors")
    assert kept.model_bytes < 1.1 * kept.student_bytes
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "kept")).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of random rows without a tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.write_store(folder / "store")
    return folder


@pytest.mark.slow
def test_students_made_by_factories(plain: Path, tmp_path: Path) -> None:
    student = trained(plain / "store", tmp_path / "r", factory="tests.export.students:Bigram")
    result = export(student, tmp_path / "out", "onnx", store=plain / "store")
    assert result.parity.largest_difference < 1e-4
    assert result.quality_before is not None
    assert result.quality_after is not None
    assert result.quality_before.scores == pytest.approx(result.quality_after.scores)
    assert export(student, tmp_path / "alone", "onnx").parity == result.parity
    ids, mask = inputs(2, 9, 50, 1)
    finished = load_finished(student, None)
    real = mask.astype(bool)
    expected = finished.run({"input_ids": ids, "attention_mask": mask})
    difference = session_logits(tmp_path / "out" / "model.onnx", ids, mask) - expected
    assert np.abs(difference[real]).max() < 1e-4
    kept = export(student, tmp_path / "kept", "safetensors", store=plain / "store")
    assert "factory" in kept.notes[0]
    small = export(student, tmp_path / "int8", "int8", store=plain / "store")
    assert small.quality_after is not None
    assert small.quality_before is not None
    entropies = [one.scores["cross_entropy"] for one in (small.quality_before, small.quality_after)]
    assert entropies[1] == pytest.approx(entropies[0], rel=0.05)


@pytest.mark.slow
def test_what_one_exporter_cannot_write_the_other_records(plain: Path, tmp_path: Path) -> None:
    student = trained(plain / "store", tmp_path / "r", factory="tests.export.students:Branching")
    result = export(student, tmp_path / "out", "onnx", store=plain / "store")
    assert result.made_by == "torch.onnx, TorchScript"
    assert result.parity.largest_difference < 1e-4


@pytest.mark.slow
def test_a_graph_that_says_something_else_is_refused_and_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    student = trained(plain / "store", tmp_path / "r", factory="tests.export.students:Treacherous")
    with pytest.raises(MismatchError, match="does not say what the student says"):
        export(student, tmp_path / "out", "onnx", store=plain / "store")
    refusing = trained(plain / "store", tmp_path / "q", factory="tests.export.students:Refusing")
    with pytest.raises(UnsupportedError, match="not for export"):
        export(refusing, tmp_path / "out", "int8", store=plain / "store")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["q", "r"]


def test_inputs_are_never_longer_than_the_student_takes(plain: Path, tmp_path: Path) -> None:
    tiny.write_store(tmp_path / "store", rows=((9, 12), (7,)))
    student = trained(tmp_path / "store", tmp_path / "r", factory="tests.export.students:Short")
    result = export(student, tmp_path / "out", "safetensors", store=tmp_path / "store")
    assert [one.shape for one in result.speeds] == [(1, 16), (8, 16)]
    assert max(tokens for _, tokens in result.parity.shapes) == 16


def test_a_difference_above_the_tolerance_is_refused_and_so_is_nan(made: Path) -> None:
    student = load_finished(made / "student", None)
    exact = compare(student, student.run, tolerance=0.0)
    assert exact.largest_difference == 0
    for wrong in (1e-2, np.nan):

        def other(given: Inputs, wrong: float = wrong) -> np.ndarray:
            logits = student.run(given).copy()
            logits[0, 0, 7] += wrong
            return logits

        with pytest.raises(MismatchError, match="does not say"):
            compare(student, other, tolerance=1e-4)
        assert compare(student, other, tolerance=None).largest_difference >= 9e-3


def test_what_cannot_be_exported_is_refused_with_a_sentence(made: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format 'onix'"):
        export(made / "student", tmp_path / "out", "onix")
    with pytest.raises(SourceError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "out", "onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AccessError, match="does not load"):
        export(tmp_path / "empty", tmp_path / "out", "onnx")
    shutil.copytree(made / "student", tmp_path / "classifier")
    path = tmp_path / "classifier" / "config.json"
    document = {**json.loads(path.read_text()), "architectures": ["LlamaForSequenceClassification"]}
    path.write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match="neither"):
        export(tmp_path / "classifier", tmp_path / "out", "onnx")
    tiny.write_store(tmp_path / "wide", vocabulary=400)
    with pytest.raises(MismatchError, match="vocabulary is 400"):
        export(made / "student", tmp_path / "out", "onnx", store=tmp_path / "wide")
    assert not (tmp_path / "out").exists()


def test_a_student_is_not_measured_on_a_store_of_another_tokenizer(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "student", tmp_path / "student")
    words = tiny.tokenizer(290)
    words.save_pretrained(tmp_path / "student")
    with pytest.raises(MismatchError, match="tokenizer is not the store's"):
        export(tmp_path / "student", tmp_path / "out", "safetensors", store=made / "store")


def test_without_its_packages_it_says_what_installs_them(made: Path, tmp_path: Path) -> None:
    code = f"""
import sys
import kdcache.export
from kdcache.errors import ConfigError
assert not [name for name in sys.modules if name.startswith(("onnx", "kdcache.teachers", "kdcache.capture"))]
for missing in ("onnxruntime", "onnx"):
    sys.modules[missing] = None
    try:
        kdcache.export.export({str(made / "student")!r}, {str(tmp_path / "out")!r}, "int8")
    except ConfigError as error:
        assert "pip install 'kdcache[export]'" in error.hint, error
        assert missing in error.what, error
    else:
        sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
    assert not (tmp_path / "out").exists()


def test_third_parties_add_formats(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from kdcache import registry

    point = EntryPoint("mine", "kdcache.export.safetensors:plugin", "kdcache.export")

    def points(*, group: str, name: str = "mine") -> list[EntryPoint]:
        return [point] if (group, name) == ("kdcache.export", "mine") else []

    monkeypatch.setattr(package, "entry_points", points)
    monkeypatch.setattr(registry, "entry_points", points)
    result = export(made / "student", tmp_path / "out", "mine")
    assert (result.format, result.parity.largest_difference) == ("mine", 0)


def test_from_the_command_line(made: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    arguments: list[Any] = ["export", made / "student", "--to", "safetensors", "--out", tmp_path / "out"]
    arguments += ["--store", made / "store"]
    code, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["quality_before"]["scores"] == found["quality_after"]["scores"]
    code, out, _ = run(*arguments, "-q")
    assert (code, "nothing to do" in out, "8 x 128 input_ids" in out, "perplexity" in out) == (0, True, True, True)
    code, out, _ = run("export", made / "student", "--to", "gguf", "--out", tmp_path / "g", "--json")
    assert (code, json.loads(out)["error"]) == (2, "ConfigError")


def test_help_imports_neither_torch_nor_optuna_nor_onnx() -> None:
    code = (
        "import sys; sys.argv = ['kdcache', '--help']\nimport kdcache.cli\n"
        "try: kdcache.cli.main()\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'optuna', 'onnx', 'onnxruntime', 'sacrebleu')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
