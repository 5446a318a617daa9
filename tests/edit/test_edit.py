"""New stores out of finished ones hold what the old ones held, and say where it is from."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.cli import app
from kdcache.config import parse_config
from kdcache.edit import add, merge, select
from kdcache.errors import ConfigError, MismatchError
from kdcache.store import Kept, Store, check, open_store
from tests import tiny
from tests.remotes.web import serving

COMPACT = Kept("levels", {"steps_per_nat": 64}, ranked=True, differences=2)
ROWS = ((20, 20, 11), (30, 9), (12, 25))


def same(one: Store, other: Store, numbers: range, *, k: int | None = None) -> None:
    assert len(one) == len(numbers)
    for mine, number in zip(one, numbers, strict=True):
        theirs = other[number]
        targets = theirs.targets if k is None else theirs.targets.narrow(k)
        assert mine.id == theirs.id
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        assert np.array_equal(mine.targets.ids, targets.ids)
        assert np.array_equal(mine.targets.logits, targets.logits)
        assert np.abs(mine.targets.tail - targets.tail).max() <= 1 / 1024
        assert mine.hidden.keys() <= theirs.hidden.keys()
        for name, values in mine.hidden.items():
            assert np.array_equal(values, theirs.hidden[name])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return tiny.write_store(tmp_path / "s", rows=ROWS, kept=COMPACT, hidden={"final": 4, "1": 4})


def test_a_selected_part_is_that_part(tmp_path: Path, store: Store) -> None:
    select(store, tmp_path / "all")
    same(open_store(tmp_path / "all"), store, range(len(store)))
    made = select(tmp_path / "s", tmp_path / "part", shards="1:3", samples="1:3", columns=["hidden.final"])
    part = open_store(tmp_path / "part")
    same(part, store, range(4, 6))
    assert check(part) == []
    assert set(store.columns) - set(part.columns) == {"hidden.1"}
    assert (made.samples, made.digest) == (2, part.digest)
    assert part.manifest.part("source")["edited"][0]["select"] == store.digest
    again = select(tmp_path / "part", tmp_path / "again", samples="0")
    assert all("select" in one for one in open_store(tmp_path / "again").manifest.part("source")["edited"])
    assert again.samples == 1


def test_fewer_entries_are_those_of_a_capture_with_fewer(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    capture(parse_config(CaptureConfig, tree), tmp_path / "wide")
    tree["targets"]["k"] = 3
    capture(parse_config(CaptureConfig, tree), tmp_path / "narrow")
    select(tmp_path / "wide", tmp_path / "cut", top=3)
    cut, narrow = open_store(tmp_path / "cut"), open_store(tmp_path / "narrow")
    assert cut.k == 3
    assert check(cut) == []
    for one, other in zip(cut, narrow, strict=True):
        assert np.array_equal(one.targets.ids, other.targets.ids)
        for temperature in (0.7, 1.0, 3.0):
            assert np.allclose(one.targets.tail_mass(temperature), other.targets.tail_mass(temperature), atol=5e-3)
    assert cut.nbytes < open_store(tmp_path / "wide").nbytes


def test_of_a_store_far_away_only_what_is_selected_is_fetched(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path) as server:
        select(f"{server.url}/s", tmp_path / "part", shards="1", columns=[])
        same(open_store(tmp_path / "part"), store, range(3, 5))
        read = [name for name in server.requests if name.endswith(("/c/1", "/c/0", "/c/2")) or "/c/" in name]
        assert not any("hidden" in name for name in server.requests)
        assert {name.split("/c/")[1].split("/")[0] for name in read if "columns" in name} == {"1"}


def test_merged_stores_are_one_after_the_other(tmp_path: Path, store: Store) -> None:
    select(store, tmp_path / "a", shards="0:1")
    select(store, tmp_path / "b", shards="1:3")
    made = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    both = open_store(tmp_path / "both")
    same(both, store, range(len(store)))
    assert check(both) == []
    assert made.positions == store.num_positions
    with pytest.raises(MismatchError, match="comes twice"):
        merge([tmp_path / "a", tmp_path / "s"], tmp_path / "twice")
    merge([tmp_path / "a", tmp_path / "s"], tmp_path / "once", skip_duplicates=True)
    same(open_store(tmp_path / "once"), store, range(len(store)))


def test_stores_that_differ_are_not_merged(tmp_path: Path, store: Store) -> None:
    select(store, tmp_path / "cut", top=3)
    with pytest.raises(MismatchError, match="k was 8, now 3"):
        merge([tmp_path / "s", tmp_path / "cut"], tmp_path / "both")


def test_columns_are_joined_by_sample(tmp_path: Path, store: Store) -> None:
    select(store, tmp_path / "poor", columns=[])
    select(store, tmp_path / "b", shards="1:3", columns=["hidden.1"])
    select(store, tmp_path / "a", shards="0", columns=["hidden.1"])
    merge([tmp_path / "b", tmp_path / "a"], tmp_path / "shuffled")  # the same samples in another order
    add(tmp_path / "poor", tmp_path / "shuffled", tmp_path / "rich", columns={"hidden.1": "hidden.other_1"})
    rich = open_store(tmp_path / "rich")
    assert check(rich) == []
    for one, other in zip(rich, store, strict=True):
        assert one.id == other.id
        assert np.array_equal(one.hidden["other_1"], other.hidden["1"])
    with pytest.raises(ConfigError, match=r"no features 'hidden\.9'"):
        add(tmp_path / "poor", tmp_path / "s", tmp_path / "x", columns={"hidden.9": "hidden.9"})
    with pytest.raises(ConfigError, match="cannot be called"):
        add(tmp_path / "s", tmp_path / "s", tmp_path / "x", columns={"hidden.1": "hidden.final"})
    with pytest.raises(MismatchError, match="has no sample"):
        add(tmp_path / "poor", tmp_path / "a", tmp_path / "x", columns={"hidden.1": "hidden.1"})
    tiny.write_store(tmp_path / "foreign", rows=ROWS, kept=COMPACT, hidden={"1": 4}, seed=5)
    with pytest.raises(MismatchError, match="other tokens"):
        add(tmp_path / "poor", tmp_path / "foreign", tmp_path / "x", columns={"hidden.1": "hidden.1"})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"columns": ["hidden.7"]}, "no column 'hidden.7'"),
        ({"top": 9}, "9 entries cannot be kept of 8"),
        ({"shards": "2:9"}, "not within 0:3"),
        ({"samples": "five"}, "not a range"),
        ({"samples": "3:3"}, "not within"),
    ],
)
def test_what_cannot_be_selected_says_so(tmp_path: Path, store: Store, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        select(store, tmp_path / "x", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_the_commands_work(tmp_path: Path, store: Store) -> None:
    def run(*arguments: str) -> dict[str, object]:
        done = CliRunner().invoke(app, [*arguments, "--json", "-q"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    folder = str(tmp_path / "s")
    assert run("select", folder, "--out", str(tmp_path / "a"), "--samples", "0:3", "--columns", "")["samples"] == 3
    assert run("select", folder, "--out", str(tmp_path / "b"), "--samples", "3:7", "--columns", "")["samples"] == 4
    merged = run("merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c"))
    assert merged["positions"] == store.num_positions
    line = ["add", str(tmp_path / "c"), folder, "--columns", "hidden.1", "--columns", "hidden.final=hidden.last"]
    assert run(*line, "--out", str(tmp_path / "d"))["samples"] == 7
    assert {"hidden.1", "hidden.last"} <= set(open_store(tmp_path / "d").columns)
