"""`steps16`: logits below their row's maximum in 16-bit steps, coded as differences along the row.

With m the row's maximum and s the row's step, entry i is the whole number round((m - z_i) / s), and what is
stored is its difference to the entry before (modulo 2**16): for sorted logits small numbers that compress well.
s is 2**e / 1024 with the smallest e that fits the row, so e = 0 and an error of at most 1/2048 nat unless
the row spans more than 64 nats. Minus infinity (a masked id) has the code 65535.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts

MASKED = 65535
LARGEST = 65534


@dataclass(frozen=True, slots=True)
class Steps16:
    """Store logits [N, K] with an absolute error of half a step: 1/2048 nat for rows within 64 nats."""

    name: ClassVar[str] = "steps16"

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {
            "": Part("uint16", shape, compressor="shuffle"),
            "max": Part("float32", (), compressor="shuffle"),
            "exponent": Part("uint8", ()),
        }

    def encode(self, values: Array) -> Parts:
        logits = values.astype(np.float64)
        if np.isnan(logits).any() or np.isposinf(logits).any():
            raise ValueError("the codec 'steps16' cannot keep NaN or plus infinity")
        top = logits.max(axis=1)
        if np.isneginf(top).any():
            raise ValueError("a row has no finite logit")
        top = top.astype(np.float32)
        below = top.astype(np.float64)[:, None] - logits
        span = np.where(np.isinf(below), 0.0, below).max(axis=1)
        with np.errstate(divide="ignore"):
            exponent = np.ceil(np.log2(span * 1024 / LARGEST)).clip(0, 255).astype(np.uint8)
        step = _step(exponent)
        codes = np.where(np.isinf(below), MASKED, np.rint(below / step).clip(0, LARGEST)).astype(np.uint16)
        differences = np.diff(codes, axis=1, prepend=np.uint16(0))
        return {"": differences.astype(np.uint16), "max": top, "exponent": exponent}

    def decode(self, parts: Parts) -> Array:
        codes = np.cumsum(parts[""], axis=1, dtype=np.uint16)
        step = _step(parts["exponent"]).astype(np.float32)
        values = parts["max"][:, None] - codes * step
        if (masked := codes == MASKED).any():
            values[masked] = -np.inf
        narrow: Array = values.astype(np.float32, copy=False)
        return narrow


def _step(exponent: Array) -> Array:
    step: Array = np.ldexp(1 / 1024, exponent.astype(np.int32))[:, None]
    return step


plugin = Steps16
