"""Write a store: the plan first, shards in any order by any number of writers, the manifest last.

Legend: `N` positions of a shard, `S` its samples.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.codecs import codec
from kdcache.errors import AccessError, CorruptObjectError, IncompleteStoreError, MismatchError, TeacherNumericsError
from kdcache.fingerprint import canonical_json, digest_bytes, digest_json
from kdcache.store import disk
from kdcache.store.arrays import array_metadata, encode_column, encode_shard, group_metadata
from kdcache.store.commit import STAGING, Claims, Stage, clear, put, settle
from kdcache.store.disk import storage_errors
from kdcache.store.manifest import FILE, FORMAT, VERSION, load_manifest, seal, strict_json
from kdcache.store.objects import Object, Objects
from kdcache.store.progress import PLAN_FILE, committed, receipt_name
from kdcache.store.ranking import ranking_objects, ranks, read_ranking
from kdcache.store.schema import ALIGNMENT, COUNTS, HEAD_CHUNK_ROWS, INVALID, OutputHead, StorePlan

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The samples of one shard, in order.

    Attributes:
        ids: One stable, unique id each.
        rows: int [S], positions of each.
        extra: Further columns of the sample table, each [S, ...] float32 (pooled features).
    """

    ids: Sequence[str]
    rows: Array
    extra: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Begun:
    """What a begun store settled by looking at the teacher; who goes on with it keeps to it.

    Attributes:
        k: Entries kept.
        ranking: int32 [V], ids by rank, or None.
    """

    k: int
    ranking: NDArray[np.int32] | None


class StoreWriter:
    """Writes the shards of one plan, beside any number of others in other processes and hosts; made by `open`.

    Attributes:
        committed: Shards that are durable already, as far as was looked.
        digest: The store's digest once it is complete, else None.
    """

    def __init__(self, root: Path, plan: StorePlan, start: dict[str, Object], digest: str | None) -> None:
        self.root = root
        self.plan = plan
        self.digest = digest
        self.committed = committed(root)
        self._claims = Claims(root)
        self._start = start
        self._store_id = digest_json(plan.as_json())
        self._ranks = ranks(np.zeros(0, np.int32) if plan.ranking is None else plan.ranking)

    @classmethod
    def open(cls, path: Path | str, plan: StorePlan) -> "StoreWriter":
        """Return a writer that begins a store, or goes on with one of the same plan.

        Raises:
            MismatchError: The folder holds a store of another plan; every differing key is listed.
            StorageFullError: There is no space.
            AccessError: The folder may not be written to.
        """
        root = Path(path)
        if not (root / PLAN_FILE).is_file():
            _begin(root, plan)
        document = strict_json((root / PLAN_FILE).read_bytes(), str(root / PLAN_FILE))
        if differences := differing(document["plan"], plan.as_json()):
            raise MismatchError(
                "The folder holds a capture made with other settings: " + "; ".join(differences[:8]) + ".",
                where=str(root),
                hint="Choose another --out, or go back to the settings it was begun with.",
            )
        digest = load_manifest(root).digest if (root / FILE).is_file() else None
        start = {name: Object(one["bytes"], one["digest"]) for name, one in document["objects"].items()}
        writer = cls(root, plan, start, digest)
        if digest is None:
            settle(root, document)
            writer._settle_shards()
        else:
            clear(root)
        return writer

    @staticmethod
    def begun(path: Path | str) -> "Begun | None":
        """Return what a store that was begun in a folder has settled; None where there is none.

        Raises:
            CorruptObjectError: It is damaged.
        """
        root = Path(path)
        if not (root / PLAN_FILE).is_file():
            return None
        document = strict_json((root / PLAN_FILE).read_bytes(), str(root / PLAN_FILE))
        settle(root, document)
        plan, digest = document["plan"], document["plan"].get("ranking")
        listed = {name: Object(one["bytes"], one["digest"]) for name, one in document["objects"].items()}
        found = None if digest is None else read_ranking(Objects(root, listed), plan["vocab_size"], digest)
        return Begun(plan["k"], found)

    def write_shard(self, index: int, columns: Mapping[str, Array], samples: SampleTable) -> int:
        """Commit one shard; return its bytes, 0 if another writer was first: what is committed is left alone.

        Args:
            index: Which shard of the plan.
            columns: Decoded values [N, *shape] of every column of the plan.
            samples: Its samples; their rows add up to N.

        Raises:
            TeacherNumericsError: A value that the column's codec cannot keep.
            MismatchError: Columns, samples or rows are not those of the plan.
            StorageFullError: There is no space; nothing of this shard is named anywhere.
        """
        if self.overtaken(index):
            return 0
        self._check(index, columns, samples)
        stage = None
        try:
            stage = Stage(self.root, self._claims.writer, f"{index:05d}")
            self._stage(stage, index, columns, samples)
            receipt = {
                "store_id": self._store_id,
                "shard": index,
                "invalid_rows": int((np.asarray(columns["loss_mask"]) == INVALID).sum()),
                "objects": _listed(stage.objects),
            }
            won = stage.commit(receipt_name(index), receipt)
        except BaseException as error:
            if stage is not None:
                stage.discard()
            # who comes first clears away what others staged
            lost = stage is None or not stage.named
            if not isinstance(error, AccessError) or not lost or not self.overtaken(index):
                raise
            won = False
        self.committed.add(index)
        return sum(one.bytes for one in stage.objects.values()) if won and stage is not None else 0

    def overtaken(self, index: int) -> bool:
        """Say whether a shard is committed, by whomever."""
        if index not in self.committed and (self.root / receipt_name(index)).is_file():
            self.committed.add(index)
        return index in self.committed

    def unmade(self) -> Iterator[int]:
        """Yield the shards that this writer should make, one when the one before is on its way.

        First those that nobody claimed, in order; then those that others claimed and have not committed: they may be
        dead. Who is overtaken by a living one after all has made a shard for nothing, and every row is there once.
        """
        everything = range(len(self.plan.shards))
        mine = set()
        for index in everything:
            if not self.overtaken(index) and self._claims.claim(index):
                mine.add(index)
                yield index
        for index in sorted(everything, key=lambda shard: self._claims.turn(shard, len(everything))):
            if index not in mine and not self.overtaken(index):
                yield index

    def _stage(self, stage: Stage, index: int, columns: Mapping[str, Array], samples: SampleTable) -> None:
        for column in self.plan.columns:
            values = np.asarray(columns[column.name])
            rows = {"shard_rows": self.plan.shard_rows, "chunk_rows": self.plan.chunk_rows}
            try:
                made = encode_column(column, values, self._ranks, **rows)
            except ValueError as error:
                raise TeacherNumericsError(
                    f"The column {column.name} cannot be kept: {error}.",
                    where=f"shard {index}",
                    hint="Set targets.logits (or the layer's dtype) to float32, or on_invalid to skip.",
                ) from error
            for (path, suffix), data in made.items():
                stage.write(f"{path}/c/{index}{suffix}", data)
        stage.write(f"samples/{index:05d}.parquet", self._sample_table(index, columns, samples))

    def _settle_shards(self) -> None:
        """Put in place what writers committed and had no time to; they say so by what they left."""
        stages = {path.name.rpartition("-")[2] for path in (self.root / STAGING).glob("*-*")}
        for index in self.committed:
            if f"{index:05d}" in stages:
                settle(self.root, self._receipt(index))

    def finish(self, provenance: Mapping[str, Any] | None = None) -> str:
        """Write the manifest and return the store's digest.

        Args:
            provenance: Who, when, with what versions; not part of the digest.

        Raises:
            IncompleteStoreError: Shards are missing.
            CorruptObjectError: A receipt is damaged or belongs to another store.
        """
        if self.digest:
            return self.digest
        self.committed = committed(self.root)
        missing = sorted(set(range(len(self.plan.shards))) - self.committed)
        if missing:
            raise IncompleteStoreError(f"{len(missing)} shards are not committed yet.", where=str(self.root))
        self._settle_shards()
        objects = dict(self._start)
        shards = []
        for index, shard in enumerate(self.plan.shards):
            receipt = self._receipt(index)
            objects |= {name: Object(one["bytes"], one["digest"]) for name, one in receipt["objects"].items()}
            shards.append([shard.first_sample, shard.samples, shard.rows, receipt["invalid_rows"]])
        document = {
            "format": FORMAT,
            "format_version": VERSION,
            "required_features": [],
            "alignment": ALIGNMENT[self.plan.kind],
            **self.plan.as_json(),
            "samples": sum(shard.samples for shard in self.plan.shards),
            "positions": sum(shard.rows for shard in self.plan.shards),
            "shards": shards,
            "objects": _listed(objects),
            "provenance": dict(provenance or {}),
        }
        sealed = seal(document)
        with storage_errors(self.root / FILE):
            try:
                disk.make(self.root / STAGING)
                draft = self.root / STAGING / f"{self._claims.writer}-manifest"
                disk.write(draft, canonical_json(sealed))
                first = put(self.root, FILE, draft)
            except FileNotFoundError:  # whoever was faster has cleared away what only unfinished stores need
                if not (self.root / FILE).is_file():
                    raise
                first = False
            clear(self.root)
        self.digest = str(sealed["digest"]) if first else load_manifest(self.root).digest
        return self.digest

    def _receipt(self, index: int) -> dict[str, Any]:
        path = self.root / receipt_name(index)
        receipt = strict_json(path.read_bytes(), str(path))
        if receipt.get("store_id") != self._store_id or receipt.get("shard") != index:
            raise CorruptObjectError(
                "The receipt belongs to another shard or store.",
                where=str(path),
                hint="Delete this receipt and run the same command again; the shard is captured anew.",
            )
        return receipt

    def _check(self, index: int, columns: Mapping[str, Array], samples: SampleTable) -> None:
        plan = self.plan.shards[index]
        rows = int(np.asarray(samples.rows).sum())
        wanted = {column.name for column in self.plan.columns}
        if set(columns) != wanted:
            raise MismatchError(f"The shard has columns {sorted(columns)}, the plan {sorted(wanted)}.")
        if (len(samples.ids), rows) != (plan.samples, plan.rows):
            raise MismatchError(
                f"The shard has {len(samples.ids)} samples in {rows} rows, the plan {plan.samples} in {plan.rows}.",
                where=f"shard {index}",
            )
        for column in self.plan.columns:
            found = np.asarray(columns[column.name]).shape
            if found != (plan.rows, *column.shape):
                raise MismatchError(f"The column {column.name} is {found}, not {(plan.rows, *column.shape)}.")
            if column.unit == "id" and len(columns[column.name]):
                largest = int(np.asarray(columns[column.name]).max())
                if largest >= self.plan.vocab_size:
                    raise MismatchError(
                        f"The column {column.name} has the id {largest}, beyond the vocabulary of "
                        f"{self.plan.vocab_size}.",
                        where=f"shard {index}",
                    )

    def _sample_table(self, index: int, columns: Mapping[str, Array], samples: SampleTable) -> bytes:
        rows = np.asarray(samples.rows, dtype=np.int64)
        ends = np.cumsum(rows)
        shifted = int(self.plan.kind == "causal_lm")
        digests = [
            token_digest(columns["input_ids"][end - count : end], columns["labels"][end - count : end])
            for end, count in zip(ends.tolist(), rows.tolist(), strict=True)
        ]
        table: dict[str, Any] = {
            "sample_id": pa.array(list(samples.ids), pa.string()),
            "first_row": pa.array(index * self.plan.shard_rows + ends - rows, pa.int64()),
            "rows": pa.array(rows, pa.int32()),
            "tokens": pa.array(rows + shifted, pa.int32()),
            "token_digest": pa.array(digests, pa.binary(16)),
        }
        for name, values in samples.extra.items():
            flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
            table[name] = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
        sink = io.BytesIO()
        pq.write_table(pa.table(table), sink, compression="zstd", write_page_checksum=True)
        return sink.getvalue()


def token_digest(input_ids: Array, labels: Array) -> bytes:
    """Return the 16-byte identity of a sample's tokens: BLAKE3 over its inputs and last label as int64."""
    tokens = np.append(np.asarray(input_ids, dtype="<i8"), np.asarray(labels[-1:], dtype="<i8"))
    return bytes.fromhex(digest_bytes(tokens.tobytes())[:32])


def differing(old: Any, new: Any, key: str = "") -> list[str]:
    """Return one line for each place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            lines += differing(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        return lines
    if old == new:
        return []
    short = [text if len(text := repr(value)) < 60 else text[:57] + "..." for value in (old, new)]
    return [f"{key} was {short[0]}, now {short[1]}"]


def _begin(root: Path, plan: StorePlan) -> None:
    stage = Stage(root, Claims(root).writer, "start")
    try:
        for name, data in _start_objects(plan):
            stage.write(name, data)
        begun = {
            "format": FORMAT,
            "format_version": VERSION,
            "store_id": digest_json(plan.as_json()),
            "plan": plan.as_json(),
            "objects": _listed(stage.objects),
        }
        stage.commit(PLAN_FILE, begun)
    except BaseException as error:
        stage.discard()
        # who comes first clears away what others staged
        if not isinstance(error, AccessError) or stage.named or not (root / PLAN_FILE).is_file():
            raise


def _start_objects(plan: StorePlan) -> Iterator[tuple[str, bytes]]:
    """Yield what a store has before its first shard, by name."""
    for name in ["zarr.json", "columns/zarr.json"] + (["output_head/zarr.json"] if plan.output_head else []):
        yield name, group_metadata()
    for column in plan.columns:
        for path, layout in column.arrays().values():
            rows = {"shard_rows": plan.shard_rows, "chunk_rows": plan.chunk_rows}
            yield f"{path}/zarr.json", array_metadata(layout, len(plan.shards), **rows)
    for file, content in plan.tokenizer_files.items():
        yield f"tokenizer/{file}", content
    if plan.output_head:
        yield from _head_objects(plan.output_head)
    if plan.ranking is not None:
        yield from ranking_objects(plan.ranking)


def _head_objects(head: OutputHead) -> Iterator[tuple[str, bytes]]:
    for name, values in (("weight", head.weight), ("bias", head.bias)):
        if values is None:
            continue
        kept = codec(head.codec)
        rows = -(-len(values) // HEAD_CHUNK_ROWS) * HEAD_CHUNK_ROWS
        part = kept.parts(values.shape[1:])[""]
        path = f"output_head/{name}"
        suffix, data = encode_shard(part, kept.encode(values)[""], shard_rows=rows, chunk_rows=HEAD_CHUNK_ROWS)
        yield f"{path}/zarr.json", array_metadata(part, 1, shard_rows=rows, chunk_rows=HEAD_CHUNK_ROWS)
        yield f"{path}/c/0{suffix}", data


def _listed(objects: Mapping[str, Object]) -> dict[str, Any]:
    return {name: {"bytes": one.bytes, "digest": one.digest} for name, one in sorted(objects.items())}


__all__ = ["COUNTS", "INVALID", "SampleTable", "StoreWriter"]
