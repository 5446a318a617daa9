"""Read a store: samples by number, shards as a whole, every byte verified before it is used.

Legend: `N` positions, `S` samples, `L` tokens of a sample, `K` kept entries, `D` hidden width.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codecs import Part, codec
from kdcache.errors import ConfigError, CorruptObjectError, MismatchError
from kdcache.remotes import is_remote, local_path
from kdcache.store.chunks import ShardSizes, decode_rows
from kdcache.store.layout import layout_of, require_layout
from kdcache.store.manifest import Manifest, ShardInfo, load_manifest
from kdcache.store.objects import Objects
from kdcache.store.ranking import read_ranking
from kdcache.store.rows import PackedShard, Sample, Shard, is_packed, targets_of
from kdcache.store.samples import read_samples
from kdcache.store.schema import COUNTS, HEAD_CHUNK_ROWS, RANKED, Column, OutputHead

if TYPE_CHECKING:
    from kdcache.store.origin import Origin

Array = NDArray[Any]


def open_store(path: Path | str, *, digest: str | None = None) -> "Store":
    """Return a finished store; reads its manifest only.

    Args:
        path: Its folder, or the URL of one that is shared: `hf://datasets/OWNER/NAME`, `s3://`, `gs://`, `az://`,
            `https://`. What is read of it is fetched, verified and kept in the cache of this machine. `#blake3=DIGEST`
            at the end pins it.
        digest: The digest it must have.

    Raises:
        IncompleteStoreError: The capture has not finished; the message says how far it is.
        CorruptObjectError: The manifest is damaged.
        UnsupportedError: A newer format or an unknown codec.
        MismatchError: It has another digest than asked for.
        AccessError: The place cannot be reached.
    """
    location, _, pin = str(path).partition("#blake3=")
    wanted = digest or pin or None
    if is_remote(location):
        from kdcache.store.origin import load_remote

        manifest, origin = load_remote(location, wanted, cached=load_manifest)
        return Store(origin.root, manifest, origin=origin)
    root = local_path(location)
    manifest = load_manifest(root)
    if wanted is not None and manifest.digest != wanted:
        raise MismatchError(f"The store's digest is {manifest.digest}, not {wanted}.", where=str(root))
    return Store(root, manifest)


class Store(Sequence[Sample]):
    """A finished store: `len(store)` samples, `store[i]` the i-th; pickles as its path and digest.

    Attributes:
        path: Its folder; of one that is somewhere else, the folder here that its objects are kept in.
        location: The folder, or the URL.
        manifest: What it says of itself.
        origin: What brings the objects of one that is somewhere else.
    """

    def __init__(self, path: Path, manifest: Manifest, *, origin: "Origin | None" = None) -> None:
        self.path = path
        self.location = str(path) if origin is None else origin.place.url
        self.manifest = manifest
        self.origin = origin
        self._objects = Objects(path, manifest.objects, None if origin is None else origin.bring)
        self._columns = {column.name: column for column in manifest.columns}
        self._checked: set[str] = set()
        self._first_samples = [shard.first_sample for shard in manifest.shards]
        self._rank_table: NDArray[np.int32] | None = None
        self._table = lru_cache(maxsize=64)(self._read_table)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.location, self.digest)

    @property
    def digest(self) -> str:
        """Identity of the content: equal for equal captures, whatever interrupted them."""
        return self.manifest.digest

    @property
    def num_positions(self) -> int:
        """All positions of all samples."""
        return self.manifest.positions

    @property
    def vocab_size(self) -> int:
        """V, the length of the teacher's row."""
        return self.manifest.vocab_size

    @property
    def k(self) -> int:
        """Entries kept of each row."""
        return self.manifest.k

    @property
    def columns(self) -> Mapping[str, Column]:
        """The per-position columns by name."""
        return self._columns

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards in order."""
        return self.manifest.shards

    @property
    def nbytes(self) -> int:
        """Bytes of all objects, the manifest itself not counted."""
        return sum(one.bytes for one in self.manifest.objects.values())

    @property
    def bytes_per_position(self) -> float:
        """Bytes of what grows with the positions: columns and sample table, not the tokenizer or the output layer."""
        counts = self.bytes_per_column()
        return sum(counts[name] for name in (*self._columns, "samples")) / self.num_positions

    def bytes_per_column(self) -> dict[str, int]:
        """Return the bytes of each column, of the sample table, and of everything else."""
        counts: dict[str, int] = dict.fromkeys(self._columns, 0)
        owners = {path: name for name, column in self._columns.items() for path, _ in column.arrays().values()}
        for name, one in self.manifest.objects.items():
            owner = owners.get("/".join(name.split("/")[:2])) or name.split("/")[0].removesuffix(".json")
            counts[owner] = counts.get(owner, 0) + one.bytes
        return counts

    def with_columns(self, names: Sequence[str]) -> "Store":
        """Return the same store as if it had only some of its columns; nothing is read of the others.

        Raises:
            ConfigError: It has no such column.
        """
        self._require_columns(names)
        view = Store(self.path, self.manifest, origin=self.origin)
        view._columns = {name: column for name, column in self._columns.items() if name in names}
        return view

    def __len__(self) -> int:
        return self.manifest.samples

    def __iter__(self) -> Iterator[Sample]:
        for index in range(len(self.shards)):
            shard = self.read_shard(index)
            for number in range(len(shard.offsets) - 1):
                rows = slice(int(shard.offsets[number]), int(shard.offsets[number + 1]))
                yield self._sample(shard.table, number, {n: v[rows] for n, v in shard.columns.items()})

    def __getitem__(self, number: Any) -> Any:
        """Return the sample of a number (negative: from the end), decoding only the chunks it needs."""
        if not isinstance(number, int | np.integer):
            raise TypeError(f"a sample has a whole number, not {number!r}")
        position = int(number) + len(self) if number < 0 else int(number)
        if not 0 <= position < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        index = bisect_right(self._first_samples, position) - 1
        table = self._table(index)
        inside = position - self._first_samples[index]
        start = table["first_row"][inside].as_py() - index * self.manifest.shard_rows
        rows = slice(start, start + table["rows"][inside].as_py())
        self._bring(index, list(self._columns))
        columns = {name: self._read(column, index, rows) for name, column in self._columns.items()}
        return self._sample(table, inside, columns)

    def read_shard(self, index: int, columns: Sequence[str] | None = None) -> Shard:
        """Return the decoded rows of a shard.

        Args:
            index: Which.
            columns: Names of the columns to decode; None for all.

        Raises:
            ConfigError: The store has no such column.
            MissingObjectError, CorruptObjectError: An object is damaged.
        """
        info = self.shards[index]
        names = list(self._columns) if columns is None else list(columns)
        self._require_columns(names)
        self._bring(index, names)
        decoded = {name: self._read(self._columns[name], index, slice(0, info.rows)) for name in names}
        return Shard(index, info.first_sample, self._offsets(index), decoded, self._table(index), self.vocab_size)

    def read_packed(
        self, index: int, columns: Sequence[str], out: Mapping[str, Mapping[str, Array]] | None = None
    ) -> PackedShard:
        """Return a shard's rows as the codecs left them, to be decoded a few at a time; errors as `read_shard`.

        Args:
            index: Which.
            columns: Names of the columns.
            out: Column to part to array with room for the shard's rows, where they go; default: fresh memory, whose
                page faults are a quarter of the whole cost.
        """
        self._require_columns(columns)
        self._bring(index, columns)
        info = self.shards[index]
        rows = slice(0, info.rows)
        parts = {}
        for name in columns:
            column = self._columns[name]
            if is_packed(column):
                parts[name] = self._parts(column, index, rows, None if out is None else out[name])
                continue
            values = self._read(column, index, rows)
            if out is not None:
                out[name][""][: info.rows] = values
                values = out[name][""][: info.rows]
            parts[name] = {"": values}
        return PackedShard(index, info.first_sample, self._offsets(index), parts)

    def trust(self, index: int, columns: Sequence[str]) -> None:
        """Do without the digests of a shard's columns: another process of the same run has just checked them."""
        for name in columns:
            for path, layout in self._columns[name].arrays().values():
                self._objects.trust(_object_name(path, layout, index))

    def _bring(self, index: int, columns: Sequence[str]) -> None:
        """Have here what a shard's columns are read from."""
        if self.origin is None:
            return
        names = [f"samples/{index:05d}.parquet"]
        for name in columns:
            for path, layout in self._columns[name].arrays().values():
                names += [f"{path}/zarr.json", _object_name(path, layout, index)]
        self._objects.bring(names)

    def output_head(self) -> OutputHead | None:
        """Return the teacher's output layer; None unless the capture was `exact`."""
        head = self.manifest.part("output_head")
        if head is None:
            return None
        kept = codec(head["codec"])

        def array(name: str, rows: int, shape: tuple[int, ...]) -> Array:
            padded = -(-rows // HEAD_CHUNK_ROWS) * HEAD_CHUNK_ROWS
            path = f"output_head/{name}"
            return kept.decode(
                {"": self._rows(path, kept.parts(shape)[""], 0, slice(0, rows), padded, HEAD_CHUNK_ROWS)}
            )

        rows = head["shape"][0]
        bias = array("bias", rows, ()) if head["bias"] else None
        return OutputHead(
            array("weight", rows, (head["shape"][1],)), bias, head["scale"], head["softcap"], head["codec"]
        )

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the verified files that reload the tokenizer, by name; empty when it keeps none."""
        prefix = "tokenizer/"
        names = [name for name in self.manifest.objects if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._objects.content(name) for name in names}

    def sample_table(self, index: int) -> pa.Table:
        """Return a shard's part of the sample table."""
        return self._table(index)

    def content(self, name: str) -> bytes:
        """Return an object's verified bytes by its name in the manifest."""
        return self._objects.content(name)

    def _read(self, column: Column, shard: int, rows: slice) -> Array:
        """Return the decoded values of a run of a shard's rows, counted from its first."""
        values = column.build().decode(self._parts(column, shard, rows))
        if column.codec == RANKED:
            values = self.ids_by_rank[values]
        if column.unit == "id" and values.size and int(values.max()) >= self.vocab_size:
            raise CorruptObjectError(
                f"The column {column.name} has an id beyond the vocabulary of {self.vocab_size}.",
                where=f"{self.path}, shard {shard}",
            )
        return values

    def _parts(
        self, column: Column, shard: int, rows: slice, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        parts = {}
        for name, (path, layout) in column.arrays().items():
            self._require_layout(path, layout)
            span = rows if layout.per == "row" else slice(0, 1)
            sizes = self.manifest.shard_rows, self.manifest.chunk_rows
            parts[name] = self._rows(path, layout, shard, span, *sizes, None if out is None else out[name])
        return parts

    def _offsets(self, index: int) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self._table(index)["rows"].to_numpy().astype(np.int64))])

    def _require_columns(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self._columns]:
            raise ConfigError(
                f"The store has no column {unknown[0]!r}.",
                where=str(self.path),
                hint=f"It has {', '.join(self._columns)}.",
            )

    @property
    def ids_by_rank(self) -> NDArray[np.int32]:
        """The id of every rank that fits its bytes; V, which is no id, for those beyond the vocabulary.

        Raises:
            CorruptObjectError: The ranking is missing or damaged.
        """
        if self._rank_table is None:
            digest = self.manifest.part("ranking")
            if not isinstance(digest, str):
                raise CorruptObjectError("The store keeps ranks and no ranking.", where=str(self.path))
            # ranks that no writer of ours made stand for an id beyond the vocabulary, which is refused
            room = np.full(1 << max(8, (self.vocab_size - 1).bit_length() + 7 & ~7), self.vocab_size, dtype=np.int32)
            room[: self.vocab_size] = read_ranking(self._objects, self.vocab_size, digest)
            self._rank_table = room
        return self._rank_table

    def _rows(
        self,
        path: str,
        layout: Part,
        shard: int,
        span: slice,
        shard_rows: int,
        chunk_rows: int,
        out: Array | None = None,
    ) -> Array:
        name = _object_name(path, layout, shard)
        size = self._objects.size(name)
        whole = 4 * (span.stop - span.start) >= shard_rows or layout.per == "shard"
        data = self._objects.part(name, 0, size) if whole else None

        def part(start: int, stop: int) -> memoryview:
            return self._objects.part(name, start, stop) if data is None else data[start:stop]

        sizes = ShardSizes(size, shard_rows, chunk_rows)
        return decode_rows(part, sizes, layout, span, where=name, out=out)

    def _require_layout(self, path: str, layout: Part) -> None:
        if path in self._checked:
            return
        rows, chunk = self.manifest.shard_rows, self.manifest.chunk_rows
        expected = layout_of(layout, len(self.shards), shard_rows=rows, chunk_rows=chunk)
        require_layout(self._objects.content(f"{path}/zarr.json"), expected, f"{path}/zarr.json")
        self._checked.add(path)

    def _read_table(self, index: int) -> pa.Table:
        name = f"samples/{index:05d}.parquet"
        info = self.shards[index]
        if name not in self.manifest.objects:
            raise CorruptObjectError("The manifest does not list a part of the sample table.", where=name)
        data = self._objects.content(name)
        try:
            table = read_samples(data, info.samples)
            rows = table["rows"].to_numpy()
            first = table["first_row"].to_numpy()
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise CorruptObjectError(f"The sample table does not decode: {error}.", where=name) from error
        begin = index * self.manifest.shard_rows + np.concatenate([[0], np.cumsum(rows.astype(np.int64))])
        if rows.min() < 1 or begin[-1] - begin[0] != info.rows or not np.array_equal(first, begin[:-1]):
            raise CorruptObjectError("The sample table does not fit the shard.", where=name)
        return table

    def _sample(self, table: pa.Table, number: int, columns: Mapping[str, Array]) -> Sample:
        labels = columns["labels"].astype(np.int64)
        inputs = columns.get("input_ids", labels[:0]).astype(np.int64)
        hidden = {
            name.removeprefix("hidden."): values for name, values in columns.items() if name.startswith("hidden.")
        }
        for name in table.column_names:
            if name.startswith("hidden."):
                hidden[name.removeprefix("hidden.")] = np.asarray(table[name][number].as_py(), dtype=np.float32)
        return Sample(
            id=table["sample_id"][number].as_py(),
            input_ids=np.append(inputs, labels[-1:]) if self.manifest.kind == "causal_lm" else inputs,
            labels=labels,
            loss_mask=columns["loss_mask"] == COUNTS,
            targets=targets_of(columns, self.vocab_size),
            hidden=hidden,
        )


def _object_name(path: str, layout: Part, shard: int) -> str:
    return "/".join([path, "c", str(shard), *("0" for _ in layout.shape)])


def _reopen(path: str, digest: str) -> Store:
    return open_store(path, digest=digest)
