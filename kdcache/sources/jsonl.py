"""`jsonl`: one JSON object a line, plain or gzipped; read by byte offset, so memory does not grow with the file."""

import gzip
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any, BinaryIO, cast

from blake3 import blake3

from kdcache.errors import AccessError, SourceError
from kdcache.sources import Document, SourceConfig, document_of, find_files


class JsonLinesSource:
    """The records of one or more JSON Lines files; ids are file name and line number unless a field gives them."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._files: list[Path] = find_files(config.path, (".jsonl", ".ndjson", ".jsonl.gz"))
        self._offsets: list[list[tuple[int, int]]] = []
        self._firsts: list[int] = []
        self._digests: list[list[str]] = []
        self._handles: dict[int, BinaryIO] = {}
        count = 0
        for number, file in enumerate(self._files):
            self._firsts.append(count)
            offsets, state, position = [], blake3(), 0
            try:
                for line_number, line in enumerate(self._open(number)):
                    state.update(line)
                    if line.strip():
                        offsets.append((position, line_number + 1))
                    position += len(line)
            except (OSError, EOFError, gzip.BadGzipFile) as error:
                raise AccessError(f"The file cannot be read: {error}.", where=str(file)) from error
            self._offsets.append(offsets)
            self._digests.append([file.name, state.hexdigest()])
            count += len(offsets)
        self._count = count

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Names and digests of the files, and the fields that are read."""
        fields = self._config.model_dump(
            include={"text_field", "messages_field", "prompt_field", "completion_field", "input_ids_field", "id_field"}
        )
        return {"kind": "jsonl", "files": self._digests, **fields}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self._count:
            raise IndexError(index)
        number = bisect_right(self._firsts, index) - 1
        offset, line_number = self._offsets[number][index - self._firsts[number]]
        handle = self._open(number)
        handle.seek(offset)
        name = self._files[number].name
        where = f"{self._files[number]}:{line_number}"
        try:
            row = json.loads(handle.readline().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"The line is not JSON: {error}.", where=where) from error
        if not isinstance(row, dict):
            raise SourceError("The line is not a JSON object.", where=where)
        return document_of(row, f"{name}:{line_number}", self._config, where)

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonLinesSource, (self._config,)

    def _open(self, number: int) -> BinaryIO:
        if number not in self._handles:
            file = self._files[number]
            try:
                # kept open for random access, closed with the source
                opened = gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # noqa: SIM115
            except OSError as error:
                raise AccessError(f"The file cannot be read: {error.strerror}.", where=str(file)) from error
            self._handles[number] = cast(BinaryIO, opened)
        self._handles[number].seek(0)
        return self._handles[number]

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            handle.close()


plugin = JsonLinesSource
