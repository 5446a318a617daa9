"""The tail's log-partition against float64 sums over the whole vocabulary."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.targets.log_partition import (
    EMPTY,
    LIMIT,
    NODES,
    STEP,
    dequantise,
    interpolate,
    interpolation_weights,
    quantise,
)
from tests.targets.dense import compact, language_like_rows, logsumexp


def test_quantise_errs_by_half_a_step_and_keeps_empty_tails() -> None:
    values = np.random.default_rng(0).uniform(-LIMIT, LIMIT, (100, 8)).astype(np.float32)
    values[7] = -np.inf
    steps = quantise(values)
    assert (steps[7] == EMPTY).all()
    back = dequantise(steps)
    assert np.isneginf(back[7]).all()
    rest = np.arange(100) != 7
    assert np.abs(back[rest] - values[rest]).max() <= STEP / 2 + 1e-6


def test_quantise_holds_far_values_at_the_limit_and_refuses_nan() -> None:
    assert dequantise(quantise(np.array([[-400.0, 400.0]]))).tolist() == [[-LIMIT, LIMIT]]
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantise(np.array([[bad]]))


@pytest.mark.parametrize("node", range(8))
def test_interpolation_is_exact_at_every_node(node: int) -> None:
    weights = interpolation_weights(NODES[node])
    assert weights[node + 1] == pytest.approx(1.0)
    assert sum(abs(w) for i, w in enumerate(weights) if i != node + 1) < 1e-12


@given(st.floats(0, 1e6))
def test_weights_sum_to_one_at_any_temperature(inverse_temperature: float) -> None:
    assert sum(interpolation_weights(inverse_temperature)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_impossible_temperatures_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        interpolation_weights(bad)


@given(st.floats(2.0, 500.0), st.integers(0, 50))
def test_below_half_temperature_the_value_stays_between_its_convex_bounds(b: float, seed: int) -> None:
    logits = language_like_rows(4, 300, seed)
    targets = compact(logits, 16)
    u = interpolate(targets.tail, 300 - 16, b)
    last, before = targets.tail[:, -1].astype(float), targets.tail[:, -2].astype(float)
    assert (u <= last + 1e-6).all()
    assert (u >= last + (last - before) / 0.5 * (b - 2.0) - 1e-6).all()


@pytest.mark.parametrize("temperature", [0.3, 0.5, 0.6, 0.7, 0.85, 1, 1.2, 1.5, 1.75, 2, 3, 5, 8, 15, 100])
def test_log_partition_of_language_like_rows_is_right_at_any_temperature(temperature: float) -> None:
    logits = language_like_rows(200, 5000, 1)
    targets = compact(logits, 64)
    dense = logsumexp(logits / temperature)
    assert np.abs(targets.log_partition(temperature) - dense).max() < 0.02
    order = np.argsort(-logits, axis=1, kind="stable")
    tail = np.take_along_axis(logits, order[:, 64:], axis=1)
    mass = np.exp(logsumexp(tail / temperature) - dense)
    error = np.abs(targets.tail_mass(temperature) - mass)
    assert error.mean() < 2e-4
    assert error.max() < 2e-3


@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]))
def test_at_node_temperatures_it_is_exact_whatever_the_rows(k: int, seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_cauchy((5, 40)).clip(-60, 60) * rng.uniform(0.1, 1)).astype(np.float32)
    targets = compact(logits.astype(np.float64), k)
    dense = logsumexp(logits.astype(np.float64) / temperature)
    assert np.allclose(targets.log_partition(temperature), dense, atol=2e-5)
