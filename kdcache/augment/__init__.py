"""Views of examples: what is changed is drawn once, stored as numbers, and done again to the bit.

Legend: `S` samples, `V` views, `P` numbers of a view.

What is drawn for a sample and a view depends on (seed, sample id, view) alone, by a keyed hash: not on order, batch or
process. The numbers lie in the store's column `augmentation`, and the digest of the changed fields in its sample table,
so that a student's loader proves that it sees what the teacher saw. Features are never changed: the teacher has
answered for every view. One file is one kind:

    image    crops, flips, brightness and contrast, erasure, mixing with another sample
    tokens   neighbours change places, tokens give way to a mask, tokens go
    copies   a field holds the views, as its user made them
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from kdcache.augment import copies, image, tokens
from kdcache.augment.copies import CopyViews
from kdcache.augment.image import ImageViews
from kdcache.augment.kind import Array, Kind, Read
from kdcache.augment.tokens import TokenViews
from kdcache.errors import MismatchError


def _kind(tree: Any) -> str:
    return str(tree.get("kind", "image") if isinstance(tree, Mapping) else getattr(tree, "kind", "image"))


Views = Annotated[
    Annotated[ImageViews, Tag("image")] | Annotated[TokenViews, Tag("tokens")] | Annotated[CopyViews, Tag("copies")],
    Discriminator(_kind),
]
"""Keys of one kind; `kind` names it, and is image where it is left out."""

_READER: TypeAdapter[Any] = TypeAdapter(Views)

_KINDS: dict[str, Kind] = {"image": image, "tokens": tokens, "copies": copies}


def views_of(tree: Mapping[str, Any], version: int) -> Views:
    """Return what a store says of its views.

    Args:
        tree: `augment` of its manifest's capture.
        version: `augmentation_version` of it.

    Raises:
        MismatchError: This release makes such views otherwise, or not at all.
    """
    try:
        found: Views = _READER.validate_python(tree)
    except ValidationError as error:
        raise MismatchError(
            f"The store's views are of kind {_kind(tree)}, and this release does not know all that they are made by.",
            where="examples.augment",
            hint="Use the release of kdcache that captured it.",
        ) from error
    if (own := kind_of(found).VERSION) != version:
        raise MismatchError(
            f"The store's views are of version {version}, and this release makes those of version {own}.",
            where="examples.augment",
            hint="Use the release of kdcache that captured it, or capture again.",
        )
    return found


def kind_of(config: Views) -> Kind:
    """Return the kind of a config."""
    return _KINDS[config.kind]


def draw(config: Views, ids: Sequence[str], places: Array, count: int) -> NDArray[np.float32]:
    """Return the numbers [S, V, P] of every view of some samples.

    Args:
        config: What is drawn from.
        ids: Of the samples.
        places: int [S], where they stand among the examples.
        count: Examples there are.
    """
    return kind_of(config).draw(config, ids, places, count)


def view(config: Views, numbers: Array, places: NDArray[np.int64], read: Read) -> dict[str, Array]:
    """Return the changed fields of one view of some samples, by field; the same bits each time.

    Args:
        config: Of the views.
        numbers: [S, P], of the view.
        places: int [S], where the samples stand.
        read: Gives fields of samples.

    Raises:
        ConfigError: A field is not what the kind works on.
    """
    return kind_of(config).view(config, numbers, places, read)


__all__ = ["CopyViews", "ImageViews", "Kind", "TokenViews", "Views", "draw", "kind_of", "view", "views_of"]
