"""Array-to-array transforms between the numbers of a column and what its Zarr arrays hold.

Legend: `N` rows (positions of a shard), `K` entries of a row, `D` channels.

One file is one codec: a frozen dataclass whose fields are its JSON parameters. A codec turns a column's values
into named parts, each stored as one array; compression, sharding and checksums are Zarr's. numpy only.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache import registry
from kdcache.errors import UnsupportedError

Array = NDArray[Any]
Parts = dict[str, Array]
Compressor = Literal["none", "fast", "zstd", "shuffle", "bitshuffle"]

KNOWN = (
    *("integer", "float32", "float16", "bfloat16", "int8", "steps16", "steps8", "log_partition"),  # format 1.0
    *("ranked", "levels", "bits"),  # format 1.1
)
"""Codecs of this release's format: a store that names another is refused."""


@dataclass(frozen=True, slots=True)
class Part:
    """One array of a column.

    Attributes:
        dtype: Of the stored array, as Zarr names it.
        shape: Of one entry.
        per: "row" for an entry a position, "shard" for one a shard.
        compressor: zstd at level 3, or fast: at level 1; or Blosc's zstd after a byte or bit shuffle; or none.
    """

    dtype: str
    shape: tuple[int, ...]
    per: Literal["row", "shard"] = "row"
    compressor: Compressor = "zstd"


class Codec(Protocol):
    """What a codec file's `plugin` builds."""

    name: ClassVar[str]

    @property
    def dtype(self) -> str:
        """Of the decoded values."""

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """Return the stored arrays of a column whose decoded rows have this shape; the main one is ""."""

    def encode(self, values: Array) -> Parts:
        """Return the parts of decoded values [N, *shape]; a per-shard part has a leading axis of 1.

        Raises:
            ValueError: The values cannot be represented within the codec's tolerance.
        """

    def decode(self, parts: Parts) -> Array:
        """Return the values of the parts, or of the same run of rows of every per-row part."""


def codec(name: str, parameters: dict[str, Any] | None = None) -> Codec:
    """Return the codec of a name and its JSON parameters.

    Raises:
        UnsupportedError: The name is not one of the format's, or the parameters are not the codec's.
    """
    if name not in KNOWN:
        raise UnsupportedError(
            f"This release does not know the codec {name!r}.",
            hint=f"It knows {', '.join(KNOWN)}; a newer kdcache may know it.",
        )
    try:
        built: Codec = registry.find("kdcache.codecs", name)(**(parameters or {}))
    except TypeError as error:
        raise UnsupportedError(f"The codec {name!r} has other parameters than {parameters}.") from error
    return built


def parameters(of: Codec) -> dict[str, Any]:
    """Return a codec's JSON parameters."""
    return asdict(of)  # type: ignore[call-overload, no-any-return]


def require_finite(values: Array, name: str) -> None:
    """Refuse NaN and infinities, which a lossy codec cannot keep.

    Raises:
        ValueError: A value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"the codec {name!r} cannot keep NaN or infinite values")
