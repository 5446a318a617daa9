"""Teachers of the transformers library: their rows are the model's own logits, whatever the architecture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcache.errors import AccessError, ConfigError
from kdcache.fingerprint import digest_file
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.teachers.gguf import convert, find_gguf
from kdcache.teachers.transformers import TransformersTeacher
from tests import tiny

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": CAUSAL,
    "qwen2": CAUSAL,
    "gemma2": {**CAUSAL, "head_dim": 8, "final_logit_softcapping": 2.0},
    "granite": {**CAUSAL, "logits_scaling": 4.0},
    "cohere": {**CAUSAL, "logit_scale": 0.5},
    "phi": CAUSAL,  # its output layer has a bias
    "gpt_neox": {**SIZES, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},  # recurrent: no attention, no context limit
    "bert": {**SIZES, "max_position_embeddings": 64, "is_decoder": True},  # more than a linear layer after the body
}
NOT_FUSED = {"bert"}
VOCABULARY = 61
INPUTS = [np.array([3, 1, 4, 1, 5, 9, 2]), np.array([6, 5, 3]), np.array([58])]


def saved(folder: Path, kind: str, keys: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **special, **keys))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_are_the_models_own_logits_whatever_else_is_in_the_batch(kind: str, tmp_path: Path) -> None:
    model = saved(tmp_path, kind, ARCHITECTURES[kind])
    teacher = load_teacher(TeacherConfig(model=str(tmp_path), dtype="float32"))
    assert isinstance(teacher, TransformersTeacher)
    assert (teacher.output_head() is None) == (kind in NOT_FUSED)
    output = teacher.forward(INPUTS)
    rows = output.rows if output.head is None else output.head.logits(output.rows)
    with torch.no_grad():
        alone = torch.cat([model(torch.from_numpy(one)[None]).logits[0] for one in INPUTS])
    assert rows.shape == (sum(map(len, INPUTS)), VOCABULARY) == (len(alone), teacher.vocab_size)
    torch.testing.assert_close(rows, alone, rtol=1e-4, atol=1e-4)
    assert alone.std() > 0.01  # logits that were all alike would agree whatever the order


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_features_are_those_of_the_layer_that_was_named(kind: str, tmp_path: Path) -> None:
    model = saved(tmp_path, kind, ARCHITECTURES[kind])
    teacher = load_teacher(TeacherConfig(model=str(tmp_path), dtype="float32"))
    output = teacher.forward(INPUTS, ["embedding", "1", "final"])
    with torch.no_grad():
        states = [model(torch.from_numpy(one)[None], output_hidden_states=True).hidden_states for one in INPUTS]
    for layer, index in (("embedding", 0), ("1", 1), ("final", -1)):
        expected = torch.cat([state[index][0] for state in states])
        torch.testing.assert_close(output.hidden[layer], expected, rtol=1e-4, atol=1e-5)
        assert teacher.hidden_width(layer) == expected.shape[1]
    with pytest.raises(ConfigError, match="no layer '3'") as error:
        teacher.hidden_width("3")
    assert "1 to 2" in error.value.hint


def test_the_dtype_is_the_one_asked_for_and_part_of_the_identity(tmp_path: Path) -> None:
    saved(tmp_path, "llama", CAUSAL)
    kinds = ("auto", "float32", "bfloat16")
    teachers = {kind: load_teacher(TeacherConfig(model=str(tmp_path), dtype=kind)) for kind in kinds}  # type: ignore[arg-type]
    assert teachers["bfloat16"].forward(INPUTS).rows.dtype == torch.bfloat16
    assert teachers["auto"].fingerprint == teachers["float32"].fingerprint != teachers["bfloat16"].fingerprint
    assert str(tmp_path) not in str(teachers["auto"].fingerprint)


def test_other_weights_are_another_teacher(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", "llama", CAUSAL)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "b")
    prints = [load_teacher(TeacherConfig(model=str(tmp_path / one))).fingerprint for one in ("a", "b")]
    assert prints[0]["weights"] != prints[1]["weights"]
    assert prints[0]["config"] == prints[1]["config"]


def test_compiling_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama", CAUSAL)
    compiled: list[Any] = []
    real = torch.compile

    def watched(model: Any) -> Any:
        compiled.append(model)
        return real(model, backend="eager")  # the inductor back-end needs a C++ compiler, which a user may not have

    monkeypatch.setattr(torch, "compile", watched)
    rows = [load_teacher(TeacherConfig(model=str(tmp_path), compile=on)).forward(INPUTS).rows for on in (False, True)]
    assert len(compiled) == 1
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_loaded_says_why_and_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path / "whole", "llama", CAUSAL)
    with pytest.raises(AccessError, match="cannot be found") as error:
        load_teacher(TeacherConfig(model=str(tmp_path / "missing")))
    assert "config.json" in error.value.hint
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    pickled = load_teacher(TeacherConfig(model=str(tmp_path / "pickled")))
    with pytest.raises(AccessError, match="no safetensors file"):
        _ = pickled.fingerprint
    with pytest.raises(AccessError, match="does not load"):
        pickled.forward(INPUTS)
    weights = tmp_path / "whole" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AccessError, match="does not load"):
        load_teacher(TeacherConfig(model=str(tmp_path / "whole"))).forward(INPUTS)
    with pytest.raises(ConfigError, match="'abacus' cannot be used"):
        load_teacher(TeacherConfig(model=str(tmp_path / "whole"), device="abacus"))
    with pytest.raises(ConfigError, match="no teacher named"):
        load_teacher(TeacherConfig(model=str(tmp_path / "whole"), kind="oracle"))


def test_a_gguf_file_is_told_from_a_folder_and_a_hub_name(tmp_path: Path) -> None:
    assert find_gguf("some-org/some-model", None) is None
    assert find_gguf(str(tiny.save_teacher(tmp_path / "folder")), None) is None
    one = tmp_path / "one.gguf"
    one.write_bytes(b"GGUF")
    assert find_gguf(str(one), None) == find_gguf(str(tmp_path), None) == one
    (tmp_path / "two.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="holds 2 GGUF files"):
        find_gguf(str(tmp_path), None)
    assert find_gguf(str(tmp_path), "two.gguf") == tmp_path / "two.gguf"


def test_a_broken_gguf_file_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(AccessError, match="cannot be converted"):
        convert(broken)
    assert list((tmp_path / "home" / "models").iterdir()) == []
    with pytest.raises(Exception, match="no such file"):
        convert(tmp_path / "missing.gguf")


def test_the_real_teacher_knows_the_capital_of_france(teacher_folder: Path) -> None:
    teacher = load_teacher(TeacherConfig(model=str(teacher_folder), dtype="bfloat16"))
    words = teacher.tokenizer()
    assert (teacher.vocab_size, teacher.output_head() is None) == (49152, False)
    ids = np.asarray(words("The capital of France is")["input_ids"])
    output = teacher.forward([ids])
    assert output.head is not None
    best = output.head.logits(output.rows[-1:]).argmax()
    assert words.decode([int(best)]) == " Paris"


def test_the_conversion_of_the_real_gguf_is_named_by_its_content(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.demo import TEACHER_PACKAGE, package_folder

    file = next(package_folder(TEACHER_PACKAGE).glob("*.gguf"))
    monkeypatch.setenv("KDCACHE_HOME", str(teacher_folder.parent.parent))
    assert convert(file) == teacher_folder  # made once, found again
    assert teacher_folder.name.endswith(digest_file(file)[:12])
