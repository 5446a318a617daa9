"""`log_partition`: the tail's log-partition at its nodes as int16 steps of 1/1024 nat."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts
from kdcache.targets.log_partition import dequantise, quantise


@dataclass(frozen=True, slots=True)
class LogPartition:
    """Store tail log-partitions [N, J] with an absolute error of 1/2048 nat; minus infinity is kept.

    Attributes:
        differences: How often the steps of a row are replaced by their differences, modulo 2**16: 0 or 2. The function
            is smooth along the nodes, so second differences are small.
    """

    name: ClassVar[str] = "log_partition"
    differences: int = 0

    def __post_init__(self) -> None:
        if self.differences not in (0, 2):
            raise TypeError("differences is 0 or 2")

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"": Part("int16", shape, compressor="bitshuffle" if self.differences else "shuffle")}

    def encode(self, values: Array) -> Parts:
        steps = quantise(values)
        for _ in range(self.differences):
            steps = np.diff(steps, axis=1, prepend=np.int16(0))
        return {"": steps}

    def decode(self, parts: Parts) -> Array:
        steps = parts[""]
        for _ in range(self.differences):
            steps = np.cumsum(steps, axis=1, dtype=np.int16)
        return dequantise(steps)


plugin = LogPartition
