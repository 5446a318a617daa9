"""Verification: against the manifest, and against the live teacher."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import MismatchError
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.teachers.callable import CallableTeacher
from kdcache.verify import verify
from tests import tiny


@pytest.fixture
def captured(tmp_path: Path) -> tuple[Path, str]:
    tree = tiny.capture_tree(tmp_path)
    capture(parse_config(CaptureConfig, tree), tmp_path / "store")
    return tmp_path / "store", tree["teacher"]["model"]


def test_rows_are_compared_with_the_live_teacher(captured: tuple[Path, str]) -> None:
    store, model = captured
    report = verify(store, teacher=model, rows=50)
    assert report.problems == ()
    assert report.rows_compared >= 50
    assert report.top1_agreement == 1.0
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1 / 250  # half a step of 1/128, and a little
    assert report.as_dict()["ok"] is True


def test_a_teacher_that_claims_to_be_the_captured_one_but_answers_otherwise_is_found(
    captured: tuple[Path, str], tmp_path: Path
) -> None:
    store, model = captured
    other = load_teacher(TeacherConfig(model=str(tiny.save_teacher(tmp_path / "other", seed=1)), dtype="float32"))
    with pytest.raises(MismatchError, match="weights"):
        verify(store, teacher=other)
    other.__dict__["fingerprint"] = load_teacher(TeacherConfig(model=model, dtype="float32")).fingerprint
    report = verify(store, teacher=other)
    assert [problem.path for problem in report.problems] == ["columns/head_logits"]
    assert report.as_dict()["ok"] is False


def test_positions_that_were_skipped_hide_no_difference_of_others(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)

    def teacher(scale: float, *, sick: bool = True) -> CallableTeacher:
        def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            table = scale * torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
            logits = table[ids]
            logits[ids % 11 == 3] = math.nan if sick else 1.0
            return logits

        made = CallableTeacher(TeacherConfig(model="x:y", tokenizer=tree["teacher"]["model"]), forward)
        made.__dict__["fingerprint"] = {"kind": "callable", "name": "x:y", "vocab_size": 300}
        return made

    tree["targets"]["on_invalid"] = "skip"
    capture(parse_config(CaptureConfig, tree), tmp_path / "store", teacher=teacher(1.0))
    same = verify(tmp_path / "store", teacher=teacher(1.0), rows=50)
    assert same.problems == ()
    assert same.rows_compared >= 50
    assert same.mean_logit_difference is not None
    assert same.mean_logit_difference < 1 / 128
    # the same order of candidates, twice as far apart; and a teacher that has nothing to say
    for other in (teacher(2.0), teacher(2.0, sick=False), teacher(math.nan)):
        found = verify(tmp_path / "store", teacher=other, rows=50)
        assert [one.path for one in found.problems] == ["columns/head_logits"]
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["ok"] is False


def test_a_store_of_which_nothing_can_be_compared_is_not_called_sound(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    tree["targets"]["on_invalid"] = "skip"
    made = CallableTeacher(
        TeacherConfig(model="x:y", tokenizer=tree["teacher"]["model"]),
        lambda ids, mask: torch.full((*ids.shape, 300), math.nan),
    )
    made.__dict__["fingerprint"] = {"kind": "callable", "name": "x:y", "vocab_size": 300}
    capture(parse_config(CaptureConfig, tree), tmp_path / "store", teacher=made)
    assert verify(tmp_path / "store").problems == ()
    found = verify(tmp_path / "store", teacher=made, rows=50)
    assert (found.rows_compared, found.as_dict()["ok"]) == (0, False)
    assert "has no numbers" in found.problems[0].what


def test_quick_sees_sizes_and_full_sees_every_bit(captured: tuple[Path, str]) -> None:
    store, _ = captured
    path = next((store / "columns" / "head_ids" / "c").rglob("0"))
    path = path if path.is_file() else next(one for one in path.rglob("*") if one.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert verify(store, quick=True).problems == ()
    calls: list[tuple[int, int]] = []
    full = verify(store, progress=lambda done, total: calls.append((done, total)))
    assert ["digest" in problem.what for problem in full.problems] == [True]
    assert calls[-1] == (full.objects, full.objects)
    path.write_bytes(data[:-1])
    assert len(verify(store, quick=True).problems) == 1


def test_features_are_compared_where_the_teacher_had_numbers(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, hidden=["table"], on_invalid="skip")

    def teacher(scale: float) -> CallableTeacher:
        table = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))

        def forward(ids: torch.Tensor, mask: torch.Tensor) -> SimpleNamespace:
            sick = (ids % 11 == 3)[..., None]
            none = torch.tensor(math.nan)
            hidden = {"table": torch.where(sick, none, scale * table[ids])}
            return SimpleNamespace(logits=torch.where(sick, none, table[ids]), hidden=hidden)

        made = CallableTeacher(TeacherConfig(model="x:y", tokenizer=tree["teacher"]["model"]), forward)
        made.__dict__["fingerprint"] = {"kind": "callable", "name": "x:y", "vocab_size": 300}
        return made

    capture(parse_config(CaptureConfig, tree), tmp_path / "store", teacher=teacher(1.0))
    same = verify(tmp_path / "store", teacher=teacher(1.0), rows=50)
    assert same.problems == ()
    assert same.feature_differences["table"] < 0.01
    for scale in (2.0, math.nan):
        found = verify(tmp_path / "store", teacher=teacher(scale), rows=50)
        assert [one.path for one in found.problems] == ["columns/hidden.table"]
        json.dumps(found.as_dict(), allow_nan=False)
