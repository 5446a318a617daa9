"""Every codec: its error bound, its odd cases, and its parameters through JSON."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.codecs import KNOWN, Array, codec, parameters
from kdcache.codecs.integer import narrowest
from kdcache.errors import UnsupportedError


def sorted_logits(rows: int, k: int, seed: int, spread: float = 1.0) -> Array:
    random = np.random.default_rng(seed)
    return -np.sort(-random.normal(0, spread, (rows, k)) * random.uniform(0.1, 8, (rows, 1)), axis=1)


def through(name: str, values: Array, **options: int) -> Array:
    """Encode with one object, decode with another that was rebuilt from JSON."""
    first = codec(name, options)
    parts = first.encode(values)
    for part, layout in first.parts(values.shape[1:]).items():
        entries = len(values) if layout.per == "row" else 1
        assert parts[part].dtype == np.dtype(layout.dtype)
        assert parts[part].shape == (entries, *layout.shape)
    second = codec(name, json.loads(json.dumps(parameters(first))))
    decoded = second.decode(parts)
    assert decoded.dtype == np.dtype(second.dtype)
    assert decoded.shape == values.shape
    return decoded


def example(name: str, rows: int = 20) -> Array:
    if name in ("integer", "ranked"):
        return np.random.default_rng(0).integers(0, 60000, (rows, 8))
    if name == "log_partition":
        return np.random.default_rng(0).uniform(-20, 12, (rows, 8)).astype(np.float32)
    return sorted_logits(rows, 8, 0).astype(np.float32)


@pytest.mark.parametrize("name", KNOWN)
def test_one_row_no_rows_and_strided_rows_round_trip(name: str) -> None:
    values = example(name)
    whole = through(name, values)
    assert np.array_equal(through(name, values[::2].copy()[:1]), whole[:1]) or name == "int8"
    assert through(name, values[:0]).shape == (0, 8)
    assert np.array_equal(through(name, np.asfortranarray(values)), whole)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_integers_are_exact_in_their_range_and_refused_outside(bits: int) -> None:
    values = np.array([[0, 1, (1 << bits) - 1]])
    assert np.array_equal(through("integer", values, bits=bits), values)
    for bad in (-1, 1 << bits):
        with pytest.raises(ValueError, match="outside"):
            codec("integer", {"bits": bits}).encode(np.array([bad]))


@pytest.mark.parametrize(("count", "bits"), [(256, 8), (257, 16), (65536, 16), (65537, 32)])
def test_the_narrowest_integer_holds_every_id(count: int, bits: int) -> None:
    assert narrowest(count).bits == bits


def test_float32_is_exact_even_for_nan_and_infinity() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -0.0, 1e-45]], dtype=np.float32)
    assert through("float32", values).tobytes() == values.tobytes()


@given(st.integers(0, 1000))
def test_float16_and_bfloat16_round_within_their_precision(seed: int) -> None:
    values = sorted_logits(10, 16, seed).astype(np.float32)
    assert np.all(np.abs(through("float16", values) - values) <= np.abs(values) * 2**-11 + 1e-7)
    assert np.all(np.abs(through("bfloat16", values) - values) <= np.abs(values) * 2**-8)


def test_bfloat16_rounds_as_torch_does() -> None:
    import torch

    values = np.random.default_rng(0).normal(0, 100, 4096).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(through("bfloat16", values), expected)


def test_int8_features_keep_their_direction() -> None:
    values = np.random.default_rng(0).normal(0, 1, (500, 64)).astype(np.float32) * np.linspace(0.1, 30, 64)
    decoded = through("int8", values.astype(np.float32))
    cosine = (decoded * values).sum(1) / np.linalg.norm(decoded, axis=1) / np.linalg.norm(values, axis=1)
    assert cosine.min() > 0.999
    assert (np.abs(decoded - values).max(0) <= np.abs(values).max(0) / 254 + 1e-6).all()
    assert (through("int8", np.zeros((3, 4), dtype=np.float32)) == 0).all()


@given(st.integers(0, 1000))
def test_steps16_errs_by_half_a_step(seed: int) -> None:
    values = sorted_logits(20, 32, seed).astype(np.float32)
    assert np.abs(through("steps16", values) - values).max() <= 1 / 2048 + 1e-5


def test_steps16_widens_its_step_for_rows_of_a_large_span_and_keeps_masked_ids() -> None:
    values = np.array([[500.0, 100.0, -np.inf], [3.0, 2.0, 1.0]], dtype=np.float32)
    decoded = through("steps16", values)
    assert np.abs(decoded[0, :2] - values[0, :2]).max() <= 8 / 2048 + 1e-4
    assert np.isneginf(decoded[0, 2])
    assert np.abs(decoded[1] - values[1]).max() <= 1 / 2048
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or plus infinity"):
            codec("steps16").encode(np.array([[1.0, bad]]))


@given(st.integers(0, 1000))
def test_steps8_errs_by_half_the_rows_step_and_errors_do_not_add_up(seed: int) -> None:
    values = sorted_logits(20, 64, seed).astype(np.float32)
    parts = codec("steps8").encode(values)
    error = np.abs(through("steps8", values) - values)
    bound = parts["step"].astype(np.float32)[:, None] * 0.501 + parts["gap"].astype(np.float32)[:, None] * 2**-10 + 1e-5
    assert (error <= bound).all()
    assert (np.diff(through("steps8", values), axis=1) <= 0).all()


def test_steps8_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="descending"):
        codec("steps8").encode(np.array([[1.0, 2.0, 0.0, -1.0]]))
    with pytest.raises(ValueError, match="at least 2"):
        codec("steps8").parts((1,))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8", "steps8"])
def test_lossy_codecs_refuse_what_is_not_finite(name: str) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec(name).encode(np.array([[np.nan, 1.0, 0.5, 0.0]], dtype=np.float32))


@pytest.mark.parametrize("name", ["pickle", "zlib", "__init__", "../x"])
def test_unknown_codecs_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match="does not know the codec"):
        codec(name)


def test_foreign_parameters_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="other parameters"):
        codec("integer", {"path": "x"})


@given(st.integers(1, 1 << 24), st.integers(0, 2**32 - 1))
def test_ranks_are_exact_whatever_the_vocabulary(size: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, size, (7, 5))
    values[0, :2] = 0, size - 1
    assert np.array_equal(through("ranked", values, vocab_size=size), values)


@pytest.mark.parametrize("value", [-1, 300])
def test_a_rank_outside_the_vocabulary_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="outside 0 to 299"):
        codec("ranked", {"vocab_size": 300}).encode(np.array([[value]]))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 20, 128, 1024]))
def test_levels_err_by_half_a_step_and_keep_the_maximum(seed: int, steps: int) -> None:
    values = sorted_logits(12, 9, seed).astype(np.float32)
    found = through("levels", values, steps_per_nat=steps)
    assert np.array_equal(found[:, 0], values[:, 0])
    assert np.abs(found.astype(np.float64) - values).max() <= 0.5 / steps + 1e-5
    assert (np.diff(found, axis=1) <= 0).all()
    shuffled = np.random.default_rng(seed).permuted(values, axis=1)
    assert np.abs(through("levels", shuffled, steps_per_nat=steps) - shuffled).max() <= 0.5 / steps + 1e-5


def test_levels_keep_masked_ids_and_refuse_what_does_not_fit() -> None:
    values = np.array([[3.0, 1.0, -np.inf], [2.0, -np.inf, -np.inf]], dtype=np.float32)
    assert np.array_equal(through("levels", values), values)
    with pytest.raises(ValueError, match="spans more than 512 nats"):
        codec("levels").encode(np.array([[600.0, 0.0]]))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or plus infinity"):
            codec("levels").encode(np.array([[bad, 0.0]]))
    with pytest.raises(ValueError, match="no finite logit"):
        codec("levels").encode(np.array([[-np.inf, -np.inf]]))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_bits_are_exact_in_what_the_teacher_computed_in(seed: int, kind: str) -> None:
    coarse = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}[kind]
    values = codec(coarse).decode(codec(coarse).encode(sorted_logits(12, 9, seed).astype(np.float32)))
    values[0, 0], values[1, 3], values[2] = 0.0, -0.0, np.float32(-np.inf)
    if kind == "float32":
        values[3, 0] = np.nan
    found = through("bits", values, kind=kind)  # type: ignore[arg-type]
    assert np.array_equal(found.view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_bits_refuse_what_they_would_round(kind: str) -> None:
    with pytest.raises(ValueError, match=f"not exact in {kind}"):
        codec("bits", {"kind": kind}).encode(np.array([[1.0, np.float32(1 / 3)]]))


@given(st.integers(0, 2**32 - 1))
def test_second_differences_change_no_tail(seed: int) -> None:
    values = np.random.default_rng(seed).uniform(-40, 40, (6, 8)).astype(np.float32)
    values[0] = -np.inf
    assert np.array_equal(through("log_partition", values, differences=2), through("log_partition", values))


@pytest.mark.parametrize(
    ("name", "parameters_"),
    [
        ("ranked", {"vocab_size": 0}),
        ("ranked", {"vocab_size": "9"}),
        ("ranked", {"vocab_size": True}),
        ("levels", {"steps_per_nat": 0}),
        ("levels", {"steps_per_nat": 2.5}),
        ("bits", {"kind": "int8"}),
        ("log_partition", {"differences": 1}),
    ],
)
def test_impossible_parameters_are_refused(name: str, parameters_: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match="other parameters"):
        codec(name, parameters_)
