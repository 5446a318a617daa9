"""Write a store: the plan first, shards in any order, the manifest last.

Legend: `N` positions of a shard, `S` its samples.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.codecs import codec
from kdcache.errors import CorruptObjectError, IncompleteStoreError, MismatchError, TeacherNumericsError
from kdcache.fingerprint import canonical_json, digest_bytes, digest_json
from kdcache.store.arrays import array_metadata, encode_column, encode_shard, group_metadata
from kdcache.store.manifest import FILE, FORMAT, VERSION, load_manifest, seal, strict_json
from kdcache.store.objects import Object, Objects, write_object
from kdcache.store.progress import PLAN_FILE, committed, receipt_name
from kdcache.store.ranking import ranks, read_ranking, write_ranking
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
    """Writes the shards of one plan; made by `open`.

    Attributes:
        committed: Shards that are durable already.
        digest: The store's digest once it is complete, else None.
    """

    def __init__(self, root: Path, plan: StorePlan, start: dict[str, Object], digest: str | None) -> None:
        self.root = root
        self.plan = plan
        self.digest = digest
        self.committed = committed(root)
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
        if (root / PLAN_FILE).is_file():
            document = strict_json((root / PLAN_FILE).read_bytes(), str(root / PLAN_FILE))
            if differences := differing(document["plan"], plan.as_json()):
                raise MismatchError(
                    "The folder holds a capture made with other settings: " + "; ".join(differences[:8]) + ".",
                    where=str(root),
                    hint="Choose another --out, or go back to the settings it was begun with.",
                )
            start = {name: Object(one["bytes"], one["digest"]) for name, one in document["objects"].items()}
            digest = load_manifest(root).digest if (root / FILE).is_file() else None
            return cls(root, plan, start, digest)
        start = _write_start(root, plan)
        document = {
            "format": FORMAT,
            "format_version": VERSION,
            "store_id": digest_json(plan.as_json()),
            "plan": plan.as_json(),
            "objects": _listed(start),
        }
        write_object(root, PLAN_FILE, canonical_json(document))
        return cls(root, plan, start, None)

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
        plan, digest = document["plan"], document["plan"].get("ranking")
        listed = {name: Object(one["bytes"], one["digest"]) for name, one in document["objects"].items()}
        found = None if digest is None else read_ranking(Objects(root, listed), plan["vocab_size"], digest)
        return Begun(plan["k"], found)

    def write_shard(self, index: int, columns: Mapping[str, Array], samples: SampleTable) -> int:
        """Commit one shard; return the bytes written. A shard that is committed already is left alone.

        Args:
            index: Which shard of the plan.
            columns: Decoded values [N, *shape] of every column of the plan.
            samples: Its samples; their rows add up to N.

        Raises:
            TeacherNumericsError: A value that the column's codec cannot keep.
            MismatchError: Columns, samples or rows are not those of the plan.
            StorageFullError: There is no space; nothing of this shard is named anywhere.
        """
        if index in self.committed:
            return 0
        self._check(index, columns, samples)
        objects: dict[str, Object] = {}
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
                name = f"{path}/c/{index}{suffix}"
                objects[name] = write_object(self.root, name, data)
        name = f"samples/{index:05d}.parquet"
        objects[name] = write_object(self.root, name, self._sample_table(index, columns, samples))
        invalid = int((np.asarray(columns["loss_mask"]) == INVALID).sum())
        receipt = {
            "store_id": self._store_id,
            "shard": index,
            "invalid_rows": invalid,
            "objects": _listed(objects),
        }
        write_object(self.root, receipt_name(index), canonical_json(receipt))
        self.committed.add(index)
        return sum(one.bytes for one in objects.values())

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
        missing = sorted(set(range(len(self.plan.shards))) - self.committed)
        if missing:
            raise IncompleteStoreError(f"{len(missing)} shards are not committed yet.", where=str(self.root))
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
        write_object(self.root, FILE, canonical_json(sealed))
        self.digest = str(sealed["digest"])
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


def _write_start(root: Path, plan: StorePlan) -> dict[str, Object]:
    groups = ["zarr.json", "columns/zarr.json"] + (["output_head/zarr.json"] if plan.output_head else [])
    written = {name: write_object(root, name, group_metadata()) for name in groups}
    for column in plan.columns:
        for path, layout in column.arrays().values():
            name = f"{path}/zarr.json"
            data = array_metadata(layout, len(plan.shards), shard_rows=plan.shard_rows, chunk_rows=plan.chunk_rows)
            written[name] = write_object(root, name, data)
    for file, content in plan.tokenizer_files.items():
        written[f"tokenizer/{file}"] = write_object(root, f"tokenizer/{file}", content)
    if plan.output_head:
        written |= _write_head(root, plan.output_head)
    if plan.ranking is not None:
        written |= write_ranking(root, plan.ranking)
    return written


def _write_head(root: Path, head: OutputHead) -> dict[str, Object]:
    written = {}
    for name, values in (("weight", head.weight), ("bias", head.bias)):
        if values is None:
            continue
        kept = codec(head.codec)
        rows = -(-len(values) // HEAD_CHUNK_ROWS) * HEAD_CHUNK_ROWS
        part = kept.parts(values.shape[1:])[""]
        path = f"output_head/{name}"
        suffix, data = encode_shard(part, kept.encode(values)[""], shard_rows=rows, chunk_rows=HEAD_CHUNK_ROWS)
        metadata = array_metadata(part, 1, shard_rows=rows, chunk_rows=HEAD_CHUNK_ROWS)
        written[f"{path}/zarr.json"] = write_object(root, f"{path}/zarr.json", metadata)
        written[f"{path}/c/0{suffix}"] = write_object(root, f"{path}/c/0{suffix}", data)
    return written


def _listed(objects: Mapping[str, Object]) -> dict[str, Any]:
    return {name: {"bytes": one.bytes, "digest": one.digest} for name, one in sorted(objects.items())}


__all__ = ["COUNTS", "INVALID", "SampleTable", "StoreWriter"]
