"""`bits`: logits to the last bit, as differences of ordered bit patterns along the row.

A float's bits, with the sign bit turned for positive values and all bits for negative ones, are whole numbers in the
floats' own order (a known property of IEEE 754), so descending logits have small positive differences.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts


@dataclass(frozen=True, slots=True)
class Bits:
    """Store logits [N, K] exactly, NaN and infinities included; small where they descend.

    Attributes:
        kind: bfloat16, float16 or float32: what the teacher computed in. A value it cannot hold is refused.
    """

    name: ClassVar[str] = "bits"
    kind: str = "float32"

    def __post_init__(self) -> None:
        if self.kind not in ("bfloat16", "float16", "float32"):
            raise TypeError("kind is bfloat16, float16 or float32")

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        width = "uint32" if self.kind == "float32" else "uint16"
        return {"": Part(width, shape, compressor="bitshuffle")}

    def encode(self, values: Array) -> Parts:
        exact = np.ascontiguousarray(values, dtype=np.float32)
        bits = self._bits(exact)
        if not np.array_equal(self._values(bits).view(np.uint32), exact.view(np.uint32)):
            raise ValueError(f"a value is not exact in {self.kind}")
        ordered = np.where(bits & self._sign, ~bits, bits | self._sign)
        first, rest = ordered[:, :1], ordered[:, :-1] - ordered[:, 1:]
        return {"": np.concatenate([first, rest], axis=1)}

    def decode(self, parts: Parts) -> Array:
        falls = parts[""].copy()
        falls[:, 1:] = 0 - falls[:, 1:]
        ordered = np.cumsum(falls, axis=1, dtype=falls.dtype)
        return self._values(np.where(ordered & self._sign, ordered & ~self._sign, ~ordered))

    @property
    def _sign(self) -> Array:
        return np.array(1 << 31, dtype=np.uint32) if self.kind == "float32" else np.array(1 << 15, dtype=np.uint16)

    def _bits(self, values: Array) -> Array:
        if self.kind == "float32":
            return values.view(np.uint32)
        if self.kind == "float16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16).view(np.uint16)
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)

    def _values(self, bits: Array) -> Array:
        if self.kind == "float32":
            return bits.view(np.float32)
        if self.kind == "float16":
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


plugin = Bits
