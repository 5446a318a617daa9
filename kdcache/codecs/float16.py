"""`float16`: IEEE half precision. Relative error at most 2**-11; |value| at most 65504."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts, require_finite


@dataclass(frozen=True, slots=True)
class Float16:
    """Store values rounded to half precision; exact for a bfloat16 teacher's logits of ordinary size."""

    name: ClassVar[str] = "float16"

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"": Part("float16", shape, compressor="bitshuffle")}

    def encode(self, values: Array) -> Parts:
        require_finite(values, self.name)
        if len(values) and np.abs(values).max() > 65504:
            raise ValueError("a value is beyond 65504, the largest that float16 holds")
        return {"": values.astype(np.float16)}

    def decode(self, parts: Parts) -> Array:
        return parts[""].astype(np.float32)


plugin = Float16
