"""What a black box (a foreign file, a served model) tells of a sample, and the columns of a store made of it.

Legend: `N` positions, `L` tokens of a sample, `C` entries a position, `K` kept entries, `V` vocabulary.

A log-probability is a raw logit up to a constant of its row, and no target depends on that constant: log-probabilities
at T = 1 are kept as logits whose log-partition is 0. Their tail's mass is what is left of 1, known at T = 1 alone.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptObjectError, SourceError
from kdcache.store.schema import COUNTS, INVALID, MASKED
from kdcache.targets.log_partition import LIMIT

Array = NDArray[Any]

SURPLUS = 0.02
"""By how much probabilities may exceed 1 together: half-precision log-probabilities are off by half a percent each."""


@dataclass(frozen=True, slots=True)
class Told:
    """One sample as a foreign file or a served model tells it.

    Attributes:
        id: Unique.
        tokens: int64 [L].
        counts: bool [L-1], where the label counts.
        ids: int64 [L-1, C], the teacher's candidates in any order.
        log_probabilities: float32 [L-1, C], at T = 1; minus infinity where there is no candidate.
        columns: Decoded columns [L-1, ...] that a store needs, where the file tells all of them; the candidates are
            then empty.
        label_log_probabilities: float32 [L-1], the label's own, candidate or not; NaN where it was not told.
    """

    id: str
    tokens: NDArray[np.int64]
    counts: NDArray[np.bool_]
    ids: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]
    columns: Mapping[str, Array] | None = None
    label_log_probabilities: NDArray[np.float32] | None = None


def entries(sample: Told, vocab_size: int) -> NDArray[np.int64]:
    """Return how many candidates each position has [L-1]."""
    found: NDArray[np.int64] = (np.isfinite(sample.log_probabilities) & _inside(sample.ids, vocab_size)).sum(1)
    return found


def columns_of(sample: Told, *, k: int, vocab_size: int, counts: Counter[str]) -> dict[str, Array]:
    """Return the columns of a sample.

    Positions with fewer than k candidates are kept as invalid ones where their label counts.

    Args:
        sample: The sample.
        k: Entries to keep.
        vocab_size: V.
        counts: Positions that were changed, by reason, are added to it.

    Raises:
        CorruptObjectError: A candidate stands twice, or an id is outside the vocabulary.
        SourceError: The numbers are no log-probabilities at T = 1.
    """
    inputs, labels = sample.tokens[:-1], sample.tokens[1:]
    if sample.tokens.min() < 0 or sample.tokens.max() >= vocab_size:
        raise CorruptObjectError(f"A token is outside the vocabulary of {vocab_size}.", where=sample.id)
    shared = {"input_ids": inputs.astype(np.int32), "labels": labels.astype(np.int32)}
    if sample.columns is not None:
        return {**shared, **sample.columns}
    ids, values = _ordered(sample, vocab_size)
    _require_probabilities(sample.id, values)
    here = ids == labels[:, None]
    own = np.full(len(labels), np.nan) if sample.label_log_probabilities is None else sample.label_log_probabilities
    label = np.where(here.any(1), np.where(here, values, -np.inf).max(1), own)
    # of the tail, the label may be told alone
    beside = np.where(here.any(1) | np.isnan(own), 0, np.exp(own.astype(np.float64)))
    complete = np.isfinite(values[:, k - 1]) if values.shape[1] >= k else np.zeros(len(labels), dtype=bool)
    mask = np.where(complete, np.where(sample.counts, COUNTS, MASKED), np.where(sample.counts, INVALID, MASKED))
    counts["too few candidates"] += int((mask == INVALID).sum())
    counts["label's log-probability not told"] += int((np.isnan(label) & (mask == COUNTS)).sum())
    kept_ids, kept = np.tile(np.arange(k), (len(labels), 1)), np.zeros((len(labels), k), dtype=np.float32)
    kept_ids[complete], kept[complete] = ids[complete, :k], values[complete, :k]
    tail = np.zeros((len(labels), 1), dtype=np.float32)
    tail[complete] = _tail(values[complete], beside[complete], k, vocab_size)[:, None]
    return {
        **shared,
        "loss_mask": mask.astype(np.int32),
        "head_ids": kept_ids.astype(np.int32),
        "head_logits": kept,
        "tail_log_partition": tail,
        "label_logit": np.where(complete, label, 0).astype(np.float32),
    }


def _inside(ids: Array, vocab_size: int) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (ids >= 0) & (ids < vocab_size)
    return inside


def _ordered(sample: Told, vocab_size: int) -> tuple[Array, Array]:
    """Return candidates by falling log-probability, ties by lower id; where there is none, minus infinity."""
    values = np.where(np.isfinite(sample.log_probabilities), sample.log_probabilities, -np.inf).astype(np.float32)
    if bool((np.isfinite(values) & ~_inside(sample.ids, vocab_size)).any()):
        raise CorruptObjectError(
            f"A candidate's id is outside the vocabulary of {vocab_size}.",
            where=sample.id,
            hint="Give the right --vocab-size: the length of the teacher's row, which may exceed its tokenizer's.",
        )
    order = np.lexsort((sample.ids, -values), axis=1)
    ids, values = np.take_along_axis(sample.ids, order, 1), np.take_along_axis(values, order, 1)
    there = np.where(np.isfinite(values), ids, -1 - np.arange(ids.shape[1]))
    if bool((np.diff(np.sort(there, axis=1), axis=1) == 0).any()):
        raise CorruptObjectError("A candidate stands twice at one position.", where=sample.id)
    return ids, values


def _require_probabilities(name: str, values: Array) -> None:
    whole = np.exp(values.astype(np.float64)).sum(1).max(initial=0)
    if not whole <= 1 + SURPLUS:
        raise SourceError(
            f"The candidates' probabilities add up to {whole:.3g}.",
            where=name,
            hint="These are logits, or log-probabilities at another temperature than 1: neither can be read.",
        )


def _tail(values: Array, beside: Array, k: int, vocab_size: int) -> Array:
    """Return the tail's log-partition at b = 1 minus the last kept log-probability [N]."""
    if k == vocab_size:
        return np.full(len(values), -np.inf)
    wide = values.astype(np.float64)
    head, told = np.exp(wide[:, :k]).sum(1), np.exp(wide[:, k:]).sum(1) + beside
    with np.errstate(divide="ignore"):
        # rounded probabilities may add up to more than 1; of what lies beyond the head some may still be told
        mass = np.log(np.maximum(1 - head, told)) - wide[:, k - 1]
    limited: Array = np.clip(mass, -LIMIT, np.log(vocab_size - k))
    return limited
