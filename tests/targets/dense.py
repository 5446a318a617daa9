"""The slow, obvious float64 answers that the compact targets are compared with."""

import numpy as np
from numpy.typing import NDArray

from kdcache.targets import Targets
from kdcache.targets.log_partition import NODES

Float = NDArray[np.float64]


def logsumexp(values: Float) -> Float:
    """Row-wise log-sum-exp in float64; a row of no columns gives minus infinity."""
    if values.shape[1] == 0:
        return np.full(len(values), -np.inf)
    top = values.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(values - top).sum(axis=1))


def softmax(values: Float) -> Float:
    """Row-wise softmax in float64."""
    return np.exp(values - logsumexp(values)[:, None])


def compact(logits: Float, k: int, labels: NDArray[np.int64] | None = None) -> Targets:
    """The targets of dense rows, by sorting and by summing the tail itself at every node."""
    order = np.argsort(-logits, axis=1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=1)
    lowest = ranked[:, k - 1 : k]
    tail = np.stack([logsumexp(b * (ranked[:, k:] - lowest)) for b in NODES], axis=1)
    labels = np.zeros(len(logits), dtype=np.int64) if labels is None else labels
    return Targets(
        ids=order[:, :k].astype(np.int32),
        logits=ranked[:, :k].astype(np.float32),
        tail=tail.astype(np.float32),
        label_logit=np.take_along_axis(logits, labels[:, None], axis=1)[:, 0].astype(np.float32),
        vocab_size=logits.shape[1],
    )


def language_like_rows(rows: int, vocabulary: int, seed: int) -> Float:
    """Rows shaped like a language model's: a normal bulk and a few strong candidates."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2.0, (rows, vocabulary))
    logits[:, :20] += rng.exponential(6.0, (rows, 20))
    return logits.astype(np.float32).astype(np.float64)
