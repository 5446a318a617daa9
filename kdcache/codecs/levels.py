"""`levels`: logits as whole steps below their row's maximum, coded as differences along the row.

Entry i is the whole number round((m - z_i) * steps_per_nat) with m the row's maximum, which is kept as it is: the
largest probability is exact and the others err by half a step. Logits of a bfloat16 teacher lie on a coarse grid, so
fine steps cost them nearly nothing. Minus infinity (a masked id) has the code 65535.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts

MASKED = 65535
LARGEST = 65534

ROWS = 2048
"""Rows encoded at a time: what float64 takes stays in a cache."""


@dataclass(frozen=True, slots=True)
class Levels:
    """Store logits [N, K] with an absolute error of half a step; small where they descend.

    Attributes:
        steps_per_nat: A probability at temperature T errs by at most exp(1 / (2 * steps_per_nat * T)) - 1.
    """

    name: ClassVar[str] = "levels"
    steps_per_nat: int = 128

    def __post_init__(self) -> None:
        if type(self.steps_per_nat) is not int or not 1 <= self.steps_per_nat <= 4096:
            raise TypeError("steps_per_nat is a whole number of 1 to 4096")

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {
            "": Part("uint8", shape, compressor="bitshuffle"),
            "high": Part("uint8", shape, compressor="fast"),
            "max": Part("float32", (), compressor="shuffle"),
        }

    def encode(self, values: Array) -> Parts:
        layout = self.parts(values.shape[1:])
        parts = {name: np.empty((len(values), *part.shape), dtype=part.dtype) for name, part in layout.items()}
        for start in range(0, len(values), ROWS):
            rows = slice(start, start + ROWS)
            codes, parts["max"][rows] = self._codes(values[rows].astype(np.float64))
            gaps = np.diff(codes, axis=1, prepend=np.uint16(0))
            parts[""][rows] = gaps & 255
            parts["high"][rows] = gaps >> 8
        return parts

    def _codes(self, logits: Array) -> tuple[Array, Array]:
        """Return the steps below a row's largest, and that."""
        if np.isnan(logits).any() or np.isposinf(logits).any():
            raise ValueError("the codec 'levels' cannot keep NaN or plus infinity")
        top = logits.max(axis=1)
        if np.isneginf(top).any():
            raise ValueError("a row has no finite logit")
        top = top.astype(np.float32)
        below = (top.astype(np.float64)[:, None] - logits) * self.steps_per_nat
        masked = np.isinf(below)
        steps = np.rint(np.where(masked, 0.0, below)).clip(0)
        if steps.max() > LARGEST:
            raise ValueError(f"a row spans more than {LARGEST / self.steps_per_nat:,.0f} nats")
        return np.where(masked, MASKED, steps).astype(np.uint16), top

    def decode(self, parts: Parts) -> Array:
        gaps: Array = parts[""]
        if parts["high"].any():
            gaps = parts["high"].astype(np.uint16)
            gaps <<= 8
            gaps |= parts[""]
        codes = np.cumsum(gaps, axis=1, dtype=np.uint16)
        values: Array = np.multiply(codes, np.float32(-1 / self.steps_per_nat), dtype=np.float32)
        values += parts["max"][:, None]
        if codes.size and codes.max() == MASKED:
            values[codes == MASKED] = -np.inf
        return values


plugin = Levels
