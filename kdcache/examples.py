"""Examples that are not text: a folder of numpy arrays, one a field, the first axis the samples.

Legend: `S` samples.

    id.npy        text [S], unique; absent: the numbers from 0
    label.npy     int [S] (one class), int [S, T] (one a token, below 0: none) or float [S, C] (one value a class)
    <field>.npy   anything else [S, ...]: pixels, token ids, masks, samples of sound

Two folders with the same ids hold two modalities of the same things.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.augment import Views, kind_of, view
from kdcache.errors import ConfigError, SourceError
from kdcache.fingerprint import digest_bytes, digest_file, digest_json

Array = NDArray[Any]

ID, LABEL = "id", "label"


class Examples:
    """Named arrays of S samples, memory-mapped.

    Args:
        folder: Of `.npy` files.

    Attributes:
        folder: Where they are.
        fields: Name to array [S, ...], ids left out.

    Raises:
        SourceError: There is no array, one is damaged or holds objects, their lengths differ, or an id comes twice.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.npy"))
        if not files:
            raise SourceError(
                "There are no examples here.", where=str(folder), hint="Give a folder of .npy files, one a field."
            )
        found = {file.stem: _opened(file) for file in files}
        self._ids = found.pop(ID, None)
        self.fields: dict[str, Array] = found
        lengths = {name: len(values) for name, values in found.items()}
        if self._ids is not None:
            lengths[ID] = len(self._ids)
        if len(set(lengths.values())) != 1 or not found:
            raise SourceError(f"The fields have different lengths: {lengths}.", where=str(folder))
        if len(self._places) != len(self):
            raise SourceError("An id comes twice.", where=str(self.folder / "id.npy"))

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    @cached_property
    def ids(self) -> list[str]:
        """The id of every sample."""
        return [str(one) for one in (range(len(self)) if self._ids is None else self._ids.tolist())]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.ids)}

    @property
    def label(self) -> Array | None:
        """Labels [S, ...], or None."""
        return self.fields.get(LABEL)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of every array."""
        files = sorted(self.folder.glob("*.npy"))
        return {"kind": "examples", "fields": {one.stem: digest_file(one) for one in files}, "count": len(self)}

    def places(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """Return where samples of these ids stand.

        Raises:
            SourceError: One is not there.
        """
        try:
            return np.asarray([self._places[one] for one in ids], dtype=np.int64)
        except KeyError as error:
            raise SourceError(
                f"The examples have no sample {error.args[0]!r}, and the store has.",
                where=str(self.folder),
                hint="Give the examples that the store was captured from, or others with the same ids.",
            ) from error

    def batch(self, places: Array, names: Sequence[str]) -> dict[str, Array]:
        """Return some samples of some fields.

        Raises:
            ConfigError: There is no such field.
        """
        for name in names:
            if name not in self.fields:
                raise ConfigError(
                    f"The examples have no field {name!r}.",
                    where=str(self.folder),
                    hint=f"They have {', '.join(self.fields)}.",
                )
        return {name: np.asarray(self.fields[name][places]) for name in names}


def write_examples(folder: Path | str, *, ids: Sequence[str] | None = None, **fields: Array) -> Examples:
    """Write arrays as examples and return them.

    Args:
        folder: Made if it is not there.
        ids: Of the samples; default: their numbers.
        fields: Name to array [S, ...].
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for name, values in fields.items():
        np.save(root / f"{name}.npy", np.asarray(values), allow_pickle=False)
    if ids is not None:
        np.save(root / f"{ID}.npy", np.asarray(list(ids), dtype=np.str_), allow_pickle=False)
    return Examples(root)


def view_inputs(
    examples: Examples,
    places: NDArray[np.int64],
    fields: Mapping[str, str],
    settings: Views | None,
    drawn: Array | None,
) -> list[dict[str, Array]]:
    """Return what a model is given for some samples, once a view.

    Args:
        examples: Where the fields are.
        places: int [S].
        fields: Parameter to field.
        settings: Of the views, or None.
        drawn: Their numbers [S, V, P]; None for one view, the samples as they are.

    Raises:
        ConfigError: There is no such field, or it is not what the views are made of.
    """
    if settings is None:
        own = examples.batch(places, list(fields.values()))
        return [{parameter: own[name] for parameter, name in fields.items()}]
    numbers = kind_of(settings).plain(len(places))[:, None] if drawn is None else drawn
    touched = set(kind_of(settings).touched(settings)) & set(fields.values())
    plain = examples.batch(places, [name for name in fields.values() if name not in touched])
    views = []
    for own_numbers in np.moveaxis(numbers, 1, 0):
        made = view(settings, own_numbers, places, examples.batch) if touched else {}
        if not kind_of(settings).aligned(settings):
            _require_none_left_behind(plain, made)
        views.append({parameter: made[name] if name in touched else plain[name] for parameter, name in fields.items()})
    return views


def _require_none_left_behind(plain: Mapping[str, Array], made: Mapping[str, Array]) -> None:
    shapes = {values.shape for values in made.values()}
    if left := [name for name, values in plain.items() if values.shape in shapes]:
        raise ConfigError(
            f"The field {left[0]!r} has a value for each token, and the views move tokens without it.",
            where="examples.augment",
            hint="Leave the field out of examples.fields, or set token_swap and token_drop to 0; beside copies give it "
            "copies too.",
        )


def views_digest(views: Sequence[dict[str, Array]], row: int) -> bytes:
    """Return the 16-byte identity of all that a model was given for one sample: BLAKE3 over every view's fields."""
    parts = [
        [name, str(values.dtype), list(values.shape[1:]), digest_bytes(np.ascontiguousarray(values[row]).tobytes())]
        for inputs in views
        for name, values in sorted(inputs.items())
    ]
    return bytes.fromhex(digest_json(parts)[:32])


def _opened(file: Path) -> Array:
    try:
        values: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"The array does not load: {str(error).splitlines()[0]}", where=str(file)) from error
    if values.ndim < 1 or values.dtype.kind not in "biufU":
        raise SourceError(f"The array is {values.dtype} of shape {values.shape}.", where=str(file))
    return values
