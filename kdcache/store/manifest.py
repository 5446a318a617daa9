"""The manifest: the only way into a store, written last, and believed only after every check here.

`docs/spec/format-v1.md` is the authority; each check names what it refuses.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.codecs import codec
from kdcache.errors import (
    AccessError,
    CorruptObjectError,
    IncompleteStoreError,
    RefusedError,
    SourceError,
    UnsafeError,
    UnsupportedError,
)
from kdcache.fingerprint import canonical_json, digest_json, digest_without
from kdcache.store.objects import Object, check_name
from kdcache.store.schema import ALIGNMENT, AT_ONE_ONLY, MAX_SHARD_BYTES, Column, decoded_bytes, features_of

FORMAT, VERSION = "kdcache", "1.2"
COMPLETE = "1.1"
"""Version of a store that needs no feature of a later one: earlier releases read it."""

FILE = "manifest.json"
MAX_BYTES = 256 << 20
MAX_DEPTH = 32
MAX_ROWS, MAX_SHARDS, MAX_COLUMNS = 1 << 24, 10**6, 64
MAX_K, MAX_VOCABULARY, MAX_ROW_BYTES, MAX_OBJECT_BYTES = 1 << 24, 1 << 24, 1 << 28, 1 << 33

REQUIRED = (
    "labels",
    "loss_mask",
    "head_ids",
    "head_logits",
    "tail_log_partition",
    "label_logit",
)

DIGEST = re.compile("[0-9a-f]{64}")
OUTSIDE_DIGEST = ("digest", "provenance", "checksum")
"""Members that are not part of a store's identity: two captures of the same thing have the same digest."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard as the manifest lists it: samples first_sample to first_sample + samples, in `rows` positions."""

    first_sample: int
    samples: int
    rows: int
    invalid_rows: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked manifest; `document` is the JSON it was read from, without the objects."""

    kind: str
    samples: int
    positions: int
    vocab_size: int
    k: int
    columns: tuple[Column, ...]
    shard_rows: int
    chunk_rows: int
    shards: tuple[ShardInfo, ...]
    objects: Mapping[str, Object]
    digest: str
    document: Mapping[str, Any]

    def part(self, name: str) -> Any:
        """Return a descriptive member, such as teacher, tokenizer, source, licences or provenance."""
        return self.document.get(name)

    @property
    def layers(self) -> dict[str, str]:
        """Layers that the capture of a language model says it kept, each with what of it; nothing where it says none.

        What a stranger's manifest describes is not checked as its columns are: entries of other forms are left out.
        """
        told = self.document.get("capture")
        for name in ("targets", "hidden"):
            told = told.get(name) if isinstance(told, Mapping) else None
        entries = [one for one in told if isinstance(one, Mapping)] if isinstance(told, list) else []
        pairs = [(one.get("layer"), one.get("keep")) for one in entries]
        return {layer: keep for layer, keep in pairs if isinstance(layer, str) and isinstance(keep, str)}


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with its identity digest and the checksum of the whole."""
    sealed = {**document, "digest": _identity(document)}
    sealed.pop("checksum", None)
    return {**sealed, "checksum": digest_json(sealed)}


def _sound(document: Mapping[str, Any]) -> bool:
    body = {key: value for key, value in document.items() if key != "checksum"}
    return document.get("checksum") == digest_json(body) and document.get("digest") == _identity(document)


def _sound_text(document: Mapping[str, Any], data: bytes) -> bool:
    """Say whether both digests fit a text that is canonical, without writing it again: a third of the time of opening.

    A text that was only laid out otherwise is not canonical; `_sound` decides about it.
    """
    ranges = []
    for key in OUTSIDE_DIGEST:
        member = canonical_json({key: document.get(key)})[1:-1] + b","
        begin = data.find(member)
        ranges.append((begin, begin + len(member)) if begin >= 0 else (0, 0))
    checksum = ranges[OUTSIDE_DIGEST.index("checksum")]
    return document.get("checksum") == digest_without(data, [checksum]) and document.get("digest") == digest_without(
        data, ranges
    )


def _identity(document: Mapping[str, Any]) -> str:
    return digest_json({key: value for key, value in document.items() if key not in OUTSIDE_DIGEST})


def load_manifest(root: Path) -> Manifest:
    """Return the checked manifest of the store in a folder; reads no other file, except to say how far a capture is.

    Raises:
        SourceError: There is no such folder.
        IncompleteStoreError: There is no manifest.
        CorruptObjectError: It is not the JSON that was written.
        UnsupportedError: A newer format, or a required feature or codec this release does not know.
        UnsafeError: A name, size or type that no store of ours has.
    """
    path = root / FILE
    if not root.is_dir():
        raise SourceError(
            "There is no store here.", where=str(root), hint="Give the folder that `capture --out` wrote."
        )
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UnsafeError("The manifest is a link, or no regular file.", where=str(path))
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise UnsafeError(f"The manifest is over {MAX_BYTES >> 20} MiB.", where=str(path))
            data = file.read(MAX_BYTES)
    except FileNotFoundError as error:
        raise _incomplete(root) from error
    except OSError as error:
        raise AccessError(f"The manifest cannot be read: {error.strerror}.", where=str(path)) from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Return the checked manifest of its bytes; raises as `load_manifest`."""
    if data.count(b"[") > 2 * MAX_SHARDS:  # each shard is a list: seen before they are made
        raise UnsafeError("The manifest has too many shards.", where=where)
    document = strict_json(data, where)
    if document.get("format") != FORMAT or not isinstance(document.get("format_version"), str):
        raise UnsupportedError("This is not a kdcache manifest.", where=where)
    if document["format_version"].split(".")[0] != VERSION.split(".")[0]:
        raise UnsupportedError(
            f"The store has format {document['format_version']}, and this release reads {VERSION}.",
            where=where,
            hint="Install a newer kdcache.",
        )
    features = document.get("required_features") or []
    if not isinstance(features, list):
        raise UnsafeError("The manifest's required features are no list.", where=where)
    if unknown := [one for one in features if one != AT_ONE_ONLY]:
        raise UnsupportedError(f"The store needs features this release does not know: {unknown}.", where=where)
    try:
        sound = _sound_text(document, data) or _sound(document)
    except ValueError:  # a text that UTF-8 cannot write
        sound = False
    if not sound:
        raise CorruptObjectError(
            "The manifest is damaged or was edited: its checksum does not fit.",
            where=where,
            hint="Copy the store again, or capture it again.",
        )
    try:
        return _checked(document)
    except RefusedError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnsafeError(f"The manifest is not of the format: {error!r}.", where=where) from error


def strict_json(data: bytes, where: str) -> dict[str, Any]:
    """Return a JSON object read strictly: UTF-8, no duplicate keys, no NaN, bounded size and depth.

    Raises:
        CorruptObjectError: It is not such a text.
        UnsafeError: It is over 256 MiB or nested over 32 deep.
    """
    if len(data) > MAX_BYTES:
        raise UnsafeError(f"The JSON is over {MAX_BYTES >> 20} MiB.", where=where)
    depth = deepest = 0
    for byte in data.translate(None, delete=bytes(set(range(256)) - set(b'[{]}"'))) if len(data) < 1 << 16 else b"":
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH * 4:
        raise UnsafeError("The JSON is nested too deep.", where=where)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) != len(items):
            raise ValueError("a key stands twice")
        return table

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CorruptObjectError(f"This is not strict JSON: {error}.", where=where) from error
    if not isinstance(value, dict):
        raise CorruptObjectError("The JSON is not an object.", where=where)
    return value


def _checked(document: dict[str, Any]) -> Manifest:
    kind = document["kind"]
    if kind not in ALIGNMENT:
        raise UnsupportedError(f"The store is of an unknown kind {kind!r}.")
    vocab_size, k = _whole(document["vocab_size"], 1, MAX_VOCABULARY), _whole(document["k"], 1, MAX_K)
    shard_rows, chunk_rows = _whole(document["shard_rows"], 1, MAX_ROWS), _whole(document["chunk_rows"], 1, MAX_ROWS)
    if k > vocab_size or shard_rows % chunk_rows:
        raise UnsafeError("The manifest's sizes contradict each other.")
    columns = tuple(_column(entry, shard_rows) for entry in document["columns"][: MAX_COLUMNS + 1])
    if len(columns) > MAX_COLUMNS or len({column.name for column in columns}) != len(columns):
        raise UnsafeError("The manifest has too many columns, or one twice.")
    required = ("input_ids", *REQUIRED) if kind == "causal_lm" else REQUIRED
    if lacking := [name for name in required if name not in {column.name for column in columns}]:
        raise UnsafeError(f"The manifest has no column {lacking[0]!r}.")
    if features_of(columns) != (document.get("required_features") or []):
        raise UnsafeError("The manifest's tail has another number of values than its required features say.")
    if (decoded := decoded_bytes(columns) * shard_rows) > MAX_SHARD_BYTES:
        raise UnsafeError(f"A shard would need {decoded:,} bytes; {MAX_SHARD_BYTES:,} are allowed.")
    shards: list[ShardInfo] = []
    next_sample = 0
    if len(document["shards"]) > MAX_SHARDS:
        raise UnsafeError("The manifest has too many shards.")
    for first, samples, rows, invalid in document["shards"]:
        if first != next_sample:
            raise UnsafeError(f"Shard {len(shards)} begins at sample {first}, not at {next_sample}.")
        shards.append(
            ShardInfo(first, _whole(samples, 1, shard_rows), _whole(rows, 1, shard_rows), _whole(invalid, 0, rows))
        )
        next_sample += samples
    if next_sample != document["samples"] or sum(shard.rows for shard in shards) != document["positions"]:
        raise UnsafeError("The shards do not add up to the manifest's samples and positions.")
    listed = document["objects"]
    objects = {}
    for name in list(listed):
        entry = listed.pop(name)  # ten thousand shards have a hundred thousand: both forms at once are too much
        objects[check_name(name)] = Object(_whole(entry["bytes"], 0, MAX_OBJECT_BYTES), _hex(entry["digest"]))
    if len({name.casefold() for name in objects}) != len(objects):
        raise UnsafeError("Two objects differ in nothing but case.")
    needed = len(shards) * (1 + sum(len(column.arrays()) for column in columns))
    if len(objects) < needed:
        raise UnsafeError(f"The manifest lists {len(objects)} objects, and its shards have at least {needed}.")
    return Manifest(
        kind=kind,
        samples=next_sample,
        positions=document["positions"],
        vocab_size=vocab_size,
        k=k,
        columns=columns,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        shards=tuple(shards),
        objects=objects,
        digest=_hex(document["digest"]),
        document={key: value for key, value in document.items() if key != "objects"},
    )


def _column(entry: dict[str, Any], shard_rows: int) -> Column:
    shape = tuple(_whole(size, 1, MAX_K) for size in entry["shape"])
    if len(shape) > 3:
        raise UnsafeError(f"The column {entry['name']!r} has {len(shape)} axes.")
    column = Column(
        name=str(entry["name"]),
        codec=str(entry["codec"]),
        parameters=dict(entry["parameters"]),
        shape=shape,
        unit=str(entry["unit"]),
        description=str(entry["description"]),
        compressed=entry.get("compressed", True) is not False,
    )
    codec(column.codec, column.parameters)  # an unknown codec is refused by name
    if decoded_bytes([column]) > MAX_ROW_BYTES:
        raise UnsafeError(f"A row of the column {column.name!r} would need {decoded_bytes([column]):,} bytes.")
    for path, _part in column.arrays().values():
        check_name(path)
    if column.as_json() != entry:
        raise UnsafeError(f"The column {column.name!r} is not laid out as its codec says.")
    return column


def _whole(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise UnsafeError(f"The manifest has {value!r} where a whole number of {low} to {high} is due.")
    return value


def _hex(value: Any) -> str:
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise UnsafeError(f"The manifest has {value!r} where a BLAKE3 digest is due.")
    return value


def _incomplete(root: Path) -> IncompleteStoreError:
    from kdcache.store.progress import progress

    done = progress(root)
    if done is None:
        return IncompleteStoreError(
            "This folder holds no store: there is neither a manifest nor a plan.",
            where=str(root),
            hint="Give the folder that `kdcache capture CONFIG --out STORE` wrote.",
        )
    return IncompleteStoreError(
        f"The capture has not finished: {done.committed} of {done.shards} shards are committed.",
        where=str(root),
        hint="Run the same `kdcache capture` command again; it goes on from there.",
    )
