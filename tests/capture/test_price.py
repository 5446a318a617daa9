"""What a capture takes is said before the teacher runs over the data, and is what the store then holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from kdcache.capture import CapturePlan, CaptureProgress, capture, plan_capture
from kdcache.capture.config import CaptureConfig, StoreConfig
from kdcache.cli import app
from kdcache.codecs import Codec
from kdcache.config import parse_config
from kdcache.examples import write_examples
from kdcache.store import Store, open_store
from tests import tiny

HIDDEN = [{"layer": "1", "dtype": "int8"}, {"layer": "2", "keep": "pooled"}]


def part_bytes(store: Store, name: str) -> int:
    """What a column's parts take as arrays, shard by shard."""
    codec: Codec = store.columns[name].build()
    return sum(
        part.nbytes
        for index in range(len(store.shards))
        for part in codec.encode(store.read_shard(index, [name]).columns[name]).values()
    )


def by_name(plan: CapturePlan) -> dict[str, Any]:
    return {one.name: one for one in plan.columns}


def test_the_price_of_text_is_what_the_columns_take(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, hidden=HIDDEN, draws=2, exact=True)
    config = parse_config(CaptureConfig, tree)
    planned = plan_capture(config)
    seen: list[Any] = []
    result = capture(config, tmp_path / "s", progress=seen.append)
    stages = [type(one) for one in seen]
    assert stages.index(CapturePlan) < stages.index(CaptureProgress)
    assert planned == result.plan == seen[stages.index(CapturePlan)]
    store = open_store(tmp_path / "s")
    assert (planned.samples, planned.rows, planned.shards) == (len(store), store.num_positions, len(store.shards))
    prices = by_name(planned)
    for name in ("input_ids", "labels", "head_logits", "tail_log_partition", "draw_logits", "hidden.1", "hidden.final"):
        assert prices[name].bytes == part_bytes(store, name), name
    assert (prices["hidden.2"].per, prices["hidden.2"].bytes) == ("sample", 16 * 4 * len(store))
    head = store.output_head()
    assert head is not None
    assert prices["output_head"].bytes == head.weight.size * (2 if head.codec == "bfloat16" else 4)
    assert planned.bytes == sum(one.bytes for one in planned.columns)
    assert planned.feature_bytes == sum(one.bytes for one in planned.columns if one.name.startswith("hidden."))
    assert capture(config, tmp_path / "s").plan is None


@pytest.mark.parametrize(("hidden", "warned"), [([], False), (["final", "1", "2", "embedding"], True)])
def test_features_that_outweigh_the_targets_are_warned_of(hidden: list[str], warned: bool, tmp_path: Path) -> None:
    plan = plan_capture(parse_config(CaptureConfig, tiny.capture_tree(tmp_path, hidden=hidden, k=2)))
    assert bool(plan.notes) == warned
    assert (plan.feature_bytes > plan.bytes - plan.feature_bytes) == warned


def test_what_shards_have_room_for_is_counted_where_it_is_written(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, hidden=["final"])
    positions = plan_capture(parse_config(CaptureConfig, tree)).rows
    # two shards, the second nearly empty
    tree["store"] = {"shard_positions": positions - 2, "chunk_positions": positions - 2}
    config = parse_config(CaptureConfig, tree)
    plan = plan_capture(config)
    capture(config, tmp_path / "s")
    assert plan.shards == 2
    written = open_store(tmp_path / "s").bytes_per_column()["hidden.final"]
    assert by_name(plan)["hidden.final"].bytes == pytest.approx(written, abs=1200)  # and what names and ends them
    assert by_name(plan)["hidden.final"].bytes > 1.8 * 2 * 16 * positions


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, (1, 1)), (17, (18, 9)), (40, (42, 14)), (63, (64, 16)), (64, (64, 16))]
)
def test_an_only_shard_is_as_small_as_its_positions(rows: int, expected: tuple[int, int]) -> None:
    config = StoreConfig(shard_positions=64, chunk_positions=16)
    assert config.rows(rows) == expected
    assert config.rows(1000) == (64, 16)


def test_a_small_store_takes_what_its_positions_take(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, hidden=["final"])
    tree["store"] = {"shard_positions": 65536, "chunk_positions": 4096}
    config = parse_config(CaptureConfig, tree)
    plan = plan_capture(config)
    capture(config, tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert (store.manifest.shard_rows, store.manifest.chunk_rows) == (plan.rows, plan.rows)
    assert store.bytes_per_column()["hidden.final"] < 2 * 16 * plan.rows + 1200  # of names and ends


def test_a_budget_settles_k_in_a_plan_too(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    tree["targets"] = {"bytes_per_position": 40}
    config = parse_config(CaptureConfig, tree)
    assert plan_capture(config).k == capture(config, tmp_path / "s").k


def attention(input_ids: Any) -> Any:
    import torch

    class Said(dict[str, Any]):
        attentions = (torch.zeros(len(input_ids), 2, 6, 6),)

    return Said(logits=torch.zeros(len(input_ids), 6, 3) + input_ids[..., None])


def tagger(input_ids: Any, output_attentions: bool = False) -> Any:
    return attention(input_ids)


def test_the_price_of_examples_counts_every_token_and_map(tmp_path: Path) -> None:
    ids = np.arange(60).reshape(10, 6)
    label = np.where(ids % 3 == 0, 1, -100)
    write_examples(tmp_path / "ex", input_ids=ids, label=label)
    tree = {
        "examples": {"path": str(tmp_path / "ex"), "features": [{"name": "map", "tap": "attentions.0"}]},
        "teacher": {"model": "tests.capture.test_price:tagger", "device": "cpu"},
        "store": {"shard_positions": 20, "chunk_positions": 20},
    }
    plan = plan_capture(parse_config(CaptureConfig, tree))
    assert (plan.row, plan.samples, plan.rows) == ("token", 10, 20)
    found = by_name(plan)["hidden.map"]
    assert (found.shape, found.entry_bytes, found.bytes) == ((2, 6, 6), 2 * 6 * 6 * 2, 20 * 144)
    assert "2.0 times" in plan.notes[-1]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path, hidden=["final", "1"], k=2)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    before = sorted(tmp_path.rglob("*"))
    line = ["capture", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "s")]
    done = CliRunner().invoke(app, [*line, "--dry-run", "-q"])
    assert done.exit_code == 0, done.output
    assert "before compression" in done.stdout
    assert "hidden.final" in done.stdout
    assert "times what all else does" in done.stdout.replace("\n", " ")
    plan = json.loads(CliRunner().invoke(app, [*line, "--dry-run", "-q", "--json"]).stdout)
    assert sorted(tmp_path.rglob("*")) == before
    done = CliRunner().invoke(app, [*line, "--json"])
    assert json.loads(done.stdout)["plan"] == plan
    assert "before compression" in done.stderr
    assert CliRunner().invoke(app, [*line, "-q"]).stderr == ""
