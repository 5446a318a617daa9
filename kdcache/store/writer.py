"""Write a store: the plan first, shards in any order by any number of writers, the manifest last.

Legend: `N` positions of a shard, `S` its samples.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import AccessError, CorruptObjectError, IncompleteStoreError, MismatchError
from kdcache.fingerprint import canonical_json, digest_json
from kdcache.store import disk
from kdcache.store.commit import STAGING, Claims, Stage, clear, put, settle
from kdcache.store.disk import storage_errors
from kdcache.store.encode import SampleTable, shard_objects, start_objects
from kdcache.store.manifest import COMPLETE, FILE, FORMAT, VERSION, load_manifest, seal, strict_json
from kdcache.store.objects import Object, Objects
from kdcache.store.progress import PLAN_FILE, committed, receipt_name
from kdcache.store.ranking import ranks, read_ranking
from kdcache.store.schema import ALIGNMENT, COUNTS, INVALID, StorePlan, features_of

Array = NDArray[Any]


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
            for name, data in shard_objects(self.plan, self._ranks, index, columns, samples):
                stage.write(name, data)
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
        features = features_of(self.plan.columns)
        document = {
            "format": FORMAT,
            "format_version": VERSION if features else COMPLETE,
            "required_features": features,
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
        for name, data in start_objects(plan):
            stage.write(name, data)
        begun = {
            "format": FORMAT,
            "format_version": COMPLETE,
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


def _listed(objects: Mapping[str, Object]) -> dict[str, Any]:
    return {name: {"bytes": one.bytes, "digest": one.digest} for name, one in sorted(objects.items())}


__all__ = ["COUNTS", "INVALID", "SampleTable", "StoreWriter"]
