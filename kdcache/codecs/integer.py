"""`integer`: ids, labels and flags in the narrowest unsigned type. Lossless within its bits."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts


@dataclass(frozen=True, slots=True)
class Integer:
    """Store whole numbers of 0 to 2**bits - 1; decoded as int32 (int64 for 32 bits).

    Attributes:
        bits: 8, 16 or 32.
    """

    name: ClassVar[str] = "integer"
    bits: int = 16

    @property
    def dtype(self) -> str:
        return "int64" if self.bits == 32 else "int32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"": Part(f"uint{self.bits}", shape, compressor="zstd")}

    def encode(self, values: Array) -> Parts:
        if len(values) and (values.min() < 0 or values.max() >= 1 << self.bits):
            raise ValueError(f"a value is outside 0 to {(1 << self.bits) - 1}")
        return {"": values.astype(f"uint{self.bits}")}

    def decode(self, parts: Parts) -> Array:
        return parts[""].astype(np.dtype(self.dtype))


def narrowest(count: int) -> Integer:
    """Return the codec for the whole numbers below `count`."""
    return Integer(8 if count <= 1 << 8 else 16 if count <= 1 << 16 else 32)


plugin = Integer
