"""What a store costs to open and to keep open, from ten to ten thousand shards.

    python benchmarks/scaling.py [--shards 10,100,1000,10000] [--out benchmarks/results/...md]

The manifests are synthetic (every object of every shard is listed, none exists); the code that reads them is the store's own. Each
size is opened in a process of its own, several times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from kdcache.fingerprint import canonical_json, digest_bytes
from kdcache.store import Kept, ShardPlan, StorePlan, standard_columns
from kdcache.store.manifest import FORMAT, VERSION, seal
from kdcache.store.schema import ALIGNMENT

ROWS, SAMPLES = 65536, 128


def write_manifest(folder: Path, shards: int) -> int:
    """Write the manifest of a store of many shards; return its bytes."""
    columns = standard_columns(
        k=64, vocab_size=49152, kept=Kept("levels", {"steps_per_nat": 128}, ranked=True, differences=2)
    )
    plan = StorePlan(
        kind="causal_lm",
        columns=columns,
        shard_rows=ROWS,
        chunk_rows=4096,
        vocab_size=49152,
        k=64,
        teacher={"name": "synthetic"},
        tokenizer=None,
        source={},
        capture={},
        licences={},
        skipped={},
        shards=tuple(ShardPlan(index * SAMPLES, SAMPLES, ROWS) for index in range(shards)),
        ranking=np.arange(49152, dtype=np.int32),
    )
    names = [f"samples/{index:05d}.parquet" for index in range(shards)]
    for column in columns:
        for path, part in column.arrays().values():
            names.append(f"{path}/zarr.json")
            tail = "".join("/0" for _ in part.shape)
            names += [f"{path}/c/{index}{tail}" for index in range(shards)]
    objects = {name: {"bytes": 4_000_000, "digest": digest_bytes(name.encode())} for name in names}
    document = {
        "format": FORMAT,
        "format_version": VERSION,
        "required_features": [],
        "alignment": ALIGNMENT["causal_lm"],
        **plan.as_json(),
        "samples": shards * SAMPLES,
        "positions": shards * ROWS,
        "shards": [[one.first_sample, one.samples, one.rows, 0] for one in plan.shards],
        "objects": objects,
        "provenance": {},
    }
    data = canonical_json(seal(document))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    return len(data)


OPEN = """
import json, sys, time
from kdcache.process import peak_memory_bytes
from kdcache.store import open_store
import kdcache.store.reader
before = peak_memory_bytes()
began = time.perf_counter()
store = open_store(sys.argv[1])
assert store.num_positions
print(json.dumps([time.perf_counter() - began, peak_memory_bytes() - before, before]))
"""


def main() -> None:
    """Measure and write the results file."""
    from machine import heading

    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", default="10,100,1000,10000")
    parser.add_argument("--rounds", type=int, default=5)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-scaling.md"))
    arguments = parser.parse_args()
    lines = [
        heading("Opening stores of many shards"),
        f"Shards of {ROWS:,} positions, k = 64, preset compact; medians of {arguments.rounds} fresh processes (lowest to highest). Memory is what opening adds "
        "to the process's peak. `python benchmarks/scaling.py` repeats it.\n",
        "| shards | positions | manifest, MB | open, s | memory, MB |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for shards in (int(one) for one in arguments.shards.split(",")):
            size = write_manifest(Path(folder) / str(shards), shards)
            found = []
            for _ in range(arguments.rounds):
                done = subprocess.run(
                    [sys.executable, "-c", OPEN, str(Path(folder) / str(shards))],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found.append(json.loads(done.stdout))
                time.sleep(0.1)
            seconds, memory = sorted(one[0] for one in found), statistics.median(one[1] for one in found)
            lines.append(
                f"| {shards:,} | {shards * ROWS:,} | {size / 1e6:.1f} | {statistics.median(seconds):.3f} "
                f"({seconds[0]:.3f} to {seconds[-1]:.3f}) | {memory / 1e6:.0f} |"
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
