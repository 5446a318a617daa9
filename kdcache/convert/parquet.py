"""Plain Parquet, one row a sample: for data frames and query engines, and for whoever has Parquet of their own.

Legend: `L` tokens of a sample, `K` kept entries, `J` nodes of the tail's log-partition.

| column | type | what |
|---|---|---|
| sample_id | string | |
| input_ids | list of int32, L | |
| loss_mask | list of int8, L - 1 | 1 where the label counts |
| head_ids | list of lists of int32, [L - 1, K] | or `token_ids` |
| head_logits | list of lists of float32, [L - 1, K] | or `logprobs`, `top_values`: log-probabilities at T = 1 |
| tail_log_partition | list of lists of float32, [L - 1, J] | with label_logit: nothing is lost |
| label_logit | list of float32, L - 1 | |
| log_partition | list of float32, L - 1 | at T = 1, for who computes probabilities; not read back |
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.convert import Reading, Source, files_in
from kdcache.convert.nested import columns_in, count_in, lists, rectangle, rows_of, vector
from kdcache.errors import SourceError
from kdcache.store import Store
from kdcache.store.schema import COUNTS, MASKED
from kdcache.store.told import Told

Array = NDArray[Any]

WHOLE = ("head_ids", "head_logits", "tail_log_partition", "label_logit")
IDS, VALUES = ("token_ids", "head_ids", "top_indices"), ("logprobs", "top_values", "head_logits")


class PlainParquet:
    """See the module."""

    suffix = ".parquet"

    def read(self, path: Path, reading: Reading) -> Source:
        """Return what lies in a file or folder."""
        files = files_in(path, self.suffix)
        there = columns_in(files)
        whole = all(name in there for name in WHOLE)
        ids = "head_ids" if whole else next((name for name in IDS if name in there), None)
        values = "head_logits" if whole else next((name for name in VALUES if name in there), None)
        if "input_ids" not in there or ids is None or values is None:
            raise SourceError(
                f"The files have the columns {', '.join(there)}.",
                where=str(path),
                hint=f"input_ids, one of {IDS} and one of {VALUES} are needed; or another --from.",
            )
        wanted = ["input_ids", *(WHOLE if whole else (ids, values))]
        wanted += [name for name in ("sample_id", "loss_mask") if name in there]

        def samples() -> Iterator[Told]:
            for place, row in rows_of(files, wanted):
                if whole:
                    yield _whole(place, row)
                else:
                    candidates = rectangle(row[ids], "int64", -1), rectangle(row[values], "float32", -np.inf)
                    yield told(place, row, *candidates, reading)

        first = next(rows_of(files, wanted), None)
        if first is None:
            raise SourceError("The files have no rows.", where=str(path))
        lost = () if whole else ("The tail is known at T = 1 only.",)
        return Source(samples, count_in(files), None, "float32", files, lost)

    def begin(self, store: Store, folder: Path) -> None:
        """Nothing comes before the first shard."""

    def write(self, store: Store, index: int, path: Path) -> None:
        """Write a shard's samples."""
        shard = store.read_shard(index, ["input_ids", "labels", "loss_mask", *WHOLE])
        rows, targets = np.diff(shard.offsets).tolist(), shard.targets()
        assert targets is not None  # their columns were asked for
        tokens = tokens_of(shard.columns, shard.offsets)
        table = {
            "sample_id": pa.array(shard.table["sample_id"].to_pylist()),
            "input_ids": lists(np.concatenate(tokens).astype(np.int32), [len(one) for one in tokens]),
            "loss_mask": lists((shard.columns["loss_mask"]).astype(np.int8), rows),
            "head_ids": lists(targets.ids, rows),
            "head_logits": lists(targets.logits, rows),
            "tail_log_partition": lists(targets.tail, rows),
            "label_logit": lists(targets.label_logit, rows),
            "log_partition": lists(targets.log_partition(1.0).astype(np.float32), rows),
        }
        pq.write_table(pa.table(table), path, compression="zstd", write_page_checksum=True, row_group_size=256)

    def lost(self, store: Store) -> list[str]:
        """Return what does not come along."""
        more = [name for name in store.columns if name.startswith(("hidden.", "draw_"))]
        said = ["Digests, fingerprints of teacher and data, tokenizer and output layer stay behind."]
        return said + ([f"The columns {', '.join(more)} stay behind."] if more else [])


def tokens_of(columns: Any, offsets: Any) -> "list[np.ndarray[Any, Any]]":
    """Return the tokens of every sample: its inputs, and its last label."""
    inputs, labels = columns["input_ids"], columns["labels"]
    return [np.append(inputs[start:stop], labels[stop - 1]) for start, stop in pairwise(offsets)]


def told(place: str, row: Mapping[str, Any], candidates: Array, said: Array, reading: Reading) -> Told:
    """Return a sample of tokens and candidates; a row of candidates more than labels, the last, is left out."""
    tokens = vector(row["input_ids"], "int64")
    rows = len(tokens) - 1
    if candidates.shape != said.shape or len(said) not in (rows, rows + 1):
        raise SourceError(
            f"{len(tokens)} tokens have {said.shape} log-probabilities of {candidates.shape} ids.",
            where=place,
            hint="Row t says what follows token t: as many rows as tokens, or one less.",
        )
    counts = np.ones(rows, dtype=bool)
    if "loss_mask" in row:
        counts = vector(row["loss_mask"], "int64")[:rows] == COUNTS
    if reading.pad_id is not None:
        counts &= np.flip(np.cumsum(np.flip(tokens[1:] != reading.pad_id))) > 0
    name = str(row["sample_id"].as_py()) if "sample_id" in row else place
    return Told(name, tokens, counts, candidates[:rows], said[:rows])


def _whole(place: str, row: Mapping[str, Any]) -> Told:
    tokens = vector(row["input_ids"], "int64")
    rows = len(tokens) - 1
    mask = vector(row["loss_mask"], "int32") if "loss_mask" in row else np.full(rows, COUNTS, dtype=np.int32)
    columns = {
        "loss_mask": np.where((mask >= MASKED) & (mask <= 2), mask, MASKED),
        "head_ids": rectangle(row["head_ids"], "int32", 0),
        "head_logits": rectangle(row["head_logits"], "float32", 0),
        "tail_log_partition": rectangle(row["tail_log_partition"], "float32", 0),
        "label_logit": vector(row["label_logit"], "float32"),
    }
    if any(len(one) != rows for one in columns.values()):
        raise SourceError(f"{len(tokens)} tokens need {rows} rows of every column.", where=place)
    name = str(row["sample_id"].as_py()) if "sample_id" in row else place
    empty = np.zeros((rows, 0))
    return Told(name, tokens, mask == COUNTS, empty.astype(np.int64), empty.astype(np.float32), columns)


plugin = PlainParquet
