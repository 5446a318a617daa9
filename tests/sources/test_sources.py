"""Every kind of source: its documents, its identity, its mistakes."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.errors import AccessError, ConfigError, SourceError
from kdcache.sources import Document, Source, SourceConfig, open_source

ROWS = [{"id": f"r{n}", "text": f"text number {n}", "other": n} for n in range(7)]


def write(folder: Path, kind: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    elif kind == "gz":
        path = folder / "rows.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))
    elif kind == "parquet":
        path = folder / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    elif kind == "text":
        path = folder / "rows.txt"
        path.write_text("\n".join(row["text"] for row in ROWS))  # type: ignore[misc]
    else:
        import datasets

        path = folder / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return str(path)


def opened(path: str, **keys: Any) -> Source:
    return open_source(SourceConfig(path=path, **keys))


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "text", "huggingface"])
def test_documents_come_in_order_by_number(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    source = opened(path, documents="line")
    assert len(source) == 7
    assert [source[n].text for n in (6, 0, 3)] == ["text number 6", "text number 0", "text number 3"]
    assert len({source[n].id for n in range(7)}) == 7
    with pytest.raises(IndexError):
        source[7]
    assert opened(path, documents="line").fingerprint == source.fingerprint
    assert str(tmp_path) not in json.dumps(source.fingerprint)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_the_fingerprint_follows_the_content(tmp_path: Path, kind: str) -> None:
    before = opened(write(tmp_path / "a", kind), documents="line").fingerprint
    ROWS[3]["text"] = "changed"
    try:
        after = opened(write(tmp_path / "b", kind), documents="line").fingerprint
    finally:
        ROWS[3]["text"] = "text number 3"
    assert before != after


def test_offset_and_limit_cut_and_are_part_of_the_identity(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    cut = opened(path, offset=2, limit=3)
    assert [cut[n].text for n in range(len(cut))] == ["text number 2", "text number 3", "text number 4"]
    assert cut.fingerprint != opened(path).fingerprint
    with pytest.raises(SourceError, match="No document is left"):
        opened(path, offset=9)


@pytest.mark.parametrize(
    ("how", "texts"), [("file", ["a b\n\nc\nd\n"]), ("paragraph", ["a b", "c\nd\n"]), ("line", ["a b", "c", "d"])]
)
def test_text_files_are_cut_as_asked(tmp_path: Path, how: Any, texts: list[str]) -> None:
    (tmp_path / "x.txt").write_text("a b\n\nc\nd\n")
    source = opened(str(tmp_path), documents=how)
    assert [source[n].text for n in range(len(source))] == texts


def test_ids_come_from_a_field_or_from_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    assert opened(path, id_field="id")[2].id == "r2"
    assert opened(path)[0].id == "rows.jsonl:1"
    with pytest.raises(SourceError, match="no field 'uid'"):
        opened(path, id_field="uid")[0]


def test_chats_prompts_and_ids_are_recognised(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "p", "completion": "c"},
        {"input_ids": [1, 2, 3]},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    source = opened(str(path))
    assert source[0].messages == rows[0]["messages"]
    assert (source[1].prompt, source[1].completion) == ("p", "c")
    assert source[2] == Document("mixed.jsonl:3", input_ids=[1, 2, 3])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"other": 1}', "none of the fields"),
        ('{"text": 5}', "holds int, not str"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
    ],
)
def test_a_bad_record_says_where_it_is(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    source = opened(str(path))
    with pytest.raises(SourceError, match=message) as caught:
        source[1]
    assert "bad.jsonl:2" in str(caught.value)


def test_missing_empty_and_unreadable_data_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        opened(str(tmp_path / "none.txt"))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(SourceError, match="empty"):
        opened(str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(SourceError, match="not UTF-8"):
        opened(str(tmp_path / "latin.txt"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(AccessError, match="Parquet"):
        opened(str(tmp_path / "broken.parquet"))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(AccessError, match="cannot be read"):
        opened(str(tmp_path / "broken.jsonl.gz"))
    (tmp_path / "data.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match="cannot be told"):
        opened(str(tmp_path / "data.bin"))
    with pytest.raises(ConfigError, match="no source named"):
        opened(str(tmp_path / "empty.jsonl"), kind="csv")


def test_a_parquet_file_without_the_field_names_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="none of the fields") as caught:
        opened(str(tmp_path / "a.parquet"))
    assert "'body'" in str(caught.value)
    assert opened(str(tmp_path / "a.parquet"), text_field="body")[0].text == "x"
