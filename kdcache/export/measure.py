"""Compare and measure anything that maps token ids to logits: a torch module or an onnxruntime session alike.

Legend: `S` samples, `T` tokens, `V` vocabulary, `N` positions.
"""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import MismatchError
from kdcache.export.finished import Finished, Logits
from kdcache.export.result import Latency, Parity, Quality
from kdcache.store import Store
from kdcache.stream import Loader, StreamConfig

PARITY_SHAPES = ((1, 1), (1, 7), (2, 16), (3, 33))
"""A single token, odd sizes, and batches with padding: what a graph with a shape baked into it fails on."""

SPEED_SHAPES = ((1, 32), (8, 128))

RUNS, WARM_UP = 20, 3

CHUNK = 256
"""Positions whose logits are widened at a time."""


def inputs(samples: int, tokens: int, vocab_size: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return random ids and a right-padded mask, both int64 [S, T]; the first sample fills its row."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, vocab_size, (samples, tokens))
    lengths = random.integers(1, tokens + 1, samples)
    lengths[0] = tokens
    return ids, (np.arange(tokens) < lengths[:, None]).astype(np.int64)


def compare(student: Finished, ours: Logits, *, tolerance: float | None) -> Parity:
    """Return how far `ours` is from the student in torch, at the real positions of random inputs of several shapes.

    Raises:
        MismatchError: It differs by more than the tolerance, or does not take a shape.
    """
    shapes = tuple((samples, min(tokens, student.longest)) for samples, tokens in PARITY_SHAPES)
    largest = difference = 0.0
    for number, (samples, tokens) in enumerate(shapes):
        ids, mask = inputs(samples, tokens, student.vocab_size, number)
        expected = student.logits(ids, mask)[mask.astype(bool)]
        try:
            found = ours(ids, mask)[mask.astype(bool)]
        except Exception as error:
            raise MismatchError(
                f"What was written does not take {samples} samples of {tokens} tokens: {str(error).splitlines()[0]}",
                where=str(student.folder),
            ) from error
        # NaN, on either side, is the largest of all differences
        difference = max(difference, float(np.nan_to_num(np.abs(found - expected), nan=np.inf).max()))
        largest = max(largest, float(np.abs(expected).max()))
    if tolerance is not None and difference > tolerance * max(1.0, largest):
        raise MismatchError(
            f"What was written does not say what the student says: logits of up to {largest:.4g} differ by up to "
            f"{difference:.3g}, and {tolerance * max(1.0, largest):.3g} is accepted.",
            where=str(student.folder),
            hint="Export as safetensors, and report the model's architecture.",
        )
    return Parity(difference, largest, tolerance, shapes)


def latencies(runs: Sequence[Logits], *, samples: int, tokens: int, vocab_size: int) -> list[Latency]:
    """Return how long a forward pass of full rows takes on this machine, after a warm-up.

    They take turns, so that what else the machine is doing slows them alike.
    """
    ids, _ = inputs(samples, tokens, vocab_size, 0)
    mask = np.ones_like(ids)
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(WARM_UP + RUNS):
        for run, times in zip(runs, taken, strict=True):
            began = time.perf_counter()
            run(ids, mask)
            if number >= WARM_UP:
                times.append(1000 * (time.perf_counter() - began))
    found = [np.percentile(times, (50, 10, 90)).round(3).tolist() for times in taken]
    return [Latency(middle, low, high, RUNS) for middle, low, high in found]


def quality(
    run: Logits, store: Store, *, batch_size: int = 8, progress: Callable[[int], None] | None = None
) -> Quality:
    """Return the cross-entropy and the agreement with the teacher on every sample of a store.

    Args:
        run: From ids and mask to logits.
        store: A held-out store, of no more ids than the student has.
        batch_size: Samples a batch.
        progress: Called with samples done.

    Raises:
        MismatchError: No position of the store counts.
    """
    entropy, same, counted, done = 0.0, 0, 0, 0
    for batch in Loader(store, StreamConfig(batch_size=batch_size, shuffle=False, pool_shards=1)):
        padded = batch.padded()
        logits = torch.from_numpy(run(padded.input_ids.numpy(), padded.attention_mask.numpy())).flatten(0, 1)
        assert batch.targets is not None  # the loader was asked for them
        rows = batch.mask.nonzero()[:, 0]
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            values = logits[padded.index[some], : store.vocab_size].double()
            entropy += float((values.logsumexp(1) - values.gather(1, batch.labels[some, None])[:, 0]).sum())
            same += int((values.argmax(1) == batch.targets.ids[some, 0]).sum())
        counted += len(rows)
        done += batch.num_samples
        if progress is not None:
            progress(done)
    if counted == 0:
        raise MismatchError("No position of the store counts.", where=store.location)
    mean = entropy / counted
    return Quality(mean, math.exp(min(mean, 700.0)), same / counted, counted)
