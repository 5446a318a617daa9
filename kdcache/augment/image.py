"""Views of images: whole-pixel moves, flips and a few arithmetic operations in a fixed order.

Legend: `S` samples, `C` channels, `H` height, `W` width, `P` = 9 numbers a view.

These give the same bits with any release of numpy. `VERSION` changes with them.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.augment.kind import Read
from kdcache.config import Section
from kdcache.fingerprint import digest_bytes

Array = NDArray[Any]

VERSION = 1
TOP, LEFT, FLIP, OP, MAGNITUDE, PARTNER, SHARE, VIEW, SAME = range(9)
NUMBERS = 9
"""Of a view: crop offset down and right in pixels, whether mirrored, operation and magnitude, partner's place among the
examples (or -1) and its share, the view's number, and whether nothing is done at all."""

SAID = "crop down, right; mirrored; operation, magnitude; partner's place, its share; view; 1 if nothing is done"

OPERATIONS = ("none", "brightness", "contrast", "invert", "erase")


class ImageViews(Section):
    """What is drawn for every view of an image.

    Attributes:
        kind: image.
        field: That is augmented, [S, C, H, W] or [S, H, W].
        views: V, drawn for each sample; training takes one an epoch in turn.
        plain_first: View 0 is the image as it is.
        crop: Pixels of zeros put around, out of which a part of the old size is cut; 0 for none.
        flip: Mirror half of them left to right.
        operations: Drawn from, one a view.
        magnitude: Largest change of brightness and contrast, and share of the side that is erased.
        mix: Share of the views that are mixed with another sample (mixup, Zhang et al. 2018).
        seed: Of the draws.
    """

    # not written to a store: the first stores had no other kind
    kind: Literal["image"] = Field(default="image", exclude=True)
    field: str = "pixels"
    views: int = Field(default=1, ge=1)
    plain_first: bool = True
    crop: int = Field(default=0, ge=0)
    flip: bool = False
    operations: tuple[str, ...] = ("none",)
    magnitude: float = Field(default=0.3, ge=0, le=1)
    mix: float = Field(default=0.0, ge=0, le=1)
    seed: int = 0


def aligned(config: ImageViews) -> bool:
    """Say whether what has a value for each place still fits a view: a model answers for whole images."""
    return True


def plain(count: int) -> NDArray[np.float32]:
    """Return the numbers [count, P] of images as they are."""
    found = np.zeros((count, NUMBERS), dtype=np.float32)
    found[:, PARTNER], found[:, SAME] = -1, 1
    return found


def draw(config: ImageViews, ids: Sequence[str], places: Array, count: int) -> NDArray[np.float32]:
    """Return the numbers [S, V, P] of every view of some samples.

    Args:
        config: What is drawn from.
        ids: Of the samples.
        places: int [S], where they stand among the examples; a sample is not its own partner.
        count: Examples there are to mix with.
    """
    found = np.zeros((len(ids), config.views, NUMBERS), dtype=np.float32)
    found[:, :, PARTNER] = -1
    for row, name in enumerate(ids):
        for view in range(config.views):
            numbers = found[row, view]
            numbers[VIEW] = view
            if view == 0 and config.plain_first:
                numbers[SAME] = 1
                continue
            u = _uniforms(f"{config.seed}/{view}/{name}")
            numbers[TOP], numbers[LEFT] = (int(one * (2 * config.crop + 1)) for one in u[:2])
            numbers[FLIP] = config.flip and u[2] < 0.5
            numbers[OP] = OPERATIONS.index(config.operations[int(u[3] * len(config.operations))])
            numbers[MAGNITUDE] = np.float32(config.magnitude * (2 * u[4] - 1))
            if u[5] < config.mix and count > 1:
                partner = int(u[6] * (count - 1))
                numbers[PARTNER] = partner + (partner >= int(places[row]))
                numbers[SHARE] = np.float32(0.5 * u[7])
    return found


def touched(config: ImageViews) -> tuple[str, ...]:
    """Return the fields that a view changes."""
    return (config.field,)


def view(config: ImageViews, numbers: Array, places: NDArray[np.int64], read: Read) -> dict[str, Array]:
    """Return the changed images of one view of some samples; as `kdcache.augment.view`."""
    partner = numbers[:, PARTNER].astype(np.int64)
    own, others = (read(at, [config.field])[config.field] for at in (places, np.where(partner < 0, places, partner)))
    return {config.field: apply(config, own, numbers, others)}


def apply(config: ImageViews, images: Array, numbers: Array, partners: Array) -> Array:
    """Return images as their numbers say, in their dtype; the same bits each time.

    Args:
        config: Only its `crop` is used.
        images: [S, C, H, W] or [S, H, W]; uint8, or floats of 0 to 1.
        numbers: [S, P].
        partners: Images to mix with, [S, ...]; those of rows without one are not looked at.
    """
    top = 255.0 if images.dtype == np.uint8 else 1.0
    made = np.empty_like(images)
    for row, own in enumerate(numbers):
        made[row] = images[row] if own[SAME] else _one(images[row], own, partners[row], config.crop, top)
    return made


def _one(image: Array, own: Array, partner: Array, crop: int, top: float) -> Array:
    height, width = image.shape[-2:]
    if crop:
        edges = [(0, 0)] * (image.ndim - 2) + [(crop, crop)] * 2
        down, right = int(own[TOP]), int(own[LEFT])
        image = np.pad(image, edges)[..., down : down + height, right : right + width]
    if own[FLIP]:
        image = image[..., ::-1]
    values = image.astype(np.float32)
    operation, magnitude = OPERATIONS[int(own[OP])], np.float32(own[MAGNITUDE])
    if operation == "brightness":
        values = values + magnitude * np.float32(top)
    elif operation == "contrast":
        middle = np.float32(top / 2)
        values = (values - middle) * (np.float32(1) + magnitude) + middle
    elif operation == "invert":
        values = np.float32(top) - values
    elif operation == "erase":
        tall, wide = int(abs(magnitude) * height), int(abs(magnitude) * width)
        down, right = int(own[TOP]) % max(1, height - tall), int(own[LEFT]) % max(1, width - wide)
        values = values.copy()
        values[..., down : down + tall, right : right + wide] = 0
    if own[PARTNER] >= 0:
        share = np.float32(own[SHARE])
        values = (np.float32(1) - share) * values + share * partner.astype(np.float32)
    values = np.clip(values, np.float32(0), np.float32(top))
    return np.rint(values).astype(image.dtype) if image.dtype == np.uint8 else values.astype(image.dtype)


def _uniforms(key: str) -> list[float]:
    """Return eight numbers of 0 to 1 out of a key, the same everywhere: 32 bits of BLAKE3 each."""
    digest = digest_bytes(f"kdcache augmentation {VERSION}/{key}".encode())
    return [int(digest[at : at + 8], 16) / 2**32 for at in range(0, 64, 8)]
