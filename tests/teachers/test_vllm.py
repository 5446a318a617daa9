"""The contract with vLLM, by a stand-in of its two classes: vLLM itself needs an accelerator.

What stands in behaves as vLLM's documentation says: `prompt_logprobs` begins with None, and each further entry maps ids
to objects with `logprob`, the prompt's own token first, then the likeliest.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError, TeacherError
from kdcache.store import check, open_store
from kdcache.teachers import BlackBox, TeacherConfig, load_teacher
from kdcache.teachers.transformers import TransformersTeacher
from tests import tiny


class SamplingParams:
    def __init__(self, *, max_tokens: int, prompt_logprobs: int, temperature: float, detokenize: bool) -> None:
        assert (max_tokens, temperature, detokenize) == (1, 1.0, False)
        self.prompt_logprobs = prompt_logprobs


class LLM:
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, *, model: str, max_logprobs: int, **keys: Any) -> None:
        assert keys.pop("logprobs_mode") == "raw_logprobs"
        assert set(keys) == {"tokenizer", "revision", "trust_remote_code", "dtype"}
        self._model = AutoModelForCausalLM.from_pretrained(model)
        self._most = max_logprobs
        self.made.append({"model": model, **keys})

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, list[int]]], params: SamplingParams, *, use_tqdm: bool) -> list[Any]:
        assert params.prompt_logprobs <= self._most
        assert not use_tqdm
        return [self._answer(one["prompt_token_ids"], params.prompt_logprobs) for one in prompts]

    def _answer(self, ids: list[int], count: int) -> Any:
        rows = torch.log_softmax(self._model(torch.tensor([ids])).logits[0].float(), -1)
        told: list[Any] = [None]
        for row, token in zip(rows[:-1], ids[1:], strict=True):
            chosen = [token, *row.topk(count).indices.tolist()]
            told.append({one: SimpleNamespace(logprob=float(row[one]), rank=0, decoded_token=None) for one in chosen})
        return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=told)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_a_store_of_what_it_tells(engine: ModuleType, tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    tree["teacher"] |= {"kind": "vllm", "top": 6}
    result = capture(parse_config(CaptureConfig, tree), tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert check(store) == []
    assert (result.k, result.skipped) == (6, {})
    live = AutoModelForCausalLM.from_pretrained(tree["teacher"]["model"])
    for sample in store:
        with torch.no_grad():
            rows = torch.log_softmax(live(torch.from_numpy(sample.input_ids)[None]).logits[0, :-1], -1).numpy()
        assert np.array_equal(sample.targets.ids, np.argsort(-rows, 1, kind="stable")[:, :6])
        assert np.allclose(sample.targets.logits, np.take_along_axis(rows, sample.targets.ids, 1), atol=1e-4)
        assert np.allclose(sample.targets.label_logit, rows[np.arange(len(rows)), sample.labels], atol=1e-4)


def test_it_is_the_model_that_it_runs(engine: ModuleType, tmp_path: Path) -> None:
    folder = tiny.save_teacher(tmp_path / "teacher")
    teacher = load_teacher(TeacherConfig(model=str(folder), kind="vllm", dtype="float32", top=3))
    plain = TransformersTeacher(TeacherConfig(model=str(folder), dtype="float32"))
    assert isinstance(teacher, BlackBox)
    assert teacher.fingerprint == {**plain.fingerprint, "kind": "vllm", "top": 3}
    assert (teacher.vocab_size, teacher.max_length, teacher.dtype) == (300, 127, torch.float32)
    assert teacher.output_head() is None
    assert len(teacher.tokenizer()) == 300
    for asked in (lambda: teacher.forward([]), lambda: teacher.hidden_width("final")):
        with pytest.raises(ConfigError, match="no rows and no features"):
            asked()
    told = teacher.tell([np.arange(5, 11), np.arange(3)])
    assert [one.ids.shape for one in told] == [(5, 3), (2, 3)]
    assert LLM.made[-1] == {
        "model": str(folder),
        "tokenizer": str(folder),
        "revision": None,
        "trust_remote_code": False,
        "dtype": "float32",
    }


def test_what_goes_wrong_says_where(engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TeacherConfig(model=str(tiny.save_teacher(tmp_path / "teacher")), kind="vllm")

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no CUDA device\nfound")

    teacher: Any = load_teacher(config)
    with monkeypatch.context() as patched:
        patched.setattr(LLM, "generate", broken)
        with pytest.raises(TeacherError, match="ValueError: no CUDA device"):
            teacher.tell([np.arange(4)])
    with monkeypatch.context() as patched:
        patched.setattr(LLM, "_answer", lambda self, ids, count: SimpleNamespace(prompt_logprobs=[None] * len(ids)))
        with pytest.raises(TeacherError, match="not those of the sample's tokens"):
            teacher.tell([np.arange(4)])
    monkeypatch.setattr(LLM, "__init__", broken)
    with pytest.raises(TeacherError, match="does not load the model"):
        load_teacher(config).tell([np.arange(4)])  # type: ignore[attr-defined]


def test_without_the_package_the_hint_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="needs the package vllm") as caught:
        load_teacher(TeacherConfig(model=str(tmp_path), kind="vllm"))
    assert "pip install vllm" in caught.value.hint
