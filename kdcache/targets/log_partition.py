"""The tail's log-partition at any temperature from eight numbers a position.

Legend: `N` positions, `J` nodes, `K` kept entries, `V` vocabulary, `b = 1/T` inverse temperature.

With the tail `R` (every id that is not kept) and the smallest kept logit `z_K`, the function

    u(b) = log sum_{i in R} exp(b z_i) - b z_K

is smooth, convex and non-increasing in `b` (it is a log-sum-exp of the non-positive `z_i - z_K`), and
`u(0) = log(V - K)`. A store keeps it at the J = 8 `NODES`. Between them it is the polynomial through all
nodes and `b = 0` in the variable `x = b / (1 + b)`, which maps `[0, inf)` to `[0, 1)` and keeps the
interpolation tame on both sides. Interpolation is linear in the stored numbers, so numpy and torch share one
vector of weights. Beyond the last node (T < 0.5) the result is held between the two bounds that convexity
and monotony give. docs/decisions/0002-log-partition.md has the measurements behind each choice.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import MismatchError

NODES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Inverse temperatures of the stored values: T = 8, 4, 2.67, 2, 1.33, 1, 0.67, 0.5."""

AT_ONE = (1.0,)
"""The only node of targets made from log-probabilities at T = 1: all that is known of their tail."""

STEP = 1 / 1024
"""Quantum of a stored value, in nats: rounding moves a tail mass by at most 1.3e-4."""

EMPTY = -32768
"""Stored in place of minus infinity: the tail holds no id (K = V)."""

LIMIT = 32767 * STEP
"""Largest magnitude of a stored value, in nats; a tail 32 nats below the last kept entry is held there."""


def nodes_of(width: int) -> tuple[float, ...]:
    """Return the inverse temperatures of tail values of this width, J or 1.

    Raises:
        ValueError: No targets have such a width.
    """
    for nodes in (NODES, AT_ONE):
        if len(nodes) == width:
            return nodes
    raise ValueError(f"a tail has {len(NODES)} or {len(AT_ONE)} values a position, not {width}")


def require_at_one(inverse_temperature: float) -> None:
    """Refuse any temperature but 1, for a tail of which no more is known.

    Raises:
        MismatchError: It is another.
    """
    if inverse_temperature != 1:
        raise MismatchError(
            f"The teacher's tail is known at T = 1 only, and T = {1 / inverse_temperature:g} is asked for.",
            hint="Set the temperature to 1, or the tail policy to renormalise (biased).",
        )


def quantise(tail: NDArray[np.floating]) -> NDArray[np.int16]:
    """Return tail values [N, J] in nats as int16 multiples of `STEP`, minus infinity as `EMPTY`.

    Values beyond `LIMIT` are held there.

    Raises:
        ValueError: A value is NaN or plus infinity.
    """
    if np.isnan(tail).any() or np.isposinf(tail).any():
        raise ValueError("a tail log-partition is NaN or infinite")
    steps = np.rint(np.clip(tail, -LIMIT, LIMIT) / STEP).astype(np.int16)
    return np.where(np.isneginf(tail), np.int16(EMPTY), steps)


def dequantise(steps: NDArray[np.int16]) -> NDArray[np.float32]:
    """Return the float32 values in nats that `quantise` stored."""
    return np.where(steps == EMPTY, np.float32(-np.inf), steps.astype(np.float32) * np.float32(STEP))


@cache
def interpolation_weights(inverse_temperature: float) -> tuple[float, ...]:
    """Return the J + 1 weights of (log(V - K), u at each node) that sum to u(b), in float64.

    Lagrange's form in `x = b / (1 + b)`; exact at `b = 0` and at every node.

    Raises:
        ValueError: The inverse temperature is negative, NaN or infinite.
    """
    if not (math.isfinite(inverse_temperature) and inverse_temperature >= 0):
        raise ValueError(f"a temperature must be positive, so 1/T finite; got 1/T = {inverse_temperature}")
    knots = [node / (1 + node) for node in (0.0, *NODES)]
    x = inverse_temperature / (1 + inverse_temperature)
    return tuple(math.prod((x - other) / (knot - other) for other in knots if other != knot) for knot in knots)


def interpolate(tail: NDArray[np.floating], tail_size: int, inverse_temperature: float) -> NDArray[np.float64]:
    """Return u(b) [N] in nats (float64) from its node values [N, J].

    Args:
        tail: Values at `NODES`, or [N, 1] at b = 1; a row of minus infinity is an empty tail and gives minus infinity.
        tail_size: V - K, the number of ids outside the head.
        inverse_temperature: b = 1/T, finite and not negative.

    Raises:
        MismatchError: The tail is known at T = 1 only, and b is not 1.
    """
    if tail_size == 0:
        return np.full(len(tail), -np.inf)
    if nodes_of(tail.shape[1]) == AT_ONE:
        require_at_one(inverse_temperature)
        return tail[:, 0].astype(np.float64)
    weights = np.asarray(interpolation_weights(inverse_temperature))
    empty = np.isneginf(tail[:, 0])
    values = np.where(empty[:, None], 0.0, tail.astype(np.float64))
    u = values @ weights[1:] + weights[0] * math.log(tail_size)
    if inverse_temperature > NODES[-1]:
        slope = (values[:, -1] - values[:, -2]) / (NODES[-1] - NODES[-2])
        u = np.clip(u, values[:, -1] + slope * (inverse_temperature - NODES[-1]), values[:, -1])
    return np.where(empty, -np.inf, u)
