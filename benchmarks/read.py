"""How fast are shuffled flat batches of real heads read, against the formats a user would pick instead?

    pip install mosaicml-streaming litdata webdataset pylance array_record datasets   (any of them may be missing)
    python benchmarks/read.py [--store STORE | --articles 420] [--repeat 8] [--rounds 3] [--out benchmarks/results/...md]

Heads of SmolLM2 over articles, repeated to the wanted size. All sides give the same batch of 16 samples: ids int32 [N, 64], logits float32
[N, 64], tail float32 [N, 8], label logit, inputs and labels int64. Peers keep narrow types (ids uint16, logits float16, tail int16) as one record
of bytes a sample, which is kinder to them than a column an array; those that compress use zstd. Arrow zstd and Parquet cannot give single
samples quickly, so they read blocks of 512 samples and mix a pool of four. Each measurement is a process of its own; its first epoch reads from disk
(cold: opening, first verification and the start of workers are in it), the second from memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from read_data import records_of, report, write_presets
from read_peers import BATCH, IDS, PEERS, Blocks, Records, collate, pack

from kdcache.store import open_store

PRESETS = ("compact", "lossless", "raw")
PACKED = ", packed"
"""Side that leaves the targets to be unpacked by the device that they go to."""


def opened(side: str, folder: Path, workers: int) -> Iterable[Any]:
    """Return what gives the batches of one shuffled epoch each time it is iterated; workers stay between epochs."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    if side.startswith("kdcache"):
        from kdcache.stream import Loader, StreamConfig

        home = folder.with_name(folder.name.removesuffix(PACKED))
        return Loader(home, StreamConfig(batch_size=BATCH, workers=workers, packed=side.endswith(PACKED)))
    _, open_, blocks = PEERS[side]
    if blocks:
        return DataLoader(Blocks(open_, folder), batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    records = Records(open_, folder)
    sampler = BatchSampler(RandomSampler(records, generator=torch.Generator().manual_seed(0)), BATCH, drop_last=False)
    return DataLoader(
        records, batch_sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )


def evict(folder: Path) -> None:
    """Have the system forget what it holds of a folder's files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(side: str, folder: Path, workers: int) -> dict[str, float]:
    """Return positions/s of a cold and of a warm epoch, seconds to the first batch, peak memory of this process."""
    from kdcache.process import peak_memory_bytes

    torch.set_num_threads(1)
    evict(folder.with_name(folder.name.removesuffix(PACKED)))
    began = time.perf_counter()
    first = 0.0
    epochs = opened(side, folder, workers)
    for number, _ in enumerate(epochs):
        if number == 0:
            first = time.perf_counter() - began
    cold = time.perf_counter() - began
    positions, began, total = 0, time.perf_counter(), 0.0
    for batch in epochs:
        labels = batch["labels"] if isinstance(batch, dict) else batch.labels
        positions += len(labels)
        if isinstance(batch, dict):
            total += float(batch["ids"][0, 0])  # touched, so that nothing lazy is left
        elif batch.targets is not None:
            total += float(batch.targets.ids[0, 0])
    return {
        "positions_per_second": positions / (time.perf_counter() - began),
        "cold_positions_per_second": positions / cold,
        "first_batch_seconds": first,
        "peak_memory_bytes": peak_memory_bytes(),
        "positions": positions,
        "check": total,
    }


def prepare(
    folder: Path, source: Path | None, articles: int, repeat: int, wanted: set[str]
) -> tuple[dict[str, float], list[str]]:
    """Capture, write every side; return bytes a position by side, and peers that are missing."""
    sizes = write_presets(folder, source, articles, repeat, PRESETS)
    if open_store(folder / "kdcache raw").vocab_size > 1 << 8 * np.dtype(IDS).itemsize:
        sys.exit("The peers' ids do not fit their type: set READ_IDS=u4.")
    missing = []
    records, positions = records_of(folder / "kdcache raw", pack)
    for name, (write, _, _) in PEERS.items():
        if name not in wanted:
            continue
        where = folder / name
        if write is None:
            shutil.copytree(folder / "kdcache raw", where)
            continue
        where.mkdir()
        try:
            write(where, records)
        except Exception as error:  # a peer that is not installed, or does not work here, is named in the report
            missing.append(f"{name} ({type(error).__name__}: {str(error).splitlines()[0]})")
            continue
        sizes[name] = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) / positions
    sizes[f"kdcache {PRESETS[0]}{PACKED}"] = sizes[f"kdcache {PRESETS[0]}"]
    return sizes, missing


def described(folder: Path, arguments: argparse.Namespace) -> str:
    """Say what data was read."""
    store, teacher = open_store(folder), "SmolLM2-135M"
    if arguments.store is not None:
        teacher = open_store(arguments.store).manifest.part("teacher")["name"]
    return (
        f"Real heads of {teacher} (k = {store.k}, V = {store.vocab_size:,}), {store.num_positions:,} positions "
        f"({store.num_positions // arguments.repeat:,} of them different) in {len(store):,} samples"
    )


def main() -> None:
    """Write every side, measure in turns, write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--articles", type=int, default=420)
    parser.add_argument("--store", type=Path, help="a capture with the preset lossless, in place of one of articles")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--sides", help="only these, separated by semicolons")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "FOLDER", "WORKERS"))
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-read.md"))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], Path(arguments.one[1]), int(arguments.one[2]))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = set(arguments.sides.split(";")) if arguments.sides else set(PEERS)
        sizes, missing = prepare(folder, arguments.store, arguments.articles, arguments.repeat, wanted)
        sides = [
            *(f"kdcache {one}" for one in PRESETS),
            f"kdcache {PRESETS[0]}{PACKED}",
            *(one for one in PEERS if not any(m.startswith(one + " (") for m in missing)),
        ]
        if arguments.sides:
            sides = [one for one in sides if one in arguments.sides.split(";")]
        found: dict[tuple[str, int], list[dict[str, float]]] = {}
        for turn in range(arguments.rounds):
            for workers in (int(one) for one in arguments.workers.split(",")):
                for side in np.random.default_rng(turn).permutation(sides).tolist():
                    line = [sys.executable, __file__, "--one", side, str(folder / side), str(workers)]
                    done = subprocess.run(line, capture_output=True, text=True, check=False)
                    if done.returncode:
                        missing.append(f"{side} at {workers} workers: {done.stderr.strip().splitlines()[-1]}")
                        continue
                    found.setdefault((side, workers), []).append(json.loads(done.stdout.splitlines()[-1]))
        text = report(
            found,
            sizes,
            missing,
            described(folder / "kdcache raw", arguments),
            [int(one) for one in arguments.workers.split(",")],
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
