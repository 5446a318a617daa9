"""`int8`: 8-bit features with one scale a channel and shard. Error at most scale / 2."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts, require_finite


@dataclass(frozen=True, slots=True)
class Int8:
    """Store features [N, D] as int8; the scale of a channel is its largest magnitude in the shard / 127."""

    name: ClassVar[str] = "int8"

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"": Part("int8", shape), "scale": Part("float32", shape, per="shard")}

    def encode(self, values: Array) -> Parts:
        require_finite(values, self.name)
        largest = np.abs(values).max(axis=0, initial=0.0)
        scale = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
        return {"": np.rint(values / scale).clip(-127, 127).astype(np.int8), "scale": scale[None]}

    def decode(self, parts: Parts) -> Array:
        return parts[""].astype(np.float32) * parts["scale"]


plugin = Int8
