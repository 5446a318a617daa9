"""`ranked`: ids as ranks in the store's ranking, a byte plane each. Lossless.

A store's ranking lists all ids by how often they stood in the heads of some sampled positions. The low byte of a rank
is close to random and zstd leaves it as it is; the higher bytes are mostly small numbers and compress well. What is
encoded and decoded here are ranks; the store puts ids in their place.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdcache.codecs import Array, Part, Parts


@dataclass(frozen=True, slots=True)
class Ranked:
    """Store ranks [N, K], decoded as uint16 or int32.

    Attributes:
        vocab_size: Ranks are 0 to vocab_size - 1.
    """

    name: ClassVar[str] = "ranked"
    vocab_size: int = 65536

    def __post_init__(self) -> None:
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size <= 1 << 24:
            raise TypeError("vocab_size is a whole number of 1 to 2**24")

    @property
    def dtype(self) -> str:
        return "uint16" if self._planes < 3 else "int32"

    @property
    def _planes(self) -> int:
        return max(1, ((self.vocab_size - 1).bit_length() + 7) // 8)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        return {f"byte{one}" if one else "": Part("uint8", shape, compressor="fast") for one in range(self._planes)}

    def encode(self, values: Array) -> Parts:
        if values.size and (values.min() < 0 or values.max() >= self.vocab_size):
            raise ValueError(f"a rank is outside 0 to {self.vocab_size - 1}")
        whole = values.astype(np.uint32)
        return {f"byte{one}" if one else "": (whole >> (8 * one)).astype(np.uint8) for one in range(self._planes)}

    def decode(self, parts: Parts) -> Array:
        if self._planes == 1:
            return parts[""].astype(self.dtype)
        ranks = parts[f"byte{self._planes - 1}"].astype(self.dtype)
        for one in range(self._planes - 2, -1, -1):
            ranks <<= 8
            ranks |= parts[f"byte{one}" if one else ""]
        return ranks


plugin = Ranked
