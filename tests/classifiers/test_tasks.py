"""Transformers teachers by task: captured through the command line from a folder of arrays, and a student trained."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from typer.testing import CliRunner

from kdcache.classifiers import load_classifier
from kdcache.cli import app
from kdcache.errors import AccessError, ConfigError, TeacherError
from kdcache.examples import write_examples
from kdcache.store import open_store
from kdcache.taps import run
from kdcache.tasks import model_class
from kdcache.teachers import TeacherConfig
from tests import networks

SAMPLES, CLASSES, WORDS, TOKENS, SOUND = 16, 4, 12, 8, 400
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
NARROW = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
WAVES: dict[str, Any] = {
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
    "layerdrop": 0.0,
    "classifier_proj_size": 8,
}
FRAMES = 18
SPECTRA = {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
WHISPER: dict[str, Any] = {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "decoder_layers": 1,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Case:
    task: str
    model_type: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    fields: Callable[[np.random.Generator], dict[str, Any]]
    tap: str = "hidden_states.1|mean"
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, int]:
        return {"vocab_size": WORDS} if self.task in ("ctc", "masked-lm") else {"num_labels": CLASSES}


def waves(random: np.random.Generator) -> dict[str, Any]:
    mask = np.ones((SAMPLES, SOUND), dtype=np.int64)
    mask[::3, 250:] = 0
    sound = random.normal(size=(SAMPLES, SOUND)) * mask  # float64, as numpy makes it
    return {"input_values": sound, "attention_mask": mask, "label": random.integers(0, CLASSES, SAMPLES)}


def speech(random: np.random.Generator) -> dict[str, Any]:
    sound = random.normal(size=(SAMPLES, SOUND)).astype(np.float32)
    label = random.integers(0, WORDS, (SAMPLES, FRAMES))
    label[::2, 10:] = -100  # frames after the end of the sound
    return {"input_values": sound, "label": label}


def spectra(random: np.random.Generator) -> dict[str, Any]:
    values = random.normal(size=(SAMPLES, 32, 16)).astype(np.float32)
    return {"input_values": values, "label": random.integers(0, CLASSES, SAMPLES)}


def mels(random: np.random.Generator) -> dict[str, Any]:
    values = random.normal(size=(SAMPLES, 8, 40)).astype(np.float32)
    return {"input_features": values, "label": random.integers(0, CLASSES, SAMPLES)}


def tags(random: np.random.Generator) -> dict[str, Any]:
    label = np.where(random.random((SAMPLES, TOKENS)) < 0.6, random.integers(0, CLASSES, (SAMPLES, TOKENS)), -100)
    label[:, 0] = 1
    ids = random.integers(0, WORDS, (SAMPLES, TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "label": label}


def gaps(random: np.random.Generator) -> dict[str, Any]:
    ids = random.integers(0, WORDS, (SAMPLES, TOKENS))
    label = np.where(random.random(ids.shape) < 0.3, ids, -100)
    label[:, 2] = ids[:, 2]
    return {"input_ids": np.where(label >= 0, 3, ids), "attention_mask": np.ones_like(ids), "label": label}


AST = "audio-spectrogram-transformer"
OF_WHISPER = ({"d_model": 16, "encoder_layers": 2}, {"d_model": 8, "encoder_layers": 1})
CASES = {
    "wav2vec2": Case("audio-classification", "wav2vec2", WIDE, NARROW, waves, sizes=WAVES),
    "ctc": Case("ctc", "wav2vec2", WIDE, NARROW, speech, sizes=WAVES),
    "ast": Case("audio-classification", AST, WIDE, NARROW, spectra, "final|first", SPECTRA),
    "whisper": Case("audio-classification", "whisper", *OF_WHISPER, mels, sizes=WHISPER),
    "tokens": Case("token-classification", "bert", WIDE, NARROW, tags, "hidden_states.1"),
    "masked": Case("masked-lm", "bert", WIDE, NARROW, gaps, "attentions.0|heads"),
}


def teacher_of(case: Case, folder: Path) -> Any:
    torch.manual_seed(0)
    words = {"vocab_size": WORDS} if case.model_type == "bert" else {}
    settings = tf.AutoConfig.for_model(case.model_type, **{**words, **case.sizes, **case.teacher, **case.outputs})
    model = model_class(case.task).from_config(settings).eval()
    model.save_pretrained(folder)
    return model


def command(*line: Any) -> Any:
    done = CliRunner().invoke(app, [str(one) for one in line])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def captured(case: Case, folder: Path, **own: Any) -> dict[str, Any]:
    model = teacher_of(case, folder / "teacher")
    fields = {**case.fields(np.random.default_rng(0)), **own}
    write_examples(folder / "examples", **fields)
    tree = {
        "examples": {
            "path": str(folder / "examples"),
            "batch_size": 8,
            "features": [{"name": "inner", "tap": case.tap, "dtype": "float32"}],
        },
        "teacher": {"model": str(folder / "teacher"), "task": case.task, "device": "cpu"},
        "store": {"preset": "lossless", "shard_positions": 4096, "chunk_positions": 64},
    }
    (folder / "capture.yaml").write_text(yaml.safe_dump(tree))
    command("capture", folder / "capture.yaml", "--out", folder / "store", "-q", "--json")
    return {"model": model, "fields": fields}


@pytest.mark.parametrize("name", list(CASES))
def test_a_task_is_captured_and_a_student_trained(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    made = captured(case, tmp_path)
    store, label = open_store(tmp_path / "store"), made["fields"]["label"]
    inputs = {
        one: torch.from_numpy(values.astype(np.float32) if values.dtype.kind == "f" else values)
        for one, values in made["fields"].items()
        if one != "label"
    }
    made["model"].set_attn_implementation("eager")
    with torch.no_grad():
        logits, inner = run(made["model"], inputs, [case.tap])
    for number in (0, 7, 15):
        sample = store[number]
        own = logits[number] if logits.ndim == 2 else logits[number][torch.from_numpy(label[number] >= 0)]
        rows = np.take_along_axis(np.atleast_2d(own.numpy()), sample.targets.ids, 1)
        assert np.allclose(rows, sample.targets.logits, atol=1e-4)
        assert np.allclose(sample.hidden["inner"], inner[case.tap][number].numpy()[None], atol=1e-4)
    words = {"vocab_size": WORDS} if case.model_type == "bert" else {}
    tree = {
        "student": {
            "task": case.task,
            "config": {"model_type": case.model_type, **words, **case.sizes, **case.student},
        },
        "data": {"examples": str(tmp_path / "examples"), "batch_size": 8, "validation": str(tmp_path / "store")},
        "loss": {"alpha": 0.7, "hidden": [] if name == "masked" else [{"teacher": "inner", "student": case.tap}]},
        "run": {"epochs": 1, "device": "cpu"},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree))
    line = ("train", tmp_path / "train.yaml", "--store", tmp_path / "store", "--out", tmp_path / "run")
    assert command(*line, "-q", "--json")["validation"]["positions"] == store.num_positions
    found = command("eval", tmp_path / "run", "--store", tmp_path / "store", "-q", "--json")
    assert found["kl"] >= 0


def test_frames_must_be_those_of_the_labels_and_of_the_student(tmp_path: Path) -> None:
    case = CASES["ctc"]
    wrong = np.zeros((SAMPLES, SOUND), dtype=np.int64)
    with pytest.raises(Exception, match=f"answers for {FRAMES} tokens a sample, and the labels are of {SOUND}"):
        captured(case, tmp_path / "a", label=wrong)
    captured(case, tmp_path)
    tree = {
        "student": {"task": "ctc", "config": {"model_type": "wav2vec2", **WAVES, **NARROW, "conv_stride": [5, 2]}},
        "data": {"examples": str(tmp_path / "examples"), "batch_size": 8},
        "run": {"steps": 1, "device": "cpu"},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree))
    line = ("train", tmp_path / "train.yaml", "--store", tmp_path / "store", "--out", tmp_path / "run", "-q")
    with pytest.raises(Exception, match="answers for 36 tokens of a sample, and the teacher did for 18"):
        command(*line)


def test_layers_that_are_left_out_at_random_have_no_numbers(tmp_path: Path) -> None:
    case = CASES["wav2vec2"]
    model = teacher_of(dataclasses.replace(case, sizes={**WAVES, "layerdrop": 1.0}), tmp_path)
    inputs = {"input_values": torch.zeros(2, SOUND)}
    assert run(model, inputs, ["hidden_states.2"])[1]["hidden_states.2"].shape == (2, FRAMES, 16)
    model.train()
    with pytest.raises(ConfigError, match="numbers move"):
        run(model, inputs, ["hidden_states.2"])
    with pytest.raises(TeacherError, match="was not run"):
        run(model, inputs, ["wav2vec2.encoder.layers.1"])


def test_a_mask_of_other_tokens_gives_no_mean() -> None:
    model = networks.Tagger(6, 3)
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.int64), "attention_mask": torch.ones(2, 6)}
    assert run(model, inputs, ["embed|mean"])[1]["embed|mean"].shape == (2, 6)
    shorter = {**inputs, "attention_mask": torch.ones(2, 1)}
    with pytest.raises(ConfigError, match="which are real is not known"):
        run(model, shorter, ["embed|mean"])


def test_a_head_of_random_weights_is_refused(tmp_path: Path) -> None:
    made = teacher_of(CASES["masked"], tmp_path)
    with pytest.raises(AccessError, match="they would be random"):
        _ = load_classifier(TeacherConfig(model=str(tmp_path), task="token-classification")).fingerprint
    ids = np.arange(TOKENS)[None] % WORDS
    answers = []
    for _ in range(2):  # no pooler was saved: what stands in for it is the same each time
        found = load_classifier(TeacherConfig(model=str(tmp_path), task="encoder", device="cpu"))
        answers.append((found.fingerprint, found.forward({"input_ids": ids}).logits))
    assert answers[0][0] == answers[1][0]
    with torch.no_grad():
        first = made.bert(torch.from_numpy(ids)).last_hidden_state[:, 0]
    assert torch.allclose(answers[0][1], first, atol=1e-5)


def test_a_mask_that_only_training_uses_may_be_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    teacher_of(CASES["wav2vec2"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("wav2vec2.masked_spec_embed")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    own = {"model": str(tmp_path), "task": "audio-classification"}
    assert load_classifier(TeacherConfig(**own)).fingerprint == load_classifier(TeacherConfig(**own)).fingerprint
