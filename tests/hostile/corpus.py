"""Attacks: each turns a sound store into one that must be refused. All digests are made right again after the attack:
whoever means harm can do that too.
"""

import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c
from numcodecs import Blosc, zstd

from kdcache.fingerprint import canonical_json, digest_bytes
from kdcache.store.manifest import seal

Document = dict[str, Any]


@dataclass(frozen=True)
class Attack:
    """What is done to the store; `outside` is a file that must never be read or written."""

    name: str
    act: Callable[[Path, Path], None]


ATTACKS: list[Attack] = []


def attack(act: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    ATTACKS.append(Attack(act.__name__.replace("_", " "), act))
    return act


def document(folder: Path) -> Document:
    return json.loads((folder / "manifest.json").read_bytes())  # type: ignore[no-any-return]


def reseal(folder: Path, change: Callable[[Document], None]) -> None:
    """Change the manifest, and make its digests right."""
    found = document(folder)
    change(found)
    found.pop("digest", None)
    (folder / "manifest.json").write_bytes(canonical_json(seal(found)))


def put(folder: Path, name: str, data: bytes) -> None:
    """Replace an object, and its length and digest."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)

    def listed(found: Document) -> None:
        found["objects"][name] = {"bytes": len(data), "digest": digest_bytes(data)}

    reseal(folder, listed)


def sharded(chunks: list[bytes]) -> bytes:
    """An object of chunks with right checksums and a right index."""
    body, index = b"", b""
    for one in chunks:
        whole = one + crc32c(one).to_bytes(4, "little")
        index += struct.pack("<QQ", len(body), len(whole))
        body += whole
    return body + index + crc32c(index).to_bytes(4, "little")


def bombed(folder: Path, chunk: bytes, name: str = "columns/labels/c/0") -> None:
    found = document(folder)
    put(folder, name, sharded([chunk] * (found["shard_rows"] // found["chunk_rows"])))


# names

NAMES = {
    "up": "../x",
    "up from within": "columns/../../x",
    "absolute": "/etc/passwd",
    "drive": "C:\\x",
    "backslash up": "..\\x",
    "share": "\\\\host\\share\\x",
    "nul byte": "a\0b",
    "device": "con",
    "device with ending": "aux.txt",
    "dot at the end": "a.",
    "space at the end": "a ",
    "long": "a" * 300,
    "percent": "%2e%2e/x",
    "right to left": "a\u202eb",
    "line break": "a\nb",
    "address": "https://example.org/x",
    "upper case": "A",
    "empty component": "a//b",
    "here": "./a",
    "home": "~root/x",
    "deep": "/".join("a" * 12),
    "empty": "",
    "hidden": ".bashrc",
    "escape code": "a\x1b[2Jb",
}


def _named(name: str) -> Callable[[Path, Path], None]:
    def act(folder: Path, outside: Path) -> None:
        reseal(folder, lambda found: found["objects"].__setitem__(name, {"bytes": 1, "digest": "0" * 64}))

    return act


ATTACKS += [Attack(f"object name: {what}", _named(name)) for what, name in NAMES.items()]


@attack
def column_that_lies_outside(folder: Path, outside: Path) -> None:
    def change(found: Document) -> None:
        found["columns"][1]["name"] = "../../outside"
        found["columns"][1]["arrays"][0]["array"] = "columns/../../outside"

    reseal(folder, change)


@attack
def array_of_another_path(folder: Path, outside: Path) -> None:
    reseal(folder, lambda found: found["columns"][1]["arrays"][0].__setitem__("array", "samples"))


# links and things that are not files


def _in_place_of(name: str, make: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def act(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        make(folder / name, outside)

    return act


def _link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def _loop(path: Path, outside: Path) -> None:
    path.symlink_to(path)


def _pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path, outside: Path) -> None:
    path.mkdir()


def _device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


for _what, _make in {"link": _link, "link loop": _loop, "pipe": _pipe, "folder": _folder, "device": _device}.items():
    for _name in ("manifest.json", "columns/labels/c/0", "samples/00000.parquet"):
        ATTACKS.append(Attack(f"{_what} in place of {_name}", _in_place_of(_name, _make)))


@attack
def folder_that_is_a_link(folder: Path, outside: Path) -> None:
    (folder / "columns" / "labels").rename(outside.parent / "labels")
    (folder / "columns" / "labels").symlink_to(outside.parent / "labels")


# bombs


@attack
def zstd_of_a_gigabyte(folder: Path, outside: Path) -> None:
    bombed(folder, bytes(zstd.compress(bytes(1 << 28), 3)))


@attack
def zstd_that_declares_three_gigabytes(folder: Path, outside: Path) -> None:
    bombed(folder, b"\x28\xb5\x2f\xfd" + bytes([0x80 | 0x20]) + struct.pack("<I", 3 << 30) + b"\x01\x00\x00")


@attack
def zstd_that_declares_a_petabyte(folder: Path, outside: Path) -> None:
    bombed(folder, b"\x28\xb5\x2f\xfd" + bytes([0xC0 | 0x20]) + struct.pack("<Q", 1 << 50) + b"\x01\x00\x00")


@attack
def zstd_that_declares_nothing(folder: Path, outside: Path) -> None:
    bombed(folder, b"\x28\xb5\x2f\xfd\x00\x58" + b"\x01\x00\x00")


@attack
def zstd_of_several_frames(folder: Path, outside: Path) -> None:
    bombed(folder, bytes(zstd.compress(bytes(64), 3)) * 1000)


@attack
def blosc_that_lies(folder: Path, outside: Path) -> None:
    found = document(folder)
    name = next(one["name"] for one in found["columns"] if one["arrays"][0]["compressor"] in ("shuffle", "bitshuffle"))
    data = bytearray(Blosc(cname="zstd").encode(bytes(1 << 12)))
    data[4:8] = struct.pack("<I", 0x7FFFFFFF)
    suffix = "/0" if next(one for one in found["columns"] if one["name"] == name)["shape"] else ""
    bombed(folder, bytes(data), f"columns/{name}/c/0{suffix}")


@attack
def chunk_that_is_not_compressed_at_all(folder: Path, outside: Path) -> None:
    bombed(folder, b"hello")


@attack
def index_that_points_outside(folder: Path, outside: Path) -> None:
    index = struct.pack("<QQ", 1 << 40, 16) * 4
    put(folder, "columns/labels/c/0", bytes(64) + index + crc32c(index).to_bytes(4, "little"))


@attack
def index_that_overflows(folder: Path, outside: Path) -> None:
    index = struct.pack("<QQ", (1 << 64) - 8, 16) * 4
    put(folder, "columns/labels/c/0", bytes(64) + index + crc32c(index).to_bytes(4, "little"))


@attack
def index_of_absent_chunks(folder: Path, outside: Path) -> None:
    index = struct.pack("<QQ", (1 << 64) - 1, (1 << 64) - 1) * 4
    put(folder, "columns/labels/c/0", bytes(64) + index + crc32c(index).to_bytes(4, "little"))


def _table(columns: dict[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, write_page_checksum=True, **options)
    return sink.getvalue()


def _samples(folder: Path) -> dict[str, Any]:
    table = pq.read_table(folder / "samples" / "00000.parquet")
    return {name: table[name].combine_chunks() for name in table.column_names}


@attack
def sample_table_of_a_hundred_million_rows(folder: Path, outside: Path) -> None:
    rows = pa.array(np.zeros(20_000_000, dtype=np.int32))
    put(folder, "samples/00000.parquet", _table({"rows": rows, "first_row": rows}, compression="zstd"))


@attack
def sample_table_with_an_enormous_text(folder: Path, outside: Path) -> None:
    columns = _samples(folder)
    columns["sample_id"] = pa.array(["x" * (200 << 20), *["y"] * (len(columns["rows"]) - 1)])
    put(folder, "samples/00000.parquet", _table(columns, compression="zstd", use_dictionary=False))


def _long(value: int, size: int) -> bytes:
    """A number in Thrift's compact form, in more bytes than it takes."""
    value <<= 1
    return bytes((value >> 7 * byte) & 127 | (128 if byte < size - 1 else 0) for byte in range(size))


@attack
def sample_table_whose_pages_are_larger_than_its_footer_says(folder: Path, outside: Path) -> None:
    columns = _samples(folder)
    columns["sample_id"] = pa.array(["x" * (200 << 20), *["y"] * (len(columns["rows"]) - 1)])
    data = _table(columns, compression="zstd", use_dictionary=False)
    number = columns_of(data).index("sample_id")
    said = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(number).total_uncompressed_size
    honest = _long(said, 5) if said >= 1 << 27 else _long(said, 4)
    footer = data.rindex(honest)
    lying = data[:footer] + _long(1000, len(honest)) + data[footer + len(honest) :]
    assert pq.ParquetFile(io.BytesIO(lying)).metadata.row_group(0).column(number).total_uncompressed_size == 1000
    put(folder, "samples/00000.parquet", lying)


def columns_of(data: bytes) -> list[str]:
    return list(pq.ParquetFile(io.BytesIO(data)).schema_arrow.names)


@attack
def sample_table_of_a_footer_and_zeros(folder: Path, outside: Path) -> None:
    data = _table(_samples(folder))
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]
    put(folder, "samples/00000.parquet", b"PAR1" + bytes(len(data) - len(footer) - 4) + footer)


@attack
def sample_table_that_is_no_parquet(folder: Path, outside: Path) -> None:
    put(folder, "samples/00000.parquet", b"PAR1" + bytes(64) + b"PAR1")


@attack
def sample_table_without_rows(folder: Path, outside: Path) -> None:
    columns = _samples(folder)
    del columns["rows"]
    put(folder, "samples/00000.parquet", _table(columns))


@attack
def sample_table_of_negative_rows(folder: Path, outside: Path) -> None:
    columns = _samples(folder)
    rows = columns["rows"].to_numpy().copy()
    rows[0], rows[1] = rows[0] + 1000, rows[1] - 1000
    columns["rows"] = pa.array(rows)
    columns["first_row"] = pa.array(np.concatenate([[0], np.cumsum(rows)[:-1]]).astype(np.int64))
    put(folder, "samples/00000.parquet", _table(columns))


@attack
def sample_table_of_texts_for_numbers(folder: Path, outside: Path) -> None:
    columns = _samples(folder)
    columns["rows"] = pa.array([str(one) for one in columns["rows"].to_pylist()])
    put(folder, "samples/00000.parquet", _table(columns))


@attack
def sample_table_of_a_pickled_type(folder: Path, outside: Path) -> None:
    opened = b"cio\nopen\n(V" + str(outside).encode() + b"\nVw\ntR."  # what a pickle that opens the file would be
    columns = _samples(folder)
    field = pa.field(
        "rows",
        pa.int32(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": opened,
        },
    )
    schema = pa.schema([field if name == "rows" else pa.field(name, one.type) for name, one in columns.items()])
    columns["rows"] = pa.array(np.zeros(len(columns["rows"]), np.int32))
    sink = io.BytesIO()
    pq.write_table(pa.table(list(columns.values()), schema=schema), sink)
    put(folder, "samples/00000.parquet", sink.getvalue())


# the manifest's text


def _text(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def act(folder: Path, outside: Path) -> None:
        path = folder / "manifest.json"
        path.write_bytes(change(path.read_bytes()))

    return act


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "nested 100,000 deep": lambda data: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a list nested deep": lambda data: b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a key twice": lambda data: data[:-1] + b',"k":8}',
    "NaN": lambda data: data.replace(b'"k":8', b'"k":NaN'),
    "infinity": lambda data: data.replace(b'"k":8', b'"k":1e400'),
    "an endless number": lambda data: data.replace(b'"k":8', b'"k":' + b"9" * 10_000),
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "bytes that are not UTF-8": lambda data: data.replace(b'"causal_lm"', b'"causal\xff"'),
    "bytes after it": lambda data: data + b"x",
    "half of it": lambda data: data[: len(data) // 2],
    "nothing": lambda data: b"",
    "a list": lambda data: b"[]",
    "another format": lambda data: b'{"format":"zip","format_version":"1.0"}',
    "300 MB of it": lambda data: data + b" " * (300 << 20),
}
ATTACKS += [Attack(f"manifest: {what}", _text(change)) for what, change in TEXTS.items()]


def _sealed(change: Callable[[Document], Any]) -> Callable[[Path, Path], None]:
    return lambda folder, outside: reseal(folder, change)


def _column(**values: Any) -> Callable[[Document], None]:
    return lambda found: found["columns"][1].update(values)


CHANGES: dict[str, Callable[[Document], Any]] = {
    "k of 0": lambda d: d.update(k=0),
    "k over the vocabulary": lambda d: d.update(k=51),
    "a vocabulary of 2^63": lambda d: d.update(vocab_size=1 << 63),
    "negative rows": lambda d: d["shards"][0].__setitem__(2, -1),
    "a fraction of a row": lambda d: d["shards"][0].__setitem__(2, 1.5),
    "a true number": lambda d: d.update(k=True),
    "shards of 2^40 rows": lambda d: d.update(shard_rows=1 << 40),
    "shards of 2^24 rows": lambda d: d.update(shard_rows=1 << 24, chunk_rows=1 << 24),
    "chunks of no rows": lambda d: d.update(chunk_rows=0),
    "chunks that do not divide shards": lambda d: d.update(chunk_rows=7),
    "shards that overlap": lambda d: d["shards"][1].__setitem__(0, 0),
    "a gap between shards": lambda d: d["shards"][1].__setitem__(0, 99),
    "more samples than shards have": lambda d: d.update(samples=10**9),
    "more positions than shards have": lambda d: d.update(positions=10**12),
    "a shard more than there is": lambda d: (
        d["shards"].append([d["samples"], 1, 1, 0]),
        d.update(samples=d["samples"] + 1, positions=d["positions"] + 1),
    ),
    "two million shards": lambda d: d.update(
        shards=[[number, 1, 1, 0] for number in range(2 * 10**6)], samples=2 * 10**6, positions=2 * 10**6
    ),
    "a hundred columns": lambda d: d.update(columns=d["columns"] * 20),
    "a column of 2^62 numbers a row": _column(shape=[1 << 31, 1 << 31]),
    "a column of four axes": _column(shape=[1, 1, 1, 1]),
    "a column of another shape": lambda d: d["columns"][3].update(shape=[9]),
    "a codec that pickles": _column(codec="pickle"),
    "a codec of numcodecs": _column(codec="numcodecs.pickle"),
    "a codec by path": _column(codec="../../../outside"),
    "a codec that is a module": _column(codec="os"),
    "a codec with other parameters": _column(parameters={"bits": 16, "run": "id"}),
    "a codec with wild parameters": _column(parameters={"bits": 10**9}),
    "another dtype": lambda d: d["columns"][1]["arrays"][0].update(dtype="object"),
    "an unknown feature": lambda d: d.update(required_features=["eval"]),
    "a format from the future": lambda d: d.update(format_version="9.0"),
    "an unknown kind": lambda d: d.update(kind="exec"),
    "a digest that is none": lambda d: d["objects"]["columns/labels/c/0"].update(digest="no"),
    "a negative size": lambda d: d["objects"]["columns/labels/c/0"].update(bytes=-1),
    "an enormous size": lambda d: d["objects"]["columns/labels/c/0"].update(bytes=1 << 60),
    "no columns": lambda d: d.update(columns=[]),
    "no objects": lambda d: d.update(objects={}),
    "a member missing": lambda d: d.pop("shards"),
    "members of other types": lambda d: d.update(shards="many", columns=None),
}
ATTACKS += [Attack(f"manifest with {what}", _sealed(change)) for what, change in CHANGES.items()]


# what lies under right digests


def _array(change: Callable[[Document], Any]) -> Callable[[Path, Path], None]:
    def act(folder: Path, outside: Path) -> None:
        found = json.loads((folder / "columns/labels/zarr.json").read_bytes())
        change(found)
        put(folder, "columns/labels/zarr.json", json.dumps(found).encode())

    return act


ARRAYS: dict[str, Callable[[Document], Any]] = {
    "a pickling codec": lambda d: d.update(codecs=[{"name": "numcodecs.pickle", "configuration": {}}]),
    "an object type": lambda d: d.update(data_type="object"),
    "another shape": lambda d: d.update(shape=[1 << 40]),
    "storage transformers": lambda d: d.update(storage_transformers=[{"name": "exec"}]),
    "another fill value": lambda d: d.update(fill_value=7),
    "version 2": lambda d: d.update(zarr_format=2, filters=[{"id": "pickle"}], dtype="|O"),
}
ATTACKS += [Attack(f"zarr.json with {what}", _array(change)) for what, change in ARRAYS.items()]


@attack
def right_digest_for_the_wrong_column(folder: Path, outside: Path) -> None:
    put(folder, "columns/labels/c/0", (folder / "columns/label_logit/c/0").read_bytes())


@attack
def shards_in_each_others_place(folder: Path, outside: Path) -> None:
    first, second = ((folder / f"samples/0000{number}.parquet").read_bytes() for number in (0, 1))
    put(folder, "samples/00000.parquet", second)
    put(folder, "samples/00001.parquet", first)


@attack
def ids_beyond_the_vocabulary(folder: Path, outside: Path) -> None:
    found = document(folder)
    rows = found["chunk_rows"]
    bombed(folder, bytes(zstd.compress(np.full(rows, 60, dtype=np.uint8).tobytes(), 3)), "columns/labels/c/0")


@attack
def ranking_that_is_missing(folder: Path, outside: Path) -> None:
    reseal(folder, lambda found: found["objects"].pop("ranking/c/0"))


@attack
def ranking_with_an_id_twice(folder: Path, outside: Path) -> None:
    data = np.zeros(50, dtype="<u4")
    put(folder, "ranking/c/0", sharded([Blosc(cname="zstd", shuffle=1, typesize=4).encode(data.tobytes())]))
