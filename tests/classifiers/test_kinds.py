"""Ways to run a frozen model of examples: what they say is what the model says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from kdcache.classifiers import load_classifier
from kdcache.errors import AccessError, ConfigError
from kdcache.teachers import TeacherConfig

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_model_file_is_run_by_onnxruntime(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["numbers", "weight"], ["logits"]),
        helper.make_node("Tanh", ["logits"], ["squashed"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("numbers", kind, ["samples", 4])],
        [helper.make_tensor_value_info(name, kind, ["samples", 3]) for name in ("logits", "squashed")],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "a.onnx"))
    classifier = load_classifier(TeacherConfig(model=str(tmp_path / "a.onnx")))
    numbers = np.random.default_rng(1).normal(size=(5, 4))
    answer = classifier.forward({"numbers": numbers}, ["squashed"])
    assert np.allclose(answer.logits.numpy(), numbers.astype(np.float32) @ weight, atol=1e-6)
    assert torch.allclose(answer.features["squashed"], answer.logits.tanh(), atol=1e-6)
    assert len(classifier.fingerprint["weights"]) == 64
    with pytest.raises(ConfigError, match="no output 'hidden'"):
        classifier.forward({"numbers": numbers}, ["hidden"])
    with pytest.raises(ConfigError, match="wants"):
        classifier.forward({"pixels": numbers})
    (tmp_path / "b.onnx").write_bytes(b"no model")
    with pytest.raises(AccessError, match="does not load"):
        load_classifier(TeacherConfig(model=str(tmp_path / "b.onnx"))).forward({"numbers": numbers})


def test_an_encoder_gives_maps_values_and_states_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, **SIZES)).eval()
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.asarray([[1] * 6, [1] * 4 + [0] * 2])}
    value = "bert.encoder.layer.1.attention.self.value"
    taps = ["hidden_states.2|mean", "final|first", "attentions.1", "attentions.0|heads", value]
    answer = load_classifier(TeacherConfig(model=str(tmp_path), device="cpu")).forward(inputs, taps)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(one) for name, one in inputs.items()}
        eager = BertForSequenceClassification.from_pretrained(str(tmp_path), attn_implementation="eager").eval()
        own = eager(**tensors, output_hidden_states=True, output_attentions=True)
    assert torch.allclose(answer.logits, own.logits, atol=1e-6)
    assert torch.allclose(answer.features["hidden_states.2|mean"][1], own.hidden_states[2][1, :4].mean(0), atol=1e-6)
    assert torch.allclose(answer.features["final|first"], own.hidden_states[-1][:, 0], atol=1e-6)
    assert torch.allclose(answer.features["attentions.1"], own.attentions[1], atol=1e-6)
    assert torch.allclose(answer.features["attentions.0|heads"], own.attentions[0].mean(1), atol=1e-6)
    assert answer.features[value].shape == (2, 6, 16)
    with pytest.raises(ConfigError, match="from 0"):
        load_classifier(TeacherConfig(model=str(tmp_path), device="cpu")).forward(inputs, ["hidden_states.7"])


@pytest.mark.parametrize("task", ["masked-lm", "image-classification", "encoder"])
def test_other_tasks_answer_in_their_shapes(task: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if task == "image-classification":
        vision = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=5, **SIZES)
        ViTForImageClassification(vision).save_pretrained(tmp_path)
        inputs, shape = {"pixel_values": np.zeros((2, 1, 8, 8), dtype=np.float32)}, (2, 5)
    else:
        BertForMaskedLM(BertConfig(vocab_size=30, **SIZES)).save_pretrained(tmp_path)
        inputs = {"input_ids": np.zeros((2, 6), dtype=np.int64)}
        shape = (2, 6, 30) if task == "masked-lm" else (2, 16)
    answer = load_classifier(TeacherConfig(model=str(tmp_path), task=task, device="cpu")).forward(
        inputs, ["final|first"]
    )
    assert answer.logits.shape == shape
    assert answer.features["final|first"].shape == (2, 16)


def test_kinds_are_guessed_from_the_name_and_unknown_ones_refused() -> None:
    found = load_classifier(TeacherConfig(model="tests.networks:conv", device="cpu"))
    assert found.fingerprint["kind"] == "module"
    with pytest.raises(ConfigError, match="no task"):
        load_classifier(TeacherConfig(model="somewhere", task="telepathy"))
    with pytest.raises(ConfigError, match="no classifier named"):
        load_classifier(TeacherConfig(model="x:y", kind="oracle"))
