"""One JSON text of a value, one digest of a content."""

from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import SourceError
from kdcache.fingerprint import canonical_json, digest_bytes, digest_file, digest_json, digest_parts, digest_without

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), VALUES, max_size=6))
def test_the_order_of_keys_does_not_matter(value: dict[str, object]) -> None:
    turned = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(turned)  # type: ignore[arg-type]
    assert digest_json(value) == digest_bytes(canonical_json(turned))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_does_not_have_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": value})


@given(st.lists(st.binary(max_size=8), max_size=6), st.lists(st.binary(max_size=8), max_size=6))
def test_where_a_part_ends_is_part_of_the_identity(a: list[bytes], b: list[bytes]) -> None:
    assert (digest_parts(a) == digest_parts(b)) == (a == b)


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # more than two blocks
    (tmp_path / "f").write_bytes(data)
    assert digest_file(tmp_path / "f") == blake3(data).hexdigest() == digest_bytes(data)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(SourceError, match="no such file"):
            digest_file(path)


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=6, unique=True))
def test_ranges_are_left_out(data: bytes, cuts: list[int]) -> None:
    ends = sorted(min(cut, len(data)) for cut in cuts)
    ranges = list(zip(ends[::2], ends[1::2], strict=False))
    kept = bytes(byte for place, byte in enumerate(data) if not any(a <= place < b for a, b in ranges))
    assert digest_without(data, ranges[::-1]) == digest_bytes(kept)
