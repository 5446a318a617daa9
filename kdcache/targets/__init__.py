"""The compact teacher distribution: its numbers and their exact maths, in numpy.

Legend: `N` positions, `K` kept entries, `M` tail draws, `J` log-partition nodes, `V` vocabulary.

A teacher's row of V logits `z` is kept as its K largest (the head), eight numbers that give the tail's
log-partition at any temperature, the label's logit and, optionally, M ids drawn from the tail. None of them
depends on a temperature: `T` is an argument of the methods. `kdcache.targets.tensor` has the same on torch.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.targets.log_partition import AT_ONE, NODES, interpolate, nodes_of

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a teacher said at N positions.

    Methods compute and return float64, whatever the stored dtype; logits and log-partitions are in nats.

    Attributes:
        ids: int32 [N, K], vocabulary ids of the head by descending logit, ties by lower id.
        logits: float32 [N, K], the raw logits of those ids: no temperature, no normalisation.
        tail: float32 [N, J], the tail's log-partition at `log_partition.NODES` minus `b * logits[:, -1]`;
            minus infinity where K = V. [N, 1], at b = 1 alone, where the teacher only told log-probabilities.
        label_logit: float32 [N], the raw logit of the label, inside the head or not; NaN where it was not told.
        vocab_size: V, the length of the teacher's row.
        draw_ids: int32 [N, M], ids drawn from the tail with replacement, or None.
        draw_logits: float32 [N, M], their raw logits, or None.
    """

    ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    tail: NDArray[np.float32]
    label_logit: NDArray[np.float32]
    vocab_size: int
    draw_ids: NDArray[np.int32] | None = None
    draw_logits: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Targets":
        """Return the targets of a run of positions; arrays are views."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        cut: dict[str, Any] = {n: v[rows] if isinstance(v, np.ndarray) else v for n, v in values.items()}
        return Targets(**cut)

    @property
    def k(self) -> int:
        """K, the number of kept entries."""
        return int(self.ids.shape[1])

    @property
    def any_temperature(self) -> bool:
        """Whether the tail is known at every temperature, and not at T = 1 alone."""
        return bool(self.tail.shape[1] != len(AT_ONE))

    def narrow(self, k: int) -> "Targets":
        """Return the targets with only the k largest kept: the others join the tail, as if they had been captured so.

        The tail's node values are those of a capture with this k, up to the stored ones' rounding.

        Raises:
            ValueError: There are fewer than k entries, or tail draws, which would not be of the longer tail.
        """
        if not 1 <= k <= self.k:
            raise ValueError(f"{k} entries cannot be kept of {self.k}")
        if k == self.k:
            return self
        if self.draw_ids is not None:
            raise ValueError("targets with tail draws cannot be narrowed: the draws are of the shorter tail")
        nodes = np.asarray(nodes_of(self.tail.shape[1]))
        b = nodes[:, None]
        z = self.logits[:, None, k - 1 :].astype(np.float64)
        dropped = b * (z[..., 1:] - z[..., :1])
        tail = self.tail + nodes * (z[:, :, -1] - z[:, :, 0])
        joined = np.logaddexp.reduce(np.concatenate([dropped, tail[..., None]], axis=2), axis=2).astype(np.float32)
        return replace(self, ids=self.ids[:, :k], logits=self.logits[:, :k], tail=joined)

    def tail_log_partition(self, temperature: float) -> Float:
        """Return log sum over the tail of exp(z / T) [N]; minus infinity where the tail is empty.

        Raises:
            ValueError: The temperature is not a positive finite number.
            MismatchError: The tail is known at T = 1 only, and this is another.
        """
        b = inverse(temperature)
        lowest = self.logits[:, -1].astype(np.float64)
        return interpolate(self.tail, self.vocab_size - self.k, b) + b * lowest

    def log_partition(self, temperature: float) -> Float:
        """Return log sum over the whole vocabulary of exp(z / T) [N]: head summed, tail interpolated."""
        scaled = self.logits.astype(np.float64) * inverse(temperature)
        top = scaled[:, :1]
        head = top[:, 0] + np.log(np.exp(scaled - top).sum(axis=1))
        whole: Float = np.logaddexp(head, self.tail_log_partition(temperature))
        return whole

    def tail_mass(self, temperature: float) -> Float:
        """Return the probability [N] of all ids outside the head together, at T."""
        return np.exp(self.tail_log_partition(temperature) - self.log_partition(temperature))

    def probabilities(self, temperature: float) -> Float:
        """Return the full-vocabulary softmax at T of the kept ids [N, K]; a row sums to 1 - tail mass."""
        scaled = self.logits.astype(np.float64) * inverse(temperature)
        return np.exp(scaled - self.log_partition(temperature)[:, None])

    def label_log_probability(self, temperature: float = 1.0) -> Float:
        """Return log p(label) [N] at T in nats; its negative mean is the teacher's own loss."""
        return self.label_logit.astype(np.float64) * inverse(temperature) - self.log_partition(temperature)

    def draw_log_proposal(self) -> Float:
        """Return the log-probability [N, M] with which each draw was drawn.

        The proposal is the half-half mixture of the tail's softmax at T = 1 and at T = 2: drawing at T = 1
        alone makes importance weights explode at higher temperatures.

        Raises:
            ValueError: The targets hold no draws.
        """
        if self.draw_logits is None:
            raise ValueError("these targets hold no tail draws")
        z = self.draw_logits.astype(np.float64)
        at_one = z - self.tail_log_partition(1.0)[:, None]
        at_two = z / 2 - self.tail_log_partition(2.0)[:, None]
        mixture: Float = np.logaddexp(at_one, at_two) - math.log(2)
        return mixture

    def draw_weights(self, temperature: float) -> Float:
        """Return p_T(draw) / (M * proposal(draw)) [N, M].

        For any function f, the sum over the draws of weight * f(id) is an unbiased estimate of the sum over
        the tail of p_T(id) f(id) (importance sampling).

        Raises:
            ValueError: The targets hold no draws.
        """
        log_proposal = self.draw_log_proposal()
        assert self.draw_logits is not None  # draw_log_proposal has refused targets without draws
        scaled = self.draw_logits.astype(np.float64) * inverse(temperature)
        log_p = scaled - self.log_partition(temperature)[:, None]
        weights: Float = np.exp(log_p - log_proposal) / self.draw_logits.shape[1]
        return weights


def inverse(temperature: float) -> float:
    """Return b = 1/T.

    Raises:
        ValueError: The temperature is not a positive finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"a temperature is a positive finite number, not {temperature}")
    return 1 / temperature


__all__ = ["NODES", "Targets", "inverse"]
