"""Verification: against the manifest, and against the live teacher."""

from pathlib import Path

import pytest

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import MismatchError
from kdcache.teachers import TeacherConfig, load_teacher
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
