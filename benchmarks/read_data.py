"""Data and report of benchmarks/read.py: a real capture, repeated, in every preset; the table."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from machine import heading

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.demo import teacher_folder, write_articles
from kdcache.store import (
    Kept,
    SampleTable,
    ShardPlan,
    StorePlan,
    StoreWriter,
    open_store,
    rank_by_count,
    standard_columns,
)

SHARD = 65536
KEPT = {
    "compact": Kept("levels", {"steps_per_nat": 128}, ranked=True, differences=2),
    "lossless": Kept("bits", {"kind": "bfloat16"}, ranked=True, differences=2),
    "raw": Kept("float16", compressed=False),
}


def write_presets(
    folder: Path, source: Path | None, articles: int, repeat: int, presets: Sequence[str]
) -> dict[str, float]:
    """Write the rows of a capture, repeated, in each preset; return bytes a position by side."""
    samples, counts = captured_samples(source, articles)
    return {
        f"kdcache {one}": write_store(folder / f"kdcache {one}", samples * repeat, KEPT[one], counts) for one in presets
    }


def captured_samples(source: Path | None, articles: int) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Return the rows of every sample of a capture, and how often each id stands in a head."""
    with tempfile.TemporaryDirectory() as name:
        store = open_store(source or _captured(Path(name), articles))
        samples = []
        counts = np.zeros(store.vocab_size, dtype=np.int64)
        for index in range(len(store.shards)):
            shard = store.read_shard(index)
            counts += np.bincount(shard.columns["head_ids"].reshape(-1), minlength=len(counts))
            for start, stop in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
                samples.append({column: values[start:stop] for column, values in shard.columns.items()})
    return samples, counts


def _captured(folder: Path, articles: int) -> Path:
    data = write_articles(folder / "data", articles, 1)
    tree = {
        "source": {"path": str(data / "train.jsonl"), "id_field": "id"},
        "samples": {"max_length": 256},
        "teacher": {"model": str(teacher_folder()), "dtype": "bfloat16"},
        "store": {"preset": "lossless"},
    }
    capture(parse_config(CaptureConfig, tree), folder / "store")
    return folder / "store"


def write_store(where: Path, samples: list[dict[str, np.ndarray]], kept: Kept, counts: np.ndarray) -> float:
    """Write samples as a store; return its bytes a position."""
    shards, first, held = [], 0, 0
    for number, sample in enumerate(samples):
        rows = len(sample["labels"])
        if held + rows > SHARD:
            shards.append(ShardPlan(first, number - first, held))
            first, held = number, 0
        held += rows
    shards.append(ShardPlan(first, len(samples) - first, held))
    plan = StorePlan(
        kind="causal_lm",
        columns=standard_columns(k=64, vocab_size=len(counts), kept=kept),
        shard_rows=SHARD,
        chunk_rows=4096,
        vocab_size=len(counts),
        k=64,
        teacher={"name": "a captured one"},
        tokenizer=None,
        source={},
        capture={},
        licences={},
        skipped={},
        shards=tuple(shards),
        ranking=rank_by_count(counts) if kept.ranked else None,
    )
    writer = StoreWriter.open(where, plan)
    for index, shard in enumerate(shards):
        here = samples[shard.first_sample : shard.first_sample + shard.samples]
        columns = {name: np.concatenate([one[name] for one in here]) for name in here[0]}
        ids = [f"{shard.first_sample + number}" for number in range(len(here))]
        writer.write_shard(index, columns, SampleTable(ids, np.asarray([len(one["labels"]) for one in here])))
    writer.finish()
    return open_store(where).bytes_per_position


def records_of(store_folder: Path, pack: Callable[[dict[str, np.ndarray]], bytes]) -> tuple[list[bytes], int]:
    """Return the samples of a store as records, and the positions."""
    store = open_store(store_folder)
    records = []
    for index in range(len(store.shards)):
        shard = store.read_shard(index)
        names = {
            "ids": "head_ids",
            "logits": "head_logits",
            "inputs": "input_ids",
            "labels": "labels",
            "label_logit": "label_logit",
        }
        columns = {name: shard.columns[column] for name, column in names.items()}
        columns["tail"] = np.rint(shard.columns["tail_log_partition"] * 1024)
        for start, stop in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            records.append(pack({name: values[start:stop] for name, values in columns.items()}))
    return records, store.num_positions


def report(
    found: dict[tuple[str, int], list[dict[str, float]]],
    sizes: dict[str, float],
    missing: list[str],
    data: str,
    workers: list[int],
) -> str:
    """Return the results file."""

    def speed(side: str, count: int) -> float:
        runs = found.get((side, count), [])
        return statistics.median(one["positions_per_second"] for one in runs) if runs else float("nan")

    sides = sorted({side for side, _ in found}, key=lambda side: -speed(side, workers[0]))
    lines = [
        heading("Reading shuffled flat batches"),
        f"{data}; batches of 16 samples. Positions/s in millions: median (lowest to "
        "highest) of processes taken in turns; the second epoch from the page cache, `cold` the first from disk with opening, verification and start in it. kdcache reads with two threads of its own process at 0 workers, with processes that share memory otherwise; the others are torch DataLoaders, whose workers stay between epochs. `packed` leaves ids and logits as they lie in the store, for the device to unpack. First batch (cold, with the side's imports) and peak memory "
        f"at {workers[0]} workers, peak of the reading process. `python benchmarks/read.py` repeats it.\n",
        "| side | bytes a position | "
        + " | ".join(f"{count} workers" for count in workers)
        + f" | cold, {workers[0]} workers | first batch, ms | memory, MB |",
        "|---|---|" + "---|" * len(workers) + "---|---|---|",
    ]
    for side in sides:
        cells = []
        for count in workers:
            values = sorted(one["positions_per_second"] / 1e6 for one in found.get((side, count), []))
            cells.append(
                f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})" if values else "failed"
            )
        runs = found.get((side, workers[0]), [])
        cold = statistics.median(one["cold_positions_per_second"] for one in runs) / 1e6 if runs else float("nan")
        first = statistics.median(one["first_batch_seconds"] for one in runs) * 1e3 if runs else float("nan")
        memory = statistics.median(one["peak_memory_bytes"] for one in runs) / 1e6 if runs else float("nan")
        size = f"{sizes[side]:.0f}" if side in sizes else ""
        lines.append(f"| {side} | {size} | " + " | ".join(cells) + f" | {cold:.2f} | {first:.0f} | {memory:.0f} |")
    lines += ["", *(f"- Left out: {one}." for one in dict.fromkeys(missing))]
    return "\n".join(lines) + "\n"
