"""Stores of every released format version read as they did when they were written."""

import json
import re
from pathlib import Path

import pytest

from kdcache.store import check, open_store
from kdcache.store.manifest import MAX_SHARDS
from tests.golden.make import described

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs" / "spec"


@pytest.mark.parametrize("version", ["format-v1", "format-v1.1"])
def test_golden_stores_read_as_written(version: str) -> None:
    expected = json.loads((HERE / version / "expected.json").read_text())
    store = open_store(HERE / version / "store")
    assert store.digest == expected["digest"]
    assert check(store) == []
    found = [described(sample) for sample in store]
    assert len(found) == len(expected["samples"]) == 3
    for ours, theirs in zip(found, expected["samples"], strict=True):
        assert json.loads(json.dumps(ours)).keys() == theirs.keys()
        for key, value in theirs.items():
            if key == "log_partition_at_2":
                assert ours[key] == pytest.approx(value, abs=1e-12)
            else:
                assert json.loads(json.dumps(ours[key])) == value, key


def test_golden_stores_are_never_rewritten() -> None:
    from tests.golden.make import main

    with pytest.raises(SystemExit, match="never rewritten"):
        main()


def test_the_reading_example_of_the_specification_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "format-v1.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "store").symlink_to(HERE / "format-v1.1" / "store")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "format-v1.md", "exec"), names)
    sample = open_store(HERE / "format-v1.1" / "store")[0]
    assert (names["ids"] == sample.targets.ids).all()  # type: ignore[union-attr]
    assert (names["labels"] == sample.labels).all()  # type: ignore[union-attr]


def test_every_codec_has_a_page_and_the_limits_are_those_of_the_code() -> None:
    from kdcache.codecs import KNOWN

    assert {path.stem for path in (DOCS / "codecs").glob("*.md")} == set(KNOWN)
    assert MAX_SHARDS == 10**6
    assert "10^6 shards" in (DOCS / "format-v1.md").read_text()
