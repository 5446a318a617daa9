"""Attention of causal language models out of a store: maps and relations are what both models have inside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.capture import capture, plan_capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError
from kdcache.store import Store, open_store
from kdcache.train import train
from kdcache.train.student import build_student
from kdcache.verify import verify
from tests import tiny
from tests.train.test_train import STUDENT, config_of, losses

MAP, VALUE = "attentions.1", "layers.1.self_attn.v_proj"
KEPT = [{"layer": name, "dtype": "float32"} for name in (MAP, VALUE, "layers.0.self_attn.k_proj")]
PAIRS: dict[str, dict[str, Any]] = {
    "map_kl": {"teacher": MAP, "student": "attentions.0"},
    "map_mse": {"teacher": MAP, "student": "attentions.0"},
    "value_relation": {"teacher": VALUE, "student": "layers.0.self_attn.v_proj", "options": {"heads": 2}},
}


def tree_of(folder: Path, **changed: Any) -> dict[str, Any]:
    tree = tiny.capture_tree(folder)
    return {**tree, "targets": {"k": 8, "hidden": KEPT}, "samples": {"max_length": 24}, **changed}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher's store with the last layer's map and values; its samples are of several lengths."""
    folder = tmp_path_factory.mktemp("attention")
    capture(parse_config(CaptureConfig, tree_of(folder)), folder / "store")
    return folder


def inside(model: Any, ids: np.ndarray, kind: str, layer: int) -> np.ndarray:
    """What one sample's layer holds: the heads' mean of its map [T, T], or its values [T, D]; float64."""
    model.set_attn_implementation("eager")
    seen: list[torch.Tensor] = []
    hook = model.model.layers[layer].self_attn.v_proj.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        out = model(torch.from_numpy(ids)[None].long(), output_attentions=True)
    hook.remove()
    found = seen[0][0] if kind == "value_relation" else out.attentions[layer][0].mean(0)
    return found.double().numpy()


def relation(vectors: np.ndarray, heads: int) -> np.ndarray:
    parts = np.split(vectors, heads, axis=1)
    scores = np.stack([one @ one.T / np.sqrt(one.shape[1]) for one in parts])
    power = np.exp(scores - scores.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def expected(kind: str, teacher: np.ndarray, student: np.ndarray) -> float:
    """The loss of one sample, a position."""
    if kind == "map_mse":
        return float(((teacher - student) ** 2).mean())
    p, q = (teacher, student) if kind == "map_kl" else (relation(teacher, 2), relation(student, 2))
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(-1)
    return float(terms.mean())


def test_what_is_kept_is_what_the_teacher_has_inside(captured: Path) -> None:
    store = open_store(captured / "store")
    model = AutoModelForCausalLM.from_pretrained(captured / "teacher")
    assert store.columns[f"hidden.{MAP}"].shape == (23,)
    lengths = set()
    for number in range(len(store)):
        sample = store[number]
        ids = sample.input_ids[:-1]
        lengths.add(len(ids))
        kept = sample.hidden[MAP]
        assert np.abs(kept[:, : len(ids)] - inside(model, ids, "map_kl", 1)).max() < 1e-6
        assert not kept[:, len(ids) :].any()
        assert np.abs(sample.hidden[VALUE] - inside(model, ids, "value_relation", 1)).max() < 1e-5
    assert len(lengths) > 1
    found = verify(captured / "store", teacher=str(captured / "teacher"), rows=200)
    assert found.problems == ()
    assert set(found.feature_differences) == {one["layer"] for one in KEPT}
    assert max(found.feature_differences.values()) < 1e-3


@pytest.mark.parametrize("kind", PAIRS)
def test_the_first_step_has_the_loss_of_a_float64_oracle(captured: Path, tmp_path: Path, kind: str) -> None:
    store = open_store(captured / "store")
    run = {"steps": 2, "device": "cpu"}
    loss = {"alpha": 1.0, "hidden": [{"kind": kind, "weight": 1000.0, **PAIRS[kind]}]}
    # weights of some size, or all maps are nearly even and what is compared is float32's rounding
    model = {"config": {**STUDENT["config"], "initializer_range": 0.5}}
    data = {"batch_size": len(store)}
    config = config_of(loss=loss, run=run, data=data, student=model, optim={"learning_rate": 0.01})
    train(config, store, tmp_path / "student")
    student = build_student(config.student, store, seed=config.run.seed).eval()
    teacher = AutoModelForCausalLM.from_pretrained(captured / "teacher")
    assert losses(tmp_path / "student", "hidden")[0] == pytest.approx(
        1000 * mean_over_positions(store, teacher, student, kind), rel=1e-4
    )
    assert losses(tmp_path / "student", "hidden")[1] < losses(tmp_path / "student", "hidden")[0]


def mean_over_positions(store: Store, teacher: Any, student: Any, kind: str) -> float:
    total = positions = 0.0
    for number in range(len(store)):
        sample = store[number]
        ids = sample.input_ids[:-1]
        counted = int(sample.loss_mask.sum())
        total += counted * expected(kind, inside(teacher, ids, kind, 1), inside(student, ids, kind, 0))
        positions += counted
    return total / positions


def test_a_pair_that_does_not_fit_is_refused_before_the_first_step(captured: Path, tmp_path: Path) -> None:
    for kind, pair, said in (
        ("map_kl", {"teacher": VALUE, "student": "attentions.0"}, "does not compare"),
        ("cosine", {"teacher": MAP, "student": "attentions.0"}, "does not compare"),
        ("map_kl", {"teacher": MAP, "student": "attentions.7"}, "no such layer"),
        ("value_relation", {"teacher": VALUE, "student": "layers.0.no_proj"}, "no such layer"),
    ):
        config = config_of(loss={"hidden": [{"kind": kind, **pair}]})
        with pytest.raises(ConfigError, match=said):
            train(config, captured / "store", tmp_path / "student")
        assert not (tmp_path / "student" / "model.safetensors").exists()


def test_relations_of_positions_that_were_left_out_are_refused(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, targets={"k": 8, "hidden": [{"layer": VALUE, "keep": "masked"}]})
    capture(parse_config(CaptureConfig, tree), tmp_path / "store")
    config = config_of(loss={"hidden": [{"kind": "value_relation", **PAIRS["value_relation"]}]})
    with pytest.raises(ConfigError, match="of some"):
        train(config, tmp_path / "store", tmp_path / "student")


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("attentions.2", "attentions.2"),
        ("layers.1.self_attn.z_proj", "nothing called"),
        ("rotary_emb", "no layer 'rotary_emb'"),
        ("3", "no layer '3'"),
    ],
)
def test_a_layer_that_is_not_there_is_named_before_the_capture(tmp_path: Path, layer: str, said: str) -> None:
    config = parse_config(CaptureConfig, tree_of(tmp_path, targets={"k": 8, "hidden": [layer]}))
    with pytest.raises(ConfigError, match=said) as error:
        capture(config, tmp_path / "store")
    assert error.value.where == "targets.hidden"
    assert "attentions.0 to 1" in error.value.hint
    assert "self_attn" in error.value.hint


def test_a_map_has_no_mean_over_positions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no mean over positions"):
        parse_config(CaptureConfig, tree_of(tmp_path, targets={"hidden": [{"layer": MAP, "keep": "pooled"}]}))


def test_the_plan_says_what_a_map_takes(tmp_path: Path) -> None:
    config = parse_config(CaptureConfig, tree_of(tmp_path, targets={"k": 8, "hidden": [MAP]}))
    plan = plan_capture(config)
    price = next(one for one in plan.columns if one.name == f"hidden.{MAP}")
    assert (price.entry_bytes, price.feature) == (2 * 23, True)
    assert price.bytes >= 2 * 23 * plan.rows
