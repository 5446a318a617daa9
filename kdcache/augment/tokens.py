"""Views of token ids: neighbours change places, tokens give way to a mask, or go.

Legend: `S` samples, `T` places for tokens of a sample.

A view's number is 24 bits drawn for (seed, sample id, view) by a keyed hash, so float32 holds it exactly. It is the key
of a counter-based generator (Philox, whose stream numpy keeps), whose words say for each place what happens there.
Words are compared as whole numbers: the same bits everywhere. `VERSION` changes with any of this.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from kdcache.augment.kind import Read
from kdcache.config import Section
from kdcache.errors import ConfigError
from kdcache.fingerprint import digest_bytes

Array = NDArray[Any]

VERSION = 1
KEY, VIEW, SAME = range(3)
NUMBERS = 3
SAID = "key of 24 bits; view; 1 if nothing is done"

Share = Field(default=0.0, ge=0, le=1)


class TokenViews(Section):
    """What happens to the tokens of every view; padding and kept ids stay as they are.

    Attributes:
        kind: tokens.
        field: Token ids, whole numbers [S, T].
        mask_field: 1 where a token is and 0 where padding is [S, T]; default: there is no padding.
        views: Of each sample; training takes one an epoch in turn.
        plain_first: View 0 is the sample as it is.
        token_swap: Share of the tokens that change places with the next, first of all.
        token_mask: Share that `mask_id` takes the place of.
        token_drop: Share that goes, last of all; what is behind moves up, and padding fills the end.
        mask_id: Of the tokenizer.
        pad_id: Of the tokenizer.
        keep: Ids that are never changed, moved or dropped, such as those of the beginning and the end.
        seed: Of the draws.
    """

    kind: Literal["tokens"]
    field: str = "input_ids"
    mask_field: str | None = None
    views: int = Field(default=1, ge=1)
    plain_first: bool = True
    token_swap: float = Share
    token_mask: float = Share
    token_drop: float = Share
    mask_id: int | None = Field(default=None, ge=0)
    pad_id: int = Field(default=0, ge=0)
    keep: tuple[int, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _whole(self) -> "TokenViews":
        if self.token_mask and self.mask_id is None:
            raise ValueError("token_mask needs mask_id")
        if self.token_drop and self.mask_field is None:
            raise ValueError("token_drop needs mask_field: padding takes the place of tokens that go")
        return self


def touched(config: TokenViews) -> tuple[str, ...]:
    """Return the fields that a view changes."""
    return (config.field,) if config.mask_field is None else (config.field, config.mask_field)


def aligned(config: TokenViews) -> bool:
    """Say whether what has a value for each token still fits a view: whether none moves."""
    return not config.token_swap and not config.token_drop


def plain(count: int) -> NDArray[np.float32]:
    """Return the numbers [count, 3] of samples as they are."""
    found = np.zeros((count, NUMBERS), dtype=np.float32)
    found[:, SAME] = 1
    return found


def draw(config: TokenViews, ids: Sequence[str], places: Array, count: int) -> NDArray[np.float32]:
    """Return the numbers [S, V, 3] of every view of some samples; as `kdcache.augment.draw`."""
    found = np.zeros((len(ids), config.views, NUMBERS), dtype=np.float32)
    for row, name in enumerate(ids):
        for number in range(config.views):
            if number == 0 and config.plain_first:
                found[row, number] = 0, number, 1
                continue
            digest = digest_bytes(f"kdcache tokens {VERSION}/{config.seed}/{number}/{name}".encode())
            found[row, number] = int(digest[:6], 16), number, 0
    return found


def view(config: TokenViews, numbers: Array, places: NDArray[np.int64], read: Read) -> dict[str, Array]:
    """Return the changed ids, and the mask where tokens go, of one view of some samples; as `kdcache.augment.view`.

    A sample all of whose tokens would go keeps them.

    Raises:
        ConfigError: The field does not hold token ids, or the mask is not of its shape.
    """
    ids = read(places, [config.field])[config.field].copy()
    mask = None if config.mask_field is None else read(places, [config.mask_field])[config.mask_field].copy()
    _require_tokens(config, ids, mask)
    for row, own in enumerate(numbers):
        if not own[SAME]:
            _change(config, int(own[KEY]), ids[row], None if mask is None else mask[row])
    found = {config.field: ids}
    if mask is not None and config.mask_field is not None:
        found[config.mask_field] = mask
    return found


def _change(config: TokenViews, key: int, ids: Array, mask: Array | None) -> None:
    """Change the ids [T] and the mask [T] of one sample, in place."""
    length = len(ids)
    words = np.random.Philox(key=key).random_raw(3 * length).reshape(3, length) >> np.uint64(32)
    shares = (config.token_swap, config.token_mask, config.token_drop)
    swap, hide, drop = (own < np.uint64(round(share * 2**32)) for own, share in zip(words, shares, strict=True))
    free = ~np.isin(ids, config.keep)
    if mask is not None:
        free &= mask != 0
    last = -1
    for at in np.flatnonzero(swap[:-1] & free[:-1] & free[1:]).tolist():
        if at > last:  # one that has just moved stays where it is
            ids[at : at + 2] = ids[at : at + 2][::-1].copy()
            last = at + 1
    if config.mask_id is not None:
        ids[free & hide] = config.mask_id
    gone = free & drop
    if mask is not None and ((mask != 0) & ~gone).any():  # a sample keeps a token
        count = int((~gone).sum())
        ids[:count], ids[count:] = ids[~gone], config.pad_id
        mask[:count], mask[count:] = mask[~gone], 0


def _require_tokens(config: TokenViews, ids: Array, mask: Array | None) -> None:
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ConfigError(
            f"The field {config.field!r} is {ids.dtype} of shape {ids.shape}, not token ids.",
            where="examples.augment.field",
            hint="Views of kind tokens want whole numbers [samples, tokens].",
        )
    if mask is not None and mask.shape != ids.shape:
        raise ConfigError(
            f"The mask has the shape {mask.shape}, and the token ids {ids.shape}.", where="examples.augment.mask_field"
        )
    if max(config.mask_id or 0, config.pad_id) > np.iinfo(ids.dtype).max:
        raise ConfigError(f"The ids are {ids.dtype}, too small for mask_id or pad_id.", where="examples.augment")
