"""Views that came with the data: paraphrases, translations, other takes of one recording.

Legend: `S` samples, `V` views.

A field holds all copies of a sample, [S, V, ...]; a view is given copy number `view`, so nothing is drawn.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.augment.kind import Read
from kdcache.config import Section
from kdcache.errors import ConfigError

Array = NDArray[Any]

VERSION = 1
NUMBERS = 1
SAID = "which copy"


class CopyViews(Section):
    """Which fields hold copies.

    Attributes:
        kind: copies.
        fields: Of shape [S, V, ...]; a view is given its copy of each.
        views: V; training takes one an epoch in turn.
    """

    kind: Literal["copies"]
    fields: tuple[str, ...] = Field(min_length=1)
    views: int = Field(ge=1)


def touched(config: CopyViews) -> tuple[str, ...]:
    """Return the fields that a view changes."""
    return config.fields


def aligned(config: CopyViews) -> bool:
    """Say whether what has a value for each token still fits a view: copies have tokens of their own."""
    return False


def plain(count: int) -> NDArray[np.float32]:
    """Return the numbers [count, 1] of first copies."""
    return np.zeros((count, NUMBERS), dtype=np.float32)


def draw(config: CopyViews, ids: Sequence[str], places: Array, count: int) -> NDArray[np.float32]:
    """Return the number [S, V, 1] of every view of some samples; as `kdcache.augment.draw`."""
    numbers = np.arange(config.views, dtype=np.float32)[None, :, None]
    return np.repeat(numbers, len(ids), axis=0)


def view(config: CopyViews, numbers: Array, places: NDArray[np.int64], read: Read) -> dict[str, Array]:
    """Return the copies of one view of some samples; as `kdcache.augment.view`.

    Raises:
        ConfigError: A field has no copies, or another number of them than views.
    """
    copies = numbers[:, 0].astype(np.int64)
    found = {}
    for name, values in read(places, config.fields).items():
        if values.ndim < 2 or values.shape[1] != config.views:
            raise ConfigError(
                f"The field {name!r} has samples of shape {values.shape[1:]}, and not {config.views} copies of each.",
                where="examples.augment",
                hint="Give examples.augment.views the length of the second axis, and fields that have copies.",
            )
        found[name] = values[np.arange(len(values)), copies]
    return found
