"""Numbers that say how good a student is: pure functions of arrays, or of lists of texts.

Legend: `N` examples, `C` classes.

All arithmetic is float64. Every function raises ValueError where its inputs are empty or do not belong together, and
where numbers or tables hold NaN: a result computed from those would only look like one.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError

Array = NDArray[Any]
Float = NDArray[np.float64]

SUM_TOLERANCE = 1e-3
"""How far a row of probabilities may be from summing to 1: float16 tables are that coarse."""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Summary:
    """Several seeds' values of one metric.

    Attributes:
        mean: Of the values.
        deviation: Standard deviation with n - 1; None of a single value, which has no spread to tell.
        count: n.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Rouge:
    """ROUGE F-measures, each 0 to 1, averaged over pairs.

    Attributes:
        rouge1: Of words.
        rouge2: Of pairs of neighbouring words.
        rouge_l: Of the longest common subsequence of words.
    """

    rouge1: float
    rouge2: float
    rouge_l: float


def accuracy(predicted: Array, labels: Array) -> float:
    """Return the share, 0 to 1, of examples whose predicted class [N] is their label [N].

    Raises:
        ValueError: The arrays are empty, or not both [N].
    """
    _require_alike(predicted, labels)
    return float(np.mean(predicted == labels))


def macro_f1(predicted: Array, labels: Array) -> float:
    """Return the mean over the classes that occur in `labels` of 2 TP / (2 TP + FP + FN), 0 to 1.

    A class that is never right counts 0 (van Rijsbergen 1979, chapter 7, with beta = 1). scikit-learn's
    `f1_score(labels, predicted, labels=np.unique(labels), average="macro")` is the same number.

    Args:
        predicted: Class of each example [N].
        labels: True class of each [N].

    Raises:
        ValueError: The arrays are empty, or not both [N].
    """
    right, wrong, missed = _counts(predicted, labels)
    return float(np.mean(2 * right / (2 * right + wrong + missed)))


def micro_f1(predicted: Array, labels: Array) -> float:
    """Return 2 TP / (2 TP + FP + FN), 0 to 1, with TP, FP and FN summed over the classes that occur in `labels`.

    It is the accuracy where every predicted class occurs in `labels`; a prediction outside them is a miss, and no false
    find of any class that counts.

    Args:
        predicted: Class of each example [N].
        labels: True class of each [N].

    Raises:
        ValueError: The arrays are empty, or not both [N].
    """
    right, wrong, missed = (one.sum() for one in _counts(predicted, labels))
    return float(2 * right / (2 * right + wrong + missed))


def expected_calibration_error(probabilities: Array, labels: Array, *, bins: int = 15) -> float:
    """Return the mean distance, 0 to 1, between how sure the predictions are and how often they are right.

    Guo et al. 2017, equation 3: examples go by the largest probability p into bins ((m - 1) / M, m / M], and the bins'
    |accuracy - mean p| are averaged by their examples.

    Args:
        probabilities: [N, C], rows summing to 1.
        labels: True class of each [N], 0 to C - 1.
        bins: M.

    Raises:
        ValueError: Empty or mismatched arrays, labels outside the table, rows that are no probabilities, or no bins.
    """
    table = _probabilities(probabilities)
    _require_labels(table, labels)
    if bins < 1:
        raise ValueError(f"there is at least one bin, not {bins}")
    sure = table.max(axis=1)
    right = table.argmax(axis=1) == labels
    place = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(table))


def brier(probabilities: Array, labels: Array) -> float:
    """Return the mean over examples of the squared distance to the label's one-hot row, 0 to 2 (Brier 1950).

    Args:
        probabilities: [N, C], rows summing to 1.
        labels: True class of each [N], 0 to C - 1.

    Raises:
        ValueError: Empty or mismatched arrays, labels outside the table, or rows that are no probabilities.
    """
    table = _probabilities(probabilities)
    _require_labels(table, labels)
    told = table[np.arange(len(table)), labels]
    return float(np.mean((table**2).sum(axis=1) - 2 * told + 1))


def agreement(ours: Array, theirs: Array) -> float:
    """Return the share, 0 to 1, of examples at which two tables put the same class first; ties go to the lower class.

    Args:
        ours: Scores [N, C]: logits or probabilities.
        theirs: The same of the other model.

    Raises:
        ValueError: The tables are empty, hold NaN, or have different shapes.
    """
    one, other = _table(ours), _table(theirs)
    _require_same_shape(one, other)
    return float(np.mean(one.argmax(axis=1) == other.argmax(axis=1)))


def mean_kl(teacher: Array, student: Array) -> float:
    """Return the mean over examples of sum p log(p / q) in nats, 0 to infinity (Kullback and Leibler 1951).

    Infinite where the student rules out a class that the teacher does not; what the teacher rules out adds 0.

    Args:
        teacher: p [N, C], rows summing to 1.
        student: q [N, C].

    Raises:
        ValueError: Empty or mismatched tables, or rows that are no probabilities.
    """
    p, q = _probabilities(teacher), _probabilities(student)
    _require_same_shape(p, q)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return float(terms.sum(axis=1).mean())


def mean_absolute_error(predicted: Array, values: Array) -> float:
    """Return the mean |prediction - value| [N], 0 to infinity, in the unit of the values.

    Raises:
        ValueError: The arrays are empty, not both [N], or hold NaN.
    """
    ours, theirs = _numbers(predicted, values)
    return float(np.mean(np.abs(ours - theirs)))


def root_mean_squared_error(predicted: Array, values: Array) -> float:
    """Return the root of the mean squared difference [N], 0 to infinity, in the unit of the values.

    Raises:
        ValueError: The arrays are empty, not both [N], or hold NaN.
    """
    ours, theirs = _numbers(predicted, values)
    return math.sqrt(float(np.mean((ours - theirs) ** 2)))


def r_squared(predicted: Array, values: Array) -> float:
    """Return the coefficient of determination, 1 - squared error / squared deviation from the mean; at most 1.

    0 is what the values' mean would reach; there is no lower end.

    Raises:
        ValueError: The arrays are empty, not both [N], hold NaN, or the values are all equal.
    """
    ours, theirs = _numbers(predicted, values)
    spread = float(np.sum((theirs - theirs.mean()) ** 2))
    if spread == 0:
        raise ValueError("values that are all equal have no variance to explain")
    return 1 - float(np.sum((ours - theirs) ** 2)) / spread


def pearson(predicted: Array, values: Array) -> float:
    """Return the linear correlation, -1 to 1 (Pearson 1895).

    Raises:
        ValueError: The arrays are empty, not both [N], hold NaN, or one of them is constant.
    """
    ours, theirs = _numbers(predicted, values)
    a, b = ours - ours.mean(), theirs - theirs.mean()
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    if scale == 0:
        raise ValueError("a constant has no correlation with anything")
    return float(np.clip(a @ b / scale, -1.0, 1.0))


def bleu(predicted: Sequence[str], references: Sequence[str]) -> float:
    """Return the BLEU of a whole corpus, 0 to 100, as sacrebleu computes it by default (Papineni 2002, Post 2018).

    Args:
        predicted: One text an example.
        references: One reference an example.

    Raises:
        ValueError: The lists are empty or of different lengths.
        ConfigError: sacrebleu is not installed.
    """
    _require_pairs(predicted, references)
    try:
        import sacrebleu
    except ImportError as error:
        raise ConfigError("BLEU needs the package sacrebleu.", hint="Run: pip install 'kdcache[text]'") from error
    return float(sacrebleu.corpus_bleu(list(predicted), [list(references)]).score)


def rouge(predicted: Sequence[str], references: Sequence[str]) -> Rouge:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004): F-measures with beta = 1, averaged over pairs.

    Words are runs of letters and digits, in lower case and not stemmed; L takes each text as one sequence. A pair with
    nothing to match on either side counts 0.

    Args:
        predicted: One text an example.
        references: One reference an example.

    Raises:
        ValueError: The lists are empty or of different lengths.
    """
    _require_pairs(predicted, references)
    scores = [_rouge(_words(ours), _words(theirs)) for ours, theirs in zip(predicted, references, strict=True)]
    one, two, longest = np.mean(scores, axis=0).tolist()
    return Rouge(one, two, longest)


def exact_match(predicted: Sequence[str], references: Sequence[str]) -> float:
    """Return the share, 0 to 1, of texts that are their reference, character by character.

    Raises:
        ValueError: The lists are empty or of different lengths.
    """
    _require_pairs(predicted, references)
    return sum(ours == theirs for ours, theirs in zip(predicted, references, strict=True)) / len(predicted)


def summary(values: Sequence[float]) -> Summary:
    """Return mean, standard deviation (with n - 1) and count of several seeds' values.

    Raises:
        ValueError: There are none, or one is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"a summary is of one or more finite numbers, not {values!r}")
    return Summary(float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None, len(numbers))


def _counts(predicted: Array, labels: Array) -> tuple[Float, Float, Float]:
    """Return true positives, false positives and false negatives of each class that occurs in the labels."""
    _require_alike(predicted, labels)
    classes = np.unique(labels)
    found, due = predicted[:, None] == classes, labels[:, None] == classes
    return (
        (found & due).sum(axis=0).astype(np.float64),
        (found & ~due).sum(axis=0).astype(np.float64),
        (~found & due).sum(axis=0).astype(np.float64),
    )


def _rouge(ours: list[str], theirs: list[str]) -> tuple[float, float, float]:
    pairs = [list(pairwise(words)) for words in (ours, theirs)]
    single = sum((Counter(ours) & Counter(theirs)).values())
    double = sum((Counter(pairs[0]) & Counter(pairs[1])).values())
    sizes = len(ours) + len(theirs)
    longest = _common_subsequence(ours, theirs)
    # 2 P R / (P + R) with P = matches / len(ours) and R = matches / len(theirs)
    return (
        2 * single / sizes if sizes else 0.0,
        2 * double / max(1, len(pairs[0]) + len(pairs[1])),
        2 * longest / sizes if sizes else 0.0,
    )


def _common_subsequence(ours: list[str], theirs: list[str]) -> int:
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for place, other in enumerate(theirs, 1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _require_pairs(predicted: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(predicted, str) or isinstance(references, str):
        raise ValueError("texts come as lists, one an example")
    if not predicted or len(predicted) != len(references):
        raise ValueError(f"{len(predicted)} texts and {len(references)} references: as many of both, and at least one")


def _require_alike(ours: Array, theirs: Array) -> None:
    if ours.ndim != 1 or ours.shape != theirs.shape or len(ours) == 0:
        raise ValueError(f"two arrays [N] with N >= 1 are due, not {ours.shape} and {theirs.shape}")


def _require_same_shape(ours: Array, theirs: Array) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(f"the tables have different shapes: {ours.shape} and {theirs.shape}")


def _require_labels(table: Float, labels: Array) -> None:
    if labels.shape != table.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels [{len(table)}] are whole numbers, one an example, not {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= table.shape[1]:
        raise ValueError(f"a label is outside 0 to {table.shape[1] - 1}")


def _numbers(predicted: Array, values: Array) -> tuple[Float, Float]:
    _require_alike(predicted, values)
    ours, theirs = predicted.astype(np.float64), values.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("predictions and values are finite numbers")
    return ours, theirs


def _table(scores: Array) -> Float:
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"a table [N, C] with N, C >= 1 is due, not {scores.shape}")
    wide = scores.astype(np.float64)
    if np.isnan(wide).any():
        raise ValueError("the table holds NaN")
    return wide


def _probabilities(table: Array) -> Float:
    wide = _table(table)
    if wide.min() < 0 or np.abs(wide.sum(axis=1) - 1).max() > SUM_TOLERANCE:
        raise ValueError("every row of probabilities is non-negative and sums to 1")
    return wide
