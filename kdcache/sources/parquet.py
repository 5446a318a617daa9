"""`parquet`: rows of one or more Parquet files, read a row group at a time."""

from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import AccessError, SourceError
from kdcache.fingerprint import digest_file
from kdcache.sources import Document, SourceConfig, document_of, find_files


class ParquetSource:
    """The rows of Parquet files; ids are file name and row number unless a field gives them."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._files: list[Path] = find_files(config.path, (".parquet",))
        self._groups: list[tuple[int, int, int]] = []  # file, row group, first row within the file
        self._firsts: list[int] = []
        self._digests = [[file.name, digest_file(file)] for file in self._files]
        wanted = {
            config.text_field,
            config.messages_field,
            config.prompt_field,
            config.completion_field,
            config.input_ids_field,
            config.id_field,
        }
        self._columns: list[str] = []
        count = 0
        for number, file in enumerate(self._files):
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise AccessError(f"The file cannot be read as Parquet: {error}.", where=str(file)) from error
            names = metadata.schema.to_arrow_schema().names
            self._columns = [name for name in names if name in wanted]
            if not self._columns:
                document_of(dict.fromkeys(names), "", config, str(file))
            first = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group, first))
                self._firsts.append(count)
                first += metadata.row_group(group).num_rows
                count += metadata.row_group(group).num_rows
        self._count = count
        self._read = lru_cache(maxsize=2)(self._read_group)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Names and digests of the files, and the fields that are read."""
        return {"kind": "parquet", "files": self._digests, "columns": self._columns}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self._count:
            raise IndexError(index)
        group = bisect_right(self._firsts, index) - 1
        number, _, first = self._groups[group]
        inside = index - self._firsts[group]
        row = {name: values[inside].as_py() for name, values in self._read(group).items()}
        name = f"{self._files[number].name}:{first + inside}"
        return document_of(row, name, self._config, name)

    def _read_group(self, group: int) -> dict[str, Any]:
        number, inside, _ = self._groups[group]
        try:
            table = pq.ParquetFile(self._files[number]).read_row_group(inside, columns=self._columns)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"A row group does not decode: {error}.", where=str(self._files[number])) from error
        return {name: table[name] for name in table.column_names}


plugin = ParquetSource
