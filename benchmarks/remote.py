"""What it costs to train from a store that is somewhere else, and to check digests.

    pip install 'moto[s3,server]'
    python benchmarks/remote.py --store STORE [--steps 250] [--rounds 7] [--out benchmarks/results/...md]

Training: the same student and order from the folder, and from an S3 server on loopback with an empty cache, in one process, a step of each in turn. Data wait is
the time in `next(batches)`; one shard is in use at a time, so that shards come while training goes on. Digests: an epoch of
reading alone, with every object's BLAKE3 compared and with objects taken as verified, in turns; the page cache is warm.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from machine import heading

from kdcache.batch import Batch
from kdcache.share import push
from kdcache.store import Store, open_store
from kdcache.stream import Loader, StreamConfig
from kdcache.stream.gather import columns_read
from kdcache.train.config import LossConfig, StudentConfig
from kdcache.train.objective import Objective
from kdcache.train.student import build_student

STUDENT = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


class Side:
    """A student that is trained from one place, and the seconds it has waited and worked."""

    def __init__(self, store: Store):
        student = build_student(StudentConfig(config=STUDENT), store, seed=0)
        self.objective = Objective(LossConfig(temperature=2.0, alpha=0.9), student, store)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-4)
        self.batches: Iterator[Batch] = iter(Loader(store, StreamConfig(batch_size=8, pool_shards=1)))
        self.waits, self.steps = list[float](), list[float]()

    def step(self) -> None:
        """Train on the next batch."""
        began = time.perf_counter()
        batch = next(self.batches)
        ready = time.perf_counter()
        self.objective(batch, 0.9, 2.0, float(batch.mask.sum()))["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.waits.append(ready - began)
        self.steps.append(time.perf_counter() - began)


def serve() -> None:
    """Start an S3 server on loopback, and set the environment to use it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    os.environ |= {**keys, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="bucket")


def trained(path: Path, steps: int) -> dict[str, Side]:
    """Return both sides after so many steps of each."""
    push(path, "s3://bucket/store")
    sides = {"folder": Side(open_store(path)), "S3 on loopback": Side(open_store("s3://bucket/store"))}
    for number in range(steps):
        order = list(sides.values())
        for side in order if number % 2 else reversed(order):
            side.step()
    return sides


def epochs(path: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of epochs with and without digests, in turns."""
    config, found = StreamConfig(batch_size=16), dict[str, list[float]](with_digests=[], without=[])
    for number in range(2 * rounds + 2):
        store = open_store(path)
        name = "without" if (number + number // 2) % 2 else "with_digests"
        if name == "without":
            for index in range(len(store.shards)):
                store.trust(index, columns_read(config))
        began = time.perf_counter()
        for _ in Loader(store, config):
            pass
        if number > 1:  # the first of each warms up
            found[name].append(time.perf_counter() - began)
    return found


def main() -> None:
    """Measure both, write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=7)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-remote.md"))
    arguments = parser.parse_args()
    store = open_store(arguments.store)
    times = epochs(arguments.store, arguments.rounds)
    ratio = statistics.median(times["with_digests"]) / statistics.median(times["without"])
    serve()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["KDCACHE_CACHE"] = cache
        sides = trained(arguments.store, arguments.steps)
        shutil.rmtree(cache, ignore_errors=True)
    lines = [
        heading("Training from somewhere else, and checking digests"),
        f"A store of {store.num_positions:,} positions in {len(store.shards)} shards, {store.nbytes / 1e6:.0f} MB; {arguments.steps} steps of 8 samples, a step of each side in turn.\n",
        "| from | step, ms: median (20 to 80 %) | data wait, share of all steps but the first | first batch, ms |",
        "|---|---|---|---|",
    ]
    for name, side in sides.items():
        ordered = sorted(side.steps[1:])
        low, middle, high = (1e3 * ordered[int(share * len(ordered))] for share in (0.2, 0.5, 0.8))
        wait = sum(side.waits[1:]) / sum(side.steps[1:])
        lines.append(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {wait:.2%} | {1e3 * side.waits[0]:.0f} |")
    with_, without = (sorted(times[name]) for name in ("with_digests", "without"))
    lines += [
        "",
        f"An epoch of reading alone takes {1e3 * statistics.median(with_):.0f} ms ({1e3 * with_[0]:.0f} to {1e3 * with_[-1]:.0f}) with every digest compared and "
        f"{1e3 * statistics.median(without):.0f} ms ({1e3 * without[0]:.0f} to {1e3 * without[-1]:.0f}) without: {ratio:.2f}. Digests are compared in the first epoch of a process only; beside training the threads that do it have nothing else to do.",
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
