"""Identity of things by content: BLAKE3 over bytes, or over canonical JSON."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from kdcache.errors import AccessError, SourceError

Json = None | bool | int | float | str | list[Any] | dict[str, Any]


def canonical_json(value: Json | Mapping[str, Any]) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: The value holds NaN, an infinity or a type JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_bytes(data: bytes | memoryview) -> str:
    """Return the 64 hexadecimal digits of BLAKE3 over the bytes."""
    return blake3(data).hexdigest()


def digest_without(data: bytes, ranges: Iterable[tuple[int, int]]) -> str:
    """Return the digest of what is left of the bytes without some ranges (begin, end), which do not overlap."""
    state = blake3()
    view, place = memoryview(data), 0
    for begin, end in sorted(ranges):
        state.update(view[place:begin])
        place = max(place, end)
    state.update(view[place:])
    return state.hexdigest()


def digest_json(value: Json | Mapping[str, Any]) -> str:
    """Return the digest of a value's canonical JSON."""
    return digest_bytes(canonical_json(value))


def digest_parts(parts: Iterable[bytes]) -> str:
    """Return the digest of a sequence of byte strings; where one ends is part of the identity."""
    state = blake3()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's content, read in blocks.

    Raises:
        SourceError: The file is missing or is not a file.
        AccessError: The file may not be read.
    """
    state = blake3()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                state.update(block)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise SourceError("There is no such file.", where=str(path)) from error
    except OSError as error:
        raise AccessError(f"The file cannot be read: {error.strerror}.", where=str(path)) from error
    return state.hexdigest()
