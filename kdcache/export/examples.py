"""What a student of examples is tried on: the first examples of a held-out store, whole and cut shorter.

Legend: `S` samples, `T` length of a sequence, `C` outputs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.evaluate import scores
from kdcache.export.result import Quality
from kdcache.export.trial import Answering, Done, Inputs, Run, Trial
from kdcache.store import Store
from kdcache.train import held_out
from kdcache.train.config import DataConfig
from kdcache.train.feed import held_out_feed

EXAMPLES = 32
"""Taken from the beginning of the store; a smaller store's are repeated."""

COMPARED = (1, 2, 5, 24)
"""Samples of the batches on which what was written is compared; together all that are taken."""

CUT = 3
"""Samples of the batches of shorter sequences."""

TIMED = (1, 32)

TRACED = 2


def examples_trial(model: nn.Module, store: Store, data: DataConfig, *, batch_size: int, yes_no: bool) -> Trial:
    """Return what a student of examples is tried on.

    The first axis of every input is free. So is the second of those [S, T] that the student also takes shorter, such as
    token ids and their mask; pixels keep their size.

    Args:
        model: The student, on the CPU.
        store: Held out, of a classifier.
        data: Names its examples.
        batch_size: Samples of it a batch.
        yes_no: The outputs are logits of yes-or-no questions.

    Raises:
        ConfigError, SourceError, MismatchError: As `kdcache.train.feed.Feed`.
    """
    feed = held_out_feed(store, data)
    probe = feed.probe(EXAMPLES)
    # a batch is called by its first input, and a mask says little
    found = {name: probe[name].numpy() for name in sorted(probe, key="attention_mask".__eq__)}
    available = len(next(iter(found.values())))
    all_of_them = {name: values[np.arange(EXAMPLES) % available] for name, values in found.items()}
    # of several lengths that of the first sequence
    longest = next((values.shape[1] for values in found.values() if values.ndim == 2), 0)
    sequences = {name for name, values in found.items() if values.ndim >= 2 and values.shape[1] == longest}
    few = _rows(all_of_them, 0, CUT)
    cut = (_cut(few, sequences, length) for length in _lengths(longest))
    shorter = [one for one in cut if _takes(model, one)]
    axes = {name: {0: "batch"} | ({1: "sequence"} if shorter and name in sequences else {}) for name in found}
    labels = "label_values" if "label_values" in store.columns else "labels"

    def quality(run: Run, done: Done) -> Quality:
        student = Answering(run, tuple(found))
        values = scores(student, store, data, batch_size=batch_size, yes_no=yes_no)
        own = {name: value for name, value in values.items() if not name.startswith("teacher_")}
        if own and labels == "label_values":
            done(len(store))
            return Quality(len(store), own)
        whole = held_out(student, store, batch_size=batch_size, data=data, progress=lambda samples, _all: done(samples))
        names = ("accuracy", "top1_agreement", "cross_entropy", "kl") if own else ("top1_agreement", "kl")
        return Quality(whole.positions, {**{name: getattr(whole, name) for name in names}, **own})

    return Trial(
        call=_call,
        traced=_rows(all_of_them, 0, TRACED),
        axes=axes,
        compared=(*_batches(all_of_them), *shorter),
        timed=tuple(_rows(all_of_them, 0, count) for count in TIMED),
        quality=quality,
    )


def _call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    return model(**inputs)


def _lengths(longest: int) -> list[int]:
    """Return lengths below a sequence's own, from a single token on."""
    return sorted({1, longest // 3, longest // 2, longest - 1} - {0, longest}) if longest > 1 else []


def _takes(model: nn.Module, inputs: Inputs) -> bool:
    try:
        with torch.inference_mode():
            model(**{name: torch.from_numpy(values) for name, values in inputs.items()})
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def _batches(inputs: Inputs) -> Iterator[Inputs]:
    start = 0
    for count in COMPARED:
        yield _rows(inputs, start, count)
        start += count


def _rows(inputs: Inputs, start: int, count: int) -> Inputs:
    return {name: values[start : start + count] for name, values in inputs.items()}


def _cut(inputs: Inputs, sequences: set[str], length: int) -> Inputs:
    return {
        name: np.ascontiguousarray(values[:, :length]) if name in sequences else values
        for name, values in inputs.items()
    }
