"""`kdcache capture`, started several times with the same config, is one capture."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.store import check, open_store
from tests import tiny


def test_two_commands_at_once_make_one_store(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    tree["source"]["path"] = str(tiny.write_text(tmp_path, documents=60))
    alone = capture(parse_config(CaptureConfig, tree), tmp_path / "alone")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    line = [sys.executable, "-m", "kdcache", "capture", str(tmp_path / "c.yaml"), "-q", "--json", "--out"]
    jobs = [
        subprocess.Popen([*line, str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = []
    for job in jobs:
        out, told = job.communicate(timeout=240)
        assert job.returncode == 0, told
        results.append(json.loads(out))
    assert [one["digest"] for one in results] == [alone.digest] * 2
    assert max(one["positions_wasted"] for one in results) < alone.positions
    assert check(open_store(tmp_path / "s")) == []
    assert not any((tmp_path / "s" / left).exists() for left in ("staging", "claims", "work"))
