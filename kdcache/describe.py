"""What a store says of itself, as JSON-ready values: for `kdcache info` and `kdcache head`. Imports no torch."""

import math
from pathlib import Path
from typing import Any

from kdcache.errors import IncompleteStoreError
from kdcache.remotes import is_remote
from kdcache.store import VERSION, Store, open_store, progress
from kdcache.tokenizer import decoder


def summary(path: Path | str) -> dict[str, Any]:
    """Return what a store holds; of an unfinished one, how far it is.

    `bytes_per_position` is that of the store: columns and sample table, not the tokenizer or the output layer.

    Raises:
        IncompleteStoreError: The folder holds neither a store nor the beginning of one.
        CorruptObjectError, UnsupportedError: The manifest is damaged or too new.
    """
    try:
        store = open_store(path)
    except IncompleteStoreError as error:
        begun = None if is_remote(path) else progress(Path(path))
        if begun is None:
            raise
        return {
            "path": str(path) if is_remote(path) else Path(path).name,
            "format_version": VERSION,
            "complete": False,
            "samples": sum(samples for _, samples, _ in begun.plan["shards"]),
            "positions": sum(rows for _, _, rows in begun.plan["shards"]),
            "shards_committed": begun.committed,
            "shards": begun.shards,
            "teacher": begun.plan["teacher"],
            "tokenizer": begun.plan["tokenizer"],
            "next": error.hint,
        }
    return {"path": str(path) if is_remote(path) else Path(path).name, **summary_of(store)}


def summary_of(store: Store) -> dict[str, Any]:
    """Return what an open store holds."""
    counts = store.bytes_per_column()
    return {
        "format_version": store.manifest.document["format_version"],
        "complete": True,
        "kind": store.manifest.kind,
        "samples": len(store),
        "positions": store.num_positions,
        "k": store.k,
        "vocab_size": store.vocab_size,
        "shards": len(store.shards),
        "bytes": store.nbytes,
        "bytes_per_position": store.bytes_per_position,
        "columns": [
            {
                "name": name,
                "codec": column.codec,
                "dtype": column.build().dtype,
                "shape": list(column.shape),
                "unit": column.unit,
                "bytes": counts[name],
                "bytes_per_position": counts[name] / store.num_positions,
            }
            for name, column in store.columns.items()
        ],
        "teacher": store.manifest.part("teacher"),
        "tokenizer": store.manifest.part("tokenizer"),
        "source": store.manifest.part("source"),
        "licences": store.manifest.part("licences"),
        "skipped": {
            name: count
            for name, count in (store.manifest.part("skipped") or {}).items()
            if name.startswith(("skipped", "truncated"))
        },
        "digest": store.digest,
        "provenance": store.manifest.part("provenance"),
    }


def first_samples(
    path: Path | str, count: int, *, positions: int, candidates: int, temperature: float
) -> list[dict[str, Any]]:
    """Return the first samples of a store, with their tokens as text and the teacher's probabilities at T.

    Args:
        path: The store's folder.
        count: Samples.
        positions: Rows of each.
        candidates: Ids of each row, the most probable first.
        temperature: T of the probabilities.
    """
    return sampled(open_store(path), count, positions=positions, candidates=candidates, temperature=temperature)


def sampled(store: Store, count: int, *, positions: int, candidates: int, temperature: float) -> list[dict[str, Any]]:
    """Return the first samples of an open store, as `first_samples`."""
    decode = decoder(store.tokenizer_files())
    return [
        _sample(store, number, decode, positions, candidates, temperature) for number in range(min(count, len(store)))
    ]


def _sample(
    store: Store, number: int, decode: Any, positions: int, candidates: int, temperature: float
) -> dict[str, Any]:
    sample = store[number]
    targets = sample.targets[:positions]
    probabilities = targets.probabilities(temperature)
    tails = targets.tail_mass(temperature)
    label = targets.label_logit / temperature - targets.log_partition(temperature)
    rows = [
        {
            "row": row,
            "input": decode(sample.input_ids[row : row + 1]),  # nothing of an example, which is not in the store
            "label": decode([sample.labels[row]]),
            "counts": bool(sample.loss_mask[row]),
            "label_probability": None if math.isnan(label[row]) else math.exp(label[row]),
            "tail_mass": float(tails[row]),
            "candidates": [
                {
                    "id": int(targets.ids[row, rank]),
                    "token": decode([targets.ids[row, rank]]),
                    "probability": float(probabilities[row, rank]),
                }
                for rank in range(min(candidates, targets.k))
            ],
        }
        for row in range(len(targets))
    ]
    return {
        "id": sample.id,
        "tokens": len(sample.input_ids),
        "text": decode(sample.input_ids),
        "temperature": temperature,
        "rows": rows,
    }
