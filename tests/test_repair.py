"""A damaged store is mended to the bytes that it had, or left alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.cli import app
from kdcache.config import parse_config
from kdcache.errors import CorruptObjectError, MismatchError
from kdcache.repair import repair
from kdcache.store import check, open_store
from kdcache.verify import verify
from tests import tiny
from tests.damage import harm

KINDS = ("zarr.json", "columns/head_ids/c/1", "columns/labels/c/0", "samples/00001", "columns/draw_ids/zarr.json")


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    made = tiny.capture_tree(tmp_path, hidden=[{"layer": "final", "keep": "pooled"}], draws=2)
    capture(parse_config(CaptureConfig, made), tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    return made


def test_a_mirror_gives_back_what_is_damaged(tmp_path: Path, tree: dict[str, Any]) -> None:
    hurt = harm(tmp_path / "s", KINDS)
    problems = verify(tmp_path / "s").problems
    assert sorted(repair(tmp_path / "s", problems, mirror=str(tmp_path / "copy"))) == hurt
    assert check(open_store(tmp_path / "s")) == []
    other = tiny.write_store(tmp_path / "other")
    with pytest.raises(MismatchError, match=other.digest):
        repair(tmp_path / "s", problems, mirror=str(tmp_path / "other"))
    harm(tmp_path / "s", KINDS)
    harm(tmp_path / "copy", KINDS)
    with pytest.raises(CorruptObjectError):  # a copy that is damaged itself gives nothing
        repair(tmp_path / "s", verify(tmp_path / "s").problems[1:], mirror=str(tmp_path / "copy"))


def test_the_teacher_gives_back_what_is_damaged(tmp_path: Path, tree: dict[str, Any]) -> None:
    hurt = harm(tmp_path / "s", KINDS)
    config = parse_config(CaptureConfig, tree)
    assert sorted(repair(tmp_path / "s", verify(tmp_path / "s").problems, config=config)) == hurt
    assert check(open_store(tmp_path / "s")) == []
    for name in open_store(tmp_path / "s").manifest.objects:
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()


def test_a_ranking_is_made_again_too(tmp_path: Path, tree: dict[str, Any]) -> None:
    (tmp_path / "s" / "ranking" / "c" / "0").unlink()
    repair(tmp_path / "s", verify(tmp_path / "s", quick=True).problems, config=parse_config(CaptureConfig, tree))
    assert check(open_store(tmp_path / "s")) == []


def test_another_capture_mends_nothing(tmp_path: Path, tree: dict[str, Any]) -> None:
    harm(tmp_path / "s", KINDS)
    problems = verify(tmp_path / "s").problems
    tree["seed"] = 5
    with pytest.raises(MismatchError, match=r"capture\.seed was 0, now 5"):
        repair(tmp_path / "s", problems, config=parse_config(CaptureConfig, tree))
    assert verify(tmp_path / "s").problems == problems


def test_the_command_mends_and_says_so(tmp_path: Path, tree: dict[str, Any]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    for how in (["--mirror", str(tmp_path / "copy")], ["--config", str(tmp_path / "c.yaml")]):
        harm(tmp_path / "s", KINDS)
        assert CliRunner().invoke(app, ["verify", str(tmp_path / "s"), "-q"]).exit_code == 3
        done = CliRunner().invoke(app, ["verify", str(tmp_path / "s"), "-q", "--json", "--repair", *how])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["ok"]
