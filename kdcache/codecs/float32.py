"""`float32`: as they are. Lossless, NaN and infinities included."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts


@dataclass(frozen=True, slots=True)
class Float32:
    """Store float32 values unchanged."""

    name: ClassVar[str] = "float32"

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"": Part("float32", shape, compressor="shuffle")}

    def encode(self, values: Array) -> Parts:
        return {"": values.astype(np.float32, copy=False)}

    def decode(self, parts: Parts) -> Array:
        return parts[""]


plugin = Float32
