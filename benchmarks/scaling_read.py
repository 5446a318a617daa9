"""What an epoch of reading costs, in time and memory, from a hundred thousand to a hundred million positions.

    python benchmarks/scaling_read.py [--shards 2,16,153,1526] [--out benchmarks/results/...md]

One shard of synthetic rows is written by the store's own writer; a store of many has it as often as wanted (hard links to the same objects, a sample table for
each, a manifest of all with its digests), so that it needs no disk and lies in the page cache. Every shard is opened, verified and decoded as if it were another.
Each size is read in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from kdcache.fingerprint import canonical_json, digest_bytes
from kdcache.store import Kept, SampleTable, ShardPlan, StorePlan, StoreWriter, open_store, standard_columns
from kdcache.store.encode import shard_objects, start_objects
from kdcache.store.manifest import seal
from kdcache.store.ranking import ranks

ROWS, LENGTH, K, VOCABULARY = 65536, 128, 64, 49152
COLUMNS = standard_columns(
    k=K, vocab_size=VOCABULARY, kept=Kept("levels", {"steps_per_nat": 128}, ranked=True, differences=2)
)


def plan(shards: int) -> StorePlan:
    """Return the plan of a store of equal shards."""
    samples = ROWS // LENGTH
    return StorePlan(
        kind="causal_lm",
        columns=COLUMNS,
        shard_rows=ROWS,
        chunk_rows=4096,
        vocab_size=VOCABULARY,
        k=K,
        teacher={"name": "synthetic"},
        tokenizer=None,
        source={},
        capture={},
        licences={},
        skipped={},
        shards=tuple(ShardPlan(index * samples, samples, ROWS) for index in range(shards)),
        ranking=np.arange(VOCABULARY, dtype=np.int32),
    )


def rows() -> dict[str, np.ndarray]:
    """Return synthetic rows: ids as Zipf's law has them, logits that fall as real ones do."""
    random = np.random.default_rng(0)
    ids = np.argsort(random.gumbel(size=(ROWS, 4 * K)) - np.log(np.arange(1, 4 * K + 1)), axis=1)[:, ::-1][:, :K]
    logits = np.sort(random.exponential(2.0, size=(ROWS, K)).cumsum(1) / -8, axis=1)[:, ::-1] + 20
    tokens = random.integers(0, VOCABULARY, ROWS + 1)
    return {
        "input_ids": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": np.ones(ROWS, dtype=np.int32),
        "head_ids": ids.astype(np.int32) * 97,
        "head_logits": logits.astype(np.float32),
        "tail_log_partition": np.linspace(9, 4, 8, dtype=np.float32) + random.normal(size=(ROWS, 1)).astype(np.float32),
        "label_logit": random.normal(size=ROWS).astype(np.float32),
    }


def write_many(one: Path, folder: Path, shards: int, values: dict[str, np.ndarray]) -> None:
    """Write a store that has the only shard of another many times."""
    source, wanted = open_store(one), plan(shards)
    objects: dict[str, dict[str, object]] = {}

    def put(name: str, data: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        objects[name] = {"bytes": len(data), "digest": digest_bytes(data)}

    for name, data in start_objects(wanted):
        put(name, data)
    for index in range(shards):
        for name, found in source.manifest.objects.items():
            head, mark, tail = name.partition("/c/0")
            if mark and head.startswith("columns/"):
                new = f"{head}/c/{index}{tail}"
                (folder / new).parent.mkdir(parents=True, exist_ok=True)
                os.link(one / name, folder / new)
                objects[new] = {"bytes": found.bytes, "digest": found.digest}
        put(f"samples/{index:05d}.parquet", table(wanted, index, values))
    document = json.loads((one / "manifest.json").read_bytes())
    document |= {
        **wanted.as_json(),
        "shards": [[shard.first_sample, shard.samples, shard.rows, 0] for shard in wanted.shards],
        "samples": sum(shard.samples for shard in wanted.shards),
        "positions": shards * ROWS,
        "objects": objects,
    }
    document.pop("digest")
    (folder / "manifest.json").write_bytes(canonical_json(seal(document)))


def table(wanted: StorePlan, index: int, values: dict[str, np.ndarray]) -> bytes:
    """Return the sample table of a shard, by the store's own code: of its tokens alone, the rest is linked."""
    few = StorePlan(
        **{**{key: getattr(wanted, key) for key in wanted.__dataclass_fields__}, "columns": (), "ranking": None}
    )
    made: Iterator[tuple[str, bytes]] = shard_objects(
        few, ranks(np.zeros(0, np.int32)), index, values, samples_of(index)
    )
    return next(data for name, data in made if name.startswith("samples/"))


def samples_of(index: int) -> SampleTable:
    """Return the samples of a shard."""
    count = ROWS // LENGTH
    return SampleTable([f"{index}-{number}" for number in range(count)], np.full(count, LENGTH))


READ = """
import json, sys, time
import torch
from kdcache.process import peak_memory_bytes
from kdcache.store import open_store
from kdcache.stream import Loader, StreamConfig
before, began, positions = peak_memory_bytes(), time.perf_counter(), 0
for batch in Loader(open_store(sys.argv[1]), StreamConfig(batch_size=16)):
    positions += batch.num_positions
    if positions == batch.num_positions:
        first = time.perf_counter() - began
print(json.dumps([positions, time.perf_counter() - began, first, peak_memory_bytes() - before]))
"""


def main() -> None:
    """Measure and write the results file."""
    from machine import heading

    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", default="2,16,153,1526")
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-scaling-read.md"))
    arguments = parser.parse_args()
    lines = [
        heading("Reading stores of many positions"),
        f"Shards of {ROWS:,} synthetic positions, k = {K}, preset compact, all from the page cache; one shuffled epoch of batches of 16 samples by two threads, every object verified. Memory is what "
        "reading adds to the process's peak. One run a size. `python benchmarks/scaling_read.py` repeats it.\n",
        "| positions | shards | positions/s, millions | first batch, s | memory, MB |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, values = Path(name), rows()
        writer = StoreWriter.open(folder / "one", plan(1))
        writer.write_shard(0, values, samples_of(0))
        writer.finish()
        for shards in (int(one) for one in arguments.shards.split(",")):
            write_many(folder / "one", folder / str(shards), shards, values)
            line = [sys.executable, "-c", READ, str(folder / str(shards))]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            positions, seconds, first, memory = json.loads(done.stdout)
            lines.append(
                f"| {positions:,} | {shards:,} | {positions / seconds / 1e6:.2f} | {first:.2f} | {memory / 1e6:.0f} |"
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
