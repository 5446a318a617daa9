"""No damage is read as data: every byte of every object is behind a digest."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.errors import (
    CorruptObjectError,
    DamageError,
    IncompleteStoreError,
    KdcacheError,
    MissingObjectError,
    RefusedError,
    SourceError,
    UnsafeError,
    UnsupportedError,
)
from kdcache.store import Store, check, open_store
from kdcache.store.manifest import parse_manifest, seal
from tests import tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "store"
    tiny.write_store(folder, hidden={"final": 4})
    return folder


def read_all(folder: Path) -> list[tuple[str, bytes]]:
    """Every number a store gives, as bytes."""
    found = []
    for sample in open_store(folder):
        parts = [sample.input_ids, sample.loss_mask, sample.targets.ids, sample.targets.logits, sample.targets.tail]
        parts += [sample.targets.label_logit, *sample.hidden.values()]
        found.append((sample.id, b"".join(part.tobytes() for part in parts)))
    return found


def objects(folder: Path) -> list[Path]:
    return [folder / name for name in open_store(folder).manifest.objects]


def test_flipped_bits_are_never_read_as_data(original: Path, tmp_path: Path) -> None:
    sound = read_all(original)
    chance = random.Random(0)
    names = [*open_store(original).manifest.objects, "manifest.json"]
    refused = 0
    for trial in range(300):
        name = names[trial % len(names)]
        data = bytearray((original / name).read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        (copy / name).write_bytes(bytes(data))
        try:
            found = read_all(copy)
        except (DamageError, RefusedError):
            refused += 1
            continue
        assert found == sound, f"a flip in {name} was read as data"
        # an object that reading does not need, such as a group's zarr.json: verify must find it
        assert check(open_store(copy)) != []
    assert refused > 200


@pytest.mark.parametrize("harm", ["truncate", "empty", "extend", "delete"])
def test_objects_of_the_wrong_length_are_refused(original: Path, tmp_path: Path, harm: str) -> None:
    for path in objects(original):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        hurt = copy / path.relative_to(original)
        data = path.read_bytes()
        if harm == "delete":
            hurt.unlink()
        else:
            hurt.write_bytes({"truncate": data[:-1], "empty": b"", "extend": data + b"\0"}[harm])
        problems = check(open_store(copy), quick=True)
        assert [problem.path for problem in problems] == [str(path.relative_to(original))]
        if path.name != "zarr.json" or path.parent.name not in ("copy", "columns", "store"):
            needed = "columns/" in str(path) or "samples/" in str(path)
            if needed and path.parent.name != "columns":
                with pytest.raises(MissingObjectError if harm == "delete" else CorruptObjectError):
                    read_all(copy)


def test_swapped_and_foreign_shards_are_found(original: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny.write_store(other, hidden={"final": 4}, seed=7)
    for name in ("columns/head_ids/c/0/0", "columns/labels/c/0", "samples/00000.parquet"):
        swapped = name.replace("c/0", "c/1") if "columns" in name else "samples/00001.parquet"
        for replacement in (original / swapped, other / name):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(original, copy)
            shutil.copy(replacement, copy / name)
            with pytest.raises(CorruptObjectError):
                read_all(copy)


def test_an_unfinished_store_says_how_far_it_is(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(IncompleteStoreError, match="2 of 2 shards"):
        open_store(copy)
    with pytest.raises(IncompleteStoreError, match="neither a manifest nor a plan"):
        open_store(tmp_path)
    with pytest.raises(SourceError, match="no store here"):
        open_store(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe",
        b'{"a": 1} x',
        b"[" * 10**5,
    ],
)
def test_json_that_is_not_strict_is_refused(text: bytes) -> None:
    with pytest.raises((CorruptObjectError, UnsafeError)):
        parse_manifest(text, "here")


def edited(folder: Path, change: Callable[[dict], None]) -> bytes:  # type: ignore[type-arg]
    document = json.loads((folder / "manifest.json").read_bytes())
    change(document)
    return json.dumps(seal(document)).encode()


def test_an_edited_manifest_is_refused(original: Path) -> None:
    document = json.loads((original / "manifest.json").read_bytes())
    document["teacher"]["name"] = "another"
    with pytest.raises(CorruptObjectError, match="checksum"):
        parse_manifest(json.dumps(document).encode(), "here")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d.update(format_version="2.0"), UnsupportedError),
        (lambda d: d.update(format="other"), UnsupportedError),
        (lambda d: d.update(required_features=["encryption"]), UnsupportedError),
        (lambda d: d.update(kind="image"), UnsupportedError),
        (lambda d: d["columns"][3].update(codec="pickle"), UnsupportedError),
        (lambda d: d["columns"][3].update(shape=[2**40]), UnsafeError),
        (lambda d: d["columns"][3].update(shape=[-1]), UnsafeError),
        (lambda d: d["columns"][3].update(name="../../x"), UnsafeError),
        (lambda d: d["columns"].append(d["columns"][0]), UnsafeError),
        (lambda d: d.update(k=10**6), UnsafeError),
        (lambda d: d.update(k="8"), UnsafeError),
        (lambda d: d.update(shard_rows=2**40), UnsafeError),
        (lambda d: d.update(samples=6), UnsafeError),
        (lambda d: d["shards"][1].__setitem__(0, 0), UnsafeError),
        (lambda d: d["objects"].update({"../escape": {"bytes": 1, "digest": "0" * 64}}), UnsafeError),
        (lambda d: d["objects"].update({"/etc/x": {"bytes": 1, "digest": "0" * 64}}), UnsafeError),
        (lambda d: d["objects"].update({"c:\\x": {"bytes": 1, "digest": "0" * 64}}), UnsafeError),
        (lambda d: d["objects"].update({"con": {"bytes": 1, "digest": "0" * 64}}), UnsafeError),
        (lambda d: d["objects"].update({"a": {"bytes": -1, "digest": "0" * 64}}), UnsafeError),
        (lambda d: d["objects"].update({"a": {"bytes": 1, "digest": "xyz"}}), UnsafeError),
        (lambda d: d.pop("objects"), UnsafeError),
    ],
)
def test_a_sealed_manifest_that_no_writer_of_ours_makes_is_refused(
    original: Path,
    change: Callable[[dict], None],
    error: type[KdcacheError],  # type: ignore[type-arg]
) -> None:
    with pytest.raises(error):
        parse_manifest(edited(original, change), "here")


def test_links_are_refused(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    target = copy / "columns/labels/c/0"
    moved = tmp_path / "elsewhere"
    shutil.move(target, moved)
    target.symlink_to(moved)
    with pytest.raises(UnsafeError, match="link"):
        read_all(copy)


def test_ids_beyond_the_vocabulary_are_refused_even_with_right_digests(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    tiny.write_store(folder, vocabulary=50)
    document = json.loads((folder / "manifest.json").read_bytes())
    document["vocab_size"] = 20
    (folder / "manifest.json").write_text(json.dumps(seal(document)))
    with pytest.raises(CorruptObjectError, match="beyond the vocabulary"):
        read_all(folder)


def test_every_problem_is_listed_at_once(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    (copy / "columns/labels/c/0").unlink()
    (copy / "columns/head_ids/c/1/0").write_bytes(b"x")
    assert {problem.path for problem in check(open_store(copy))} == {
        "columns/labels/c/0",
        "columns/head_ids/c/1/0",
    }
    assert isinstance(open_store(copy), Store)


def test_what_a_manifest_says_of_layers_is_taken_only_in_its_form(original: Path) -> None:
    manifest = open_store(original).manifest
    for capture, expected in (
        (None, {}),
        ([], {}),
        ({"targets": 3}, {}),
        ({"targets": {"hidden": {"layer": "1"}}}, {}),
        ({"targets": {"hidden": [7, {"layer": "1"}, {"layer": 2, "keep": "all"}]}}, {}),
        ({"targets": {"hidden": [{"layer": "1", "keep": "masked"}]}}, {"1": "masked"}),
    ):
        assert replace(manifest, document={**manifest.document, "capture": capture}).layers == expected
