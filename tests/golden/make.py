"""Write the golden store of the current format version, once; refuses to overwrite.

    python -m tests.golden.make

Run it when a new format version is released, never to make a failing test pass: bytes of a released version do not
change.
"""

import json
import sys
from pathlib import Path

import numpy as np

from kdcache.store import HiddenSpec, Kept, SampleTable, StoreWriter, open_store, rank_by_count, standard_columns
from kdcache.targets.log_partition import NODES
from tests import tiny
from tests.targets.dense import compact

FOLDER = Path(__file__).parent / "format-v1.1"
ROWS = ((5, 3), (4,))
VOCABULARY, K = 300, 6


def main() -> None:
    """Write the folder's store and expected.json. (format-v1 holds 1.0: V = 40 and the codecs of that version.)"""
    if FOLDER.exists():
        sys.exit(f"{FOLDER} exists; golden stores are never rewritten")
    columns = standard_columns(
        k=K,
        vocab_size=VOCABULARY,
        kept=Kept("levels", {"steps_per_nat": 128}, ranked=True, differences=2),
        hidden=[HiddenSpec("final", 4, "bfloat16"), HiddenSpec("1", 4, "int8")],
        draws=2,
    )
    ranking = rank_by_count(np.arange(VOCABULARY) * 37 % 101)
    plan = tiny.plan(columns, ROWS, vocabulary=VOCABULARY, k=K, shard_rows=16, ranking=ranking)
    writer = StoreWriter.open(FOLDER / "store", plan)
    for index, counts in enumerate(ROWS):
        count = sum(counts)
        # plain arithmetic, not a random generator: the same on every machine for ever
        grid = np.arange(count * VOCABULARY, dtype=np.float64).reshape(count, VOCABULARY) + 1000 * index
        logits = (np.mod(grid * 7919, 1009) / 64 - 8).astype(np.float32).astype(np.float64)
        tokens = [(np.arange(one + 1) * 11 + 3 * one + index) % VOCABULARY for one in counts]
        labels = np.concatenate([one[1:] for one in tokens])
        targets = compact(logits, K, labels)
        tail = np.argsort(-logits, axis=1, kind="stable")[:, K : K + 2]
        values = {
            "input_ids": np.concatenate([one[:-1] for one in tokens]),
            "labels": labels,
            "loss_mask": np.arange(count) % 3 % 2,
            "head_ids": targets.ids,
            "head_logits": targets.logits,
            "tail_log_partition": targets.tail,
            "label_logit": targets.label_logit,
            "draw_ids": tail,
            "draw_logits": np.take_along_axis(logits, tail, 1).astype(np.float32),
            "hidden.final": (logits[:, :4] / 2).astype(np.float32),
            "hidden.1": (logits[:, 4:8] * 3).astype(np.float32),
        }
        ids = [f"golden-{index}-{number}" for number in range(len(counts))]
        writer.write_shard(index, values, SampleTable(ids, np.asarray(counts)))
    writer.finish({"note": "golden store of format 1.1"})
    store = open_store(FOLDER / "store")
    expected = {"digest": store.digest, "nodes": list(NODES), "samples": [described(sample) for sample in store]}
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1))


def described(sample: object) -> dict[str, object]:
    """Return every number of a sample as JSON."""
    targets = sample.targets  # type: ignore[attr-defined]
    return {
        "id": sample.id,  # type: ignore[attr-defined]
        "input_ids": sample.input_ids.tolist(),  # type: ignore[attr-defined]
        "loss_mask": sample.loss_mask.tolist(),  # type: ignore[attr-defined]
        "head_ids": targets.ids.tolist(),
        "head_logits": targets.logits.tolist(),
        "tail": targets.tail.tolist(),
        "label_logit": targets.label_logit.tolist(),
        "draw_ids": targets.draw_ids.tolist(),
        "draw_logits": targets.draw_logits.tolist(),
        "hidden": {name: values.tolist() for name, values in sample.hidden.items()},  # type: ignore[attr-defined]
        "log_partition_at_2": targets.log_partition(2.0).tolist(),
    }


if __name__ == "__main__":
    main()
