"""`log_partition`: the tail's log-partition at its nodes as int16 steps of 1/1024 nat."""

from dataclasses import dataclass
from typing import ClassVar

from kdcache.codecs import Array, Part, Parts
from kdcache.targets.log_partition import dequantise, quantise


@dataclass(frozen=True, slots=True)
class LogPartition:
    """Store tail log-partitions [N, J] with an absolute error of 1/2048 nat; minus infinity is kept."""

    name: ClassVar[str] = "log_partition"

    @property
    def dtype(self) -> str:
        return "float32"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {"": Part("int16", shape, compressor="shuffle")}

    def encode(self, values: Array) -> Parts:
        return {"": quantise(values)}

    def decode(self, parts: Parts) -> Array:
        return dequantise(parts[""])


plugin = LogPartition
