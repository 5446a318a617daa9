"""Unpacking a few rows with torch gives what the codec gives, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs import KNOWN, codec
from kdcache.unpack import PackedColumn, RankTable, unpack
from tests.codecs.test_codecs import example, sorted_logits

PACKED = [name for name in KNOWN if name != "int8"]  # its scale is a shard's, not a row's


@pytest.mark.parametrize("name", PACKED)
def test_any_rows_are_unpacked_as_the_codec_decodes_them(name: str) -> None:
    made = codec(name)
    parts = made.encode(example(name))
    for rows in (slice(None), [3, 3, 0], []):
        some = {part: np.ascontiguousarray(values[rows]) for part, values in parts.items()}
        found = unpack(made, some)
        expected = made.decode(some)
        assert np.array_equal(found.numpy(), expected.astype(np.int32) if expected.dtype == np.uint16 else expected)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 128, 1000]))
def test_levels_of_wide_and_masked_rows_are_the_same(seed: int, steps: int) -> None:
    made = codec("levels", {"steps_per_nat": steps})
    values = sorted_logits(9, 6, seed)
    values[0, 3:] = -np.inf
    parts = made.encode(values)
    assert np.array_equal(unpack(made, parts).numpy(), made.decode(parts))


@pytest.mark.parametrize("differences", [0, 2])
def test_empty_tails_stay_empty(differences: int) -> None:
    made = codec("log_partition", {"differences": differences})
    values = np.random.default_rng(0).uniform(-40, 40, (5, 8)).astype(np.float32)
    values[2] = -np.inf
    parts = made.encode(values)
    found = unpack(made, parts)
    assert np.array_equal(found.numpy(), made.decode(parts))
    assert torch.isneginf(found[2]).all()


@pytest.mark.parametrize("name", PACKED)
def test_what_travels_packed_is_unpacked_to_the_same_values(name: str) -> None:
    made = codec(name)
    parts = made.encode(example(name))
    ids = torch.randperm(70000, dtype=torch.int32)
    for rows in (slice(None), slice(1, 2), slice(0, 0)):
        some = {part: np.ascontiguousarray(values[rows]) for part, values in parts.items()}
        found = PackedColumn.of(made, some, RankTable(ids)).each(lambda part: part.clone()).unpacked()
        expected = unpack(made, some)
        if name == "ranked":
            expected = ids[expected.long()]
        assert torch.equal(found.to(expected.dtype), expected)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 128, 1000]))
def test_wide_and_masked_levels_travel_too(seed: int, steps: int) -> None:
    made = codec("levels", {"steps_per_nat": steps})
    values = sorted_logits(9, 6, seed)
    values[0, 3:] = -np.inf
    parts = made.encode(values)
    assert torch.equal(PackedColumn.of(made, parts, RankTable(torch.zeros(0))).unpacked(), unpack(made, parts))


@pytest.mark.parametrize("differences", [0, 2])
def test_empty_tails_travel_too(differences: int) -> None:
    made = codec("log_partition", {"differences": differences})
    values = np.random.default_rng(0).uniform(-40, 40, (5, 8)).astype(np.float32)
    values[2] = -np.inf
    parts = made.encode(values)
    assert torch.equal(PackedColumn.of(made, parts, RankTable(torch.zeros(0))).unpacked(), unpack(made, parts))


def test_the_zero_plane_of_levels_does_not_travel() -> None:
    made = codec("levels", {"steps_per_nat": 8})
    small = made.encode(np.sort(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))[:, ::-1])
    column = PackedColumn.of(made, small, RankTable(torch.zeros(0)))
    assert "high" not in column.parts
    assert column.parts[""].element_size() == 1
