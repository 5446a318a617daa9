"""Exports of students of examples: the same answers to held-out examples, in batches and lengths of any size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from kdcache.capture import capture
from kdcache.config import parse_config
from kdcache.errors import ConfigError, MismatchError, UnsupportedError
from kdcache.evaluate import evaluate
from kdcache.examples import Examples, write_examples
from kdcache.export import ExportResult, export
from kdcache.export.finished import load_finished
from kdcache.export.measure import compare
from kdcache.export.trial import Inputs
from kdcache.train import train
from kdcache.train.config import TrainConfig
from tests import networks, tiny
from tests.classifiers.test_examples import config_of, module
from tests.test_cli import run  # noqa: F401

COUNT, CLASSES, LENGTH = 40, 5, 9

BERT = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}

Run = Callable[..., tuple[int, str, str]]


class Mean(nn.Module):
    """Token ids [S, T] to classes of the whole."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.tokens = networks.Tagger(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.tokens(input_ids, attention_mask).mean(1)


class Places(nn.Module):
    """As many token ids as it has weights, to classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 2), nn.Linear(2 * LENGTH, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fc((self.embed(input_ids) * attention_mask[..., None]).flatten(1))


class Recurrent(nn.Module):
    """Token ids [S, T] to classes of every token, read both ways."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 8), nn.Linear(16, classes)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embed(input_ids) * attention_mask[..., None])[0])


def recurrent(vocab_size: int) -> nn.Module:
    return Recurrent(vocab_size)


def places(vocab_size: int) -> nn.Module:
    return Places(vocab_size)


def trained(folder: Path, examples: Examples, teacher: Any, **sections: Any) -> Path:
    """Return the run of a student whose held-out store holds all that it was trained on."""
    if not (folder / "store").exists():
        capture(config_of(examples.folder, **sections.pop("capture", {})), folder / "store", classifier=module(teacher))
    tree = {
        "data": {"examples": str(examples.folder), "batch_size": 8, "validation": str(folder / "store")},
        "optim": {"learning_rate": 0.02, "warmup_steps": 0},
        "run": {"epochs": 4, "device": "cpu"},
        **sections,
    }
    train(parse_config(TrainConfig, tree), folder / "store", folder / "run")
    return folder / "run"


def pixels_in(folder: Path, **more: Any) -> Examples:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, 1, 8, 8)).astype(np.uint8)
    return write_examples(folder, pixels=images, **more)


def tokens_in(folder: Path, label: np.ndarray) -> Examples:
    random = np.random.default_rng(1)
    lengths = random.integers(2, LENGTH + 1, COUNT)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
    return write_examples(folder, input_ids=random.integers(0, 20, mask.shape), attention_mask=mask, label=label)


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def shapes(path: Path) -> dict[str, list[Any]]:
    own = session(path)
    return {one.name: one.shape for one in (*own.get_inputs(), *own.get_outputs())}


@pytest.fixture(scope="module")
def classes() -> np.ndarray:
    return np.random.default_rng(2).integers(0, CLASSES, COUNT)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, classes: np.ndarray) -> Path:
    """A folder with the `run` of a student of convolutions, trained with a projector, and its `store`."""
    folder = tmp_path_factory.mktemp("images")
    examples = pixels_in(folder / "examples", label=classes)
    trained(
        folder,
        examples,
        networks.teacher(networks.Conv, 8, CLASSES),
        capture={"examples": {"features": [{"name": "conv", "tap": "conv|mean"}]}},
        student={"factory": "tests.networks:conv"},
        loss={"hidden": [{"teacher": "conv", "student": "conv|mean", "kind": "mse"}], "alpha": 0.5},
    )
    return folder


@pytest.fixture(scope="module")
def exported(images: Path) -> dict[str, ExportResult]:
    return {name: export(images / "run", images / name, name) for name in ("safetensors", "onnx", "int8")}


@pytest.mark.slow
def test_every_format_is_measured_on_the_runs_examples(images: Path, exported: dict[str, ExportResult]) -> None:
    found = evaluate(images / "run")
    own = {name: value for name, value in found.scores.items() if not name.startswith("teacher_")}
    whole = {name: getattr(found, name) for name in ("accuracy", "top1_agreement", "cross_entropy", "kl")}
    for name, result in exported.items():
        before, after = result.quality_before, result.quality_after
        assert before is not None
        assert after is not None
        assert before.scores == pytest.approx({**whole, **own}, abs=1e-5)
        assert before.positions == after.positions == COUNT
        assert after.scores == pytest.approx(before.scores, abs=0.2 if name == "int8" else 1e-5)
        assert [(one.input, one.shape) for one in result.speeds] == [("pixels", (n, 1, 8, 8)) for n in (1, 32)]
        assert result.parity.shapes == ((1, 1, 8, 8), (2, 1, 8, 8), (5, 1, 8, 8), (24, 1, 8, 8))
        assert result.store_digest == found.store_digest
        assert json.loads(json.dumps(result.as_dict()))["quality_before"]["positions"] == COUNT
    assert exported["safetensors"].parity.largest_difference == 0
    assert exported["onnx"].parity.largest_difference < 1e-5
    assert export(images / "run", images / "onnx", "onnx").already_complete


@pytest.mark.slow
def test_projectors_are_in_no_export(images: Path, exported: dict[str, ExportResult]) -> None:
    snapshot = sorted((images / "run" / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    with safe_open(snapshot, "np") as file:
        assert any("projector" in name for name in file.keys())  # noqa: SIM118
    own = networks.conv(CLASSES)
    with safe_open(images / "safetensors" / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(own.state_dict())
    graph = onnx.load(str(images / "onnx" / "model.onnx")).graph
    weights = sum(np.prod(one.dims) for one in graph.initializer if len(one.dims) >= 2)
    assert weights == sum(one.numel() for one in own.parameters() if one.ndim >= 2)
    assert all(result.parameters == sum(one.numel() for one in own.parameters()) for result in exported.values())


@pytest.mark.slow
def test_a_graph_takes_batches_of_any_size_in_the_examples_dtype(
    images: Path, exported: dict[str, ExportResult]
) -> None:
    path = images / "onnx" / "model.onnx"
    assert shapes(path) == {"pixels": ["batch", 1, 8, 8], "logits": ["batch", CLASSES]}
    pixels = Examples(images / "examples").fields["pixels"]
    student = load_finished(images / "run", None)
    for count in (1, 3, COUNT):
        expected = student.run({"pixels": np.array(pixels[:count])})
        assert np.abs(session(path).run(["logits"], {"pixels": pixels[:count]})[0] - expected).max() < 1e-5


@pytest.mark.slow
def test_convolutions_and_matrices_are_in_8_bits_and_it_says_how_much(
    images: Path, exported: dict[str, ExportResult]
) -> None:
    graph = onnx.load(str(images / "int8" / "model_int8.onnx")).graph
    kinds = {one.op_type for one in graph.node}
    assert {"ConvInteger", "MatMulInteger"} <= kinds
    assert not {"Conv", "Gemm", "MatMul"} & kinds
    large = {tuple(one.dims): one.data_type for one in graph.initializer if len(one.dims) >= 2}
    assert large == {(4, 1, 3, 3): onnx.TensorProto.UINT8, (4, CLASSES): onnx.TensorProto.INT8}
    told = " ".join(exported["int8"].notes)
    assert "1 MatMulInteger, 1 ConvInteger" in told
    assert "Beside the float32 graph" in told
    # a graph of sixty weights is nothing but its description
    assert "The files are larger" in told
    assert exported["int8"].parity.tolerance is None
    assert 0 < exported["int8"].parity.largest_difference < 0.1 * exported["int8"].parity.largest_logit + 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "student",
    [{"config": BERT}, {"config": BERT, "task": "token-classification"}, {"factory": "tests.networks:tagger"}],
    ids=["one-answer", "one-a-token", "one-a-token-by-a-factory"],
)
def test_sequences_of_any_length(student: dict[str, Any], tmp_path: Path, classes: np.ndarray) -> None:
    by_token = len(student) == 2 or "factory" in student
    label = classes if not by_token else np.random.default_rng(3).integers(-1, CLASSES, (COUNT, LENGTH))
    if by_token:
        label[:, 0] = 1
    examples = tokens_in(tmp_path / "examples", label)
    kind = networks.Tagger if by_token else Mean
    folder = trained(tmp_path, examples, networks.teacher(kind, 6, CLASSES), student=student)
    result = export(folder, tmp_path / "onnx", "onnx")
    path = tmp_path / "onnx" / "model.onnx"
    answers = ["batch", "sequence", CLASSES] if by_token else ["batch", CLASSES]
    assert shapes(path) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "logits": answers,
    }
    assert result.parity.shapes[4:] == ((3, 1), (3, 3), (3, 4), (3, 8))
    assert result.speeds[0].input == "input_ids"
    own = load_finished(folder, None)
    for samples, tokens in ((1, 1), (2, 5), (4, 14)):
        ids = np.random.default_rng(tokens).integers(0, 20, (samples, tokens))
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        assert np.abs(session(path).run(["logits"], given)[0] - own.run(given)).max() < 1e-4
    small = export(folder, tmp_path / "int8", "int8")
    found = evaluate(folder)
    for one in (result, small):
        assert one.quality_before is not None
        assert one.quality_before.scores["top1_agreement"] == pytest.approx(found.top1_agreement)
        assert one.quality_before.positions == found.positions
    kept = export(folder, tmp_path / "kept", "safetensors")
    assert kept.parity.largest_difference == 0


@pytest.mark.slow
def test_a_graph_says_no_length_that_it_does_not_keep(tmp_path: Path) -> None:
    label = np.random.default_rng(3).integers(0, CLASSES, (COUNT, LENGTH))
    examples = tokens_in(tmp_path / "examples", label)
    teacher = networks.teacher(networks.Tagger, 6, CLASSES)
    folder = trained(tmp_path, examples, teacher, student={"factory": f"{__name__}:recurrent"})
    result = export(folder, tmp_path / "onnx", "onnx")
    assert result.parity.largest_difference < 1e-5
    said = shapes(tmp_path / "onnx" / "model.onnx")["logits"]
    assert (said[0], isinstance(said[1], str), said[2]) == ("batch", True, CLASSES)
    small = export(folder, tmp_path / "int8", "int8")
    assert "1 DynamicQuantizeLSTM" in " ".join(small.notes)


def test_inputs_that_the_student_takes_in_one_length_only_keep_it(tmp_path: Path, classes: np.ndarray) -> None:
    examples = tokens_in(tmp_path / "examples", classes)
    teacher = networks.teacher(Mean, 6, CLASSES)
    folder = trained(tmp_path, examples, teacher, student={"factory": f"{__name__}:places"})
    result = export(folder, tmp_path / "onnx", "onnx")
    assert shapes(tmp_path / "onnx" / "model.onnx")["input_ids"] == ["batch", LENGTH]
    assert {shape[1] for shape in result.parity.shapes} == {LENGTH}


@pytest.mark.parametrize(("hard", "divergence"), [("sigmoid", "sigmoid"), ("mse", "regression")])
def test_errors_of_values(hard: str, divergence: str, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    label = (random.random((COUNT, 3)) < 0.5).astype(np.float32)
    numbers = random.normal(size=(COUNT, 4)).astype(np.float32)
    examples = write_examples(tmp_path / "examples", numbers=numbers, label=label)
    loss = {"hard": hard, "divergence": divergence, "alpha": 0.8}
    student = {"factory": "tests.networks:values"}
    teacher = networks.teacher(networks.Values, 8, 3)
    folder = trained(tmp_path, examples, teacher, student=student, loss=loss)
    result = export(folder, tmp_path / "onnx", "onnx")
    with torch.no_grad():
        sides = [load_finished(folder, None).run({"numbers": numbers}), teacher(torch.from_numpy(numbers)).numpy()]
    if hard == "sigmoid":
        sides = [1 / (1 + np.exp(-one.astype(np.float64))) for one in sides]
    for quality in (result.quality_before, result.quality_after):
        assert quality is not None
        assert quality.positions == COUNT
        assert quality.scores["mean_absolute_error"] == pytest.approx(np.abs(sides[0] - label).mean(), rel=1e-4)
        difference = np.abs(sides[0] - sides[1]).mean()
        # the teacher's logits are read back from the store
        assert quality.scores["imitation_mean_absolute_error"] == pytest.approx(difference, rel=1e-2)
    assert "accuracy" not in quality.scores
    assert shapes(tmp_path / "onnx" / "model.onnx")["numbers"] == ["batch", 4]


def test_without_labels_only_the_teacher_is_compared_with(tmp_path: Path) -> None:
    examples = pixels_in(tmp_path / "examples")
    teacher = networks.teacher(networks.Conv, 8, CLASSES)
    student = {"factory": "tests.networks:conv"}
    folder = trained(tmp_path, examples, teacher, student=student, loss={"alpha": 1.0})
    result = export(folder, tmp_path / "kept", "safetensors")
    assert result.quality_before is not None
    assert set(result.quality_before.scores) == {"top1_agreement", "kl"}


def test_a_few_examples_are_repeated(tmp_path: Path, classes: np.ndarray) -> None:
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (3, 1, 8, 8)).astype(np.uint8)
    examples = write_examples(tmp_path / "examples", pixels=images, label=classes[:3])
    teacher = networks.teacher(networks.Conv, 8, CLASSES)
    folder = trained(tmp_path, examples, teacher, student={"factory": "tests.networks:conv"})
    result = export(folder, tmp_path / "kept", "safetensors")
    assert [shape[0] for shape in result.parity.shapes] == [1, 2, 5, 24]
    assert result.quality_before is not None
    assert result.quality_before.positions == 3


def test_what_does_not_belong_to_the_student_is_refused(images: Path, tmp_path: Path) -> None:
    record = images / "run" / "train.json"
    student = tmp_path / "alone"
    student.mkdir()
    (student / "model.safetensors").write_bytes((images / "run" / "model.safetensors").read_bytes())
    document = json.loads(record.read_text())
    document["config"]["data"]["validation"] = None
    (student / "train.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="nothing says which"):
        export(student, tmp_path / "out", "onnx")
    assert export(student, tmp_path / "out", "safetensors", store=images / "store").quality_after is not None
    changed = np.array(Examples(images / "examples").fields["pixels"]) ^ 1
    write_examples(tmp_path / "changed", pixels=changed)
    with pytest.raises(MismatchError, match="is not what the teacher was given"):
        export(images / "run", tmp_path / "other", "onnx", examples=tmp_path / "changed")
    tiny.write_store(tmp_path / "text")
    with pytest.raises(MismatchError, match="of kind causal_lm"):
        export(images / "run", tmp_path / "other", "onnx", store=tmp_path / "text")
    fewer = pixels_in(tmp_path / "fewer", label=np.zeros(COUNT, dtype=np.int64))
    capture(config_of(fewer.folder), tmp_path / "two", classifier=module(networks.teacher(networks.Conv, 8, 2)))
    with pytest.raises(MismatchError, match="gives 5 outputs"):
        export(images / "run", tmp_path / "other", "onnx", store=tmp_path / "two")
    (student / "train.json").unlink()
    with pytest.raises(UnsupportedError, match="neither"):
        export(student, tmp_path / "other", "onnx", store=images / "store")
    assert not (tmp_path / "other").exists()


def test_other_answers_are_refused(images: Path) -> None:
    student = load_finished(images / "run", None)

    def turned(given: Inputs) -> np.ndarray:
        return np.ascontiguousarray(student.run(given)[::-1])

    def cut(given: Inputs) -> np.ndarray:
        return student.run(given)[:, :2]

    for wrong, said in ((turned, "does not say"), (cut, "of shape")):
        with pytest.raises(MismatchError, match=said):
            compare(student, wrong, tolerance=1e-4)


def test_from_the_command_line(images: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    arguments = ["export", images / "run", "--to", "safetensors", "--out", tmp_path / "out"]
    arguments += ["--store", images / "store", "--examples", images / "examples", "--batch-size", 16]
    code, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["quality_before"] == found["quality_after"]
    code, out, _ = run(*arguments, "-q")
    assert (code, "32 x 1 x 8 x 8 pixels" in out, "top1_agreement" in out) == (0, True, True)
