"""The layout that readers require is the one that zarr-python writes, and no other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdcache.codecs import KNOWN, Part, codec
from kdcache.errors import CorruptObjectError
from kdcache.store.arrays import array_metadata
from kdcache.store.layout import layout_of, require_layout
from tests import tiny

SIZES = {"shard_rows": 64, "chunk_rows": 16}
PARTS = [part for name in KNOWN for part in codec(name).parts((6,)).values()]
PARTS += [part for name in ("integer", "float32") for part in codec(name).parts(()).values()]
PARTS += [Part("float32", (3,), compressor="none"), Part("uint8", (), compressor="none")]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_what_is_required_is_what_zarr_writes(part: Part) -> None:
    expected = layout_of(part, 5, **SIZES)
    written = array_metadata(part, 5, **SIZES)
    require_layout(written, expected, "here")
    found = json.loads(written)
    assert set(found) - set(expected) <= {"attributes", "storage_transformers", "dimension_names"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shape", 0), 319),
        (("data_type",), "int16"),
        (("fill_value",), 1),
        (("chunk_key_encoding", "configuration", "separator"), "."),
        (("codecs", 0, "configuration", "chunk_shape", 0), 32),
        (("codecs", 0, "configuration", "index_location"), "start"),
        (("codecs", 0, "configuration", "codecs", 1, "name"), "gzip"),
        (("codecs", 0, "configuration", "codecs", 0, "configuration"), {"endian": "big"}),
        (("zarr_format",), 2),
    ],
)
def test_any_other_layout_is_refused(path: tuple[Any, ...], value: Any) -> None:
    part = Part("uint16", (6,))
    document = json.loads(array_metadata(part, 5, **SIZES))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CorruptObjectError, match="not laid out"):
        require_layout(json.dumps(document).encode(), layout_of(part, 5, **SIZES), "here")


def test_another_wording_of_the_same_layout_passes() -> None:
    part = Part("uint8", (6,))
    document = json.loads(array_metadata(part, 5, **SIZES))
    document["codecs"][0]["configuration"]["codecs"][0] = {"name": "bytes", "configuration": {}}
    document["attributes"] = {"made by": "another writer"}
    require_layout(json.dumps(document, indent=4).encode(), layout_of(part, 5, **SIZES), "here")


def test_reading_imports_no_zarr(tmp_path: Path) -> None:
    tiny.write_store(tmp_path)
    code = (
        "import sys, kdcache\n"
        f"store = kdcache.open_store({str(tmp_path)!r})\n"
        "assert len(store[0].targets)\n"
        "assert 'zarr' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
