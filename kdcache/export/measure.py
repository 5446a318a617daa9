"""Compare and measure anything that maps inputs to logits: a torch module or an onnxruntime session alike.

Legend: `S` samples, `T` tokens, `C` outputs.
"""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import MismatchError
from kdcache.export.finished import Finished
from kdcache.export.result import Latency, Parity, Speed
from kdcache.export.trial import Inputs, Run

RUNS, WARM_UP = 20, 3


def compare(student: Finished, ours: Run, *, tolerance: float | None) -> Parity:
    """Return how far `ours` is from the student in torch, at the real positions of the trial's batches.

    Raises:
        MismatchError: It differs by more than the tolerance, or does not take a batch.
    """
    largest = difference = 0.0
    for inputs in student.trial.compared:
        expected = _real(inputs, student.run(inputs))
        try:
            found = _real(inputs, ours(inputs))
        except Exception as error:
            raise MismatchError(
                f"What was written does not take {_told(inputs)}: {str(error).splitlines()[0]}",
                where=str(student.folder),
            ) from error
        if found.shape != expected.shape:
            raise MismatchError(
                f"What was written gives logits of shape {found.shape} for {_told(inputs)}, and the student of "
                f"{expected.shape}.",
                where=str(student.folder),
            )
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
    return Parity(difference, largest, tolerance, tuple(shape_of(one) for one in student.trial.compared))


def latencies(before: Run, after: Run, inputs: Inputs) -> Speed:
    """Return how long both forward passes of a batch take on this machine, after a warm-up.

    They take turns, so that what else the machine is doing slows them alike.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + RUNS):
        for run, times in zip((before, after), taken, strict=True):
            began = time.perf_counter()
            run(inputs)
            if number >= WARM_UP:
                times.append(1000 * (time.perf_counter() - began))
    return Speed(next(iter(inputs)), shape_of(inputs), *map(_latency, taken))


def shape_of(inputs: Inputs) -> tuple[int, ...]:
    """Return the shape of the first input."""
    return tuple(next(iter(inputs.values())).shape)


def _latency(times: list[float]) -> Latency:
    middle, low, high = np.percentile(times, (50, 10, 90)).round(3).tolist()
    return Latency(middle, low, high, len(times))


def _real(inputs: Inputs, logits: NDArray[Any]) -> NDArray[Any]:
    """Return the logits without those of padding, whose values nobody has asked for."""
    mask = inputs.get("attention_mask")
    if mask is None or logits.ndim != 3 or mask.shape != logits.shape[:2]:
        return logits
    real: NDArray[Any] = logits[mask.astype(bool)]
    return real


def _told(inputs: Inputs) -> str:
    return ", ".join(f"{name} {list(values.shape)}" for name, values in inputs.items())
