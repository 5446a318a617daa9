"""`bfloat16`: the upper half of a float32, as uint16 bit patterns. Relative error at most 2**-8."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts, require_finite


@dataclass(frozen=True, slots=True)
class BFloat16:
    """Store values rounded to bfloat16, ties to even; lossless for what a bfloat16 teacher computed."""

    name: ClassVar[str] = "bfloat16"

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"": Part("uint16", shape, compressor="none")}

    def encode(self, values: Array) -> Parts:
        require_finite(values, self.name)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        # round to nearest even: add half of the dropped range, less one where the kept part is even
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return {"": (rounded >> np.uint32(16)).astype(np.uint16)}

    def decode(self, parts: Parts) -> Array:
        return (parts[""].astype(np.uint32) << np.uint32(16)).view(np.float32)


plugin = BFloat16
