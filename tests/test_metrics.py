"""Metrics against numbers computed by hand, against the tools they are named after, and their properties."""

import math
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from kdcache import metrics
from kdcache.metrics import Rouge, Summary

PREDICTED, LABELS = np.array([0, 1, 1, 2, 0, 3]), np.array([0, 1, 2, 2, 1, 1])
TABLE = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55]])


def tables(classes: int = 4) -> st.SearchStrategy[np.ndarray]:
    """Rows of probabilities, at least one."""
    row = st.lists(st.floats(1e-3, 1.0), min_size=classes, max_size=classes)
    return st.lists(row, min_size=1, max_size=12).map(lambda rows: (a := np.array(rows)) / a.sum(axis=1, keepdims=True))


def test_classification_by_hand() -> None:
    assert metrics.accuracy(PREDICTED, LABELS) == pytest.approx(3 / 6)
    # class 0: TP 1, FP 1, FN 0; class 1: TP 1, FP 1, FN 2; class 2: TP 1, FP 0, FN 1; 3 is never a label
    assert metrics.macro_f1(PREDICTED, LABELS) == pytest.approx((2 / 3 + 2 / 5 + 2 / 3) / 3)
    assert metrics.micro_f1(PREDICTED, LABELS) == pytest.approx(6 / (6 + 2 + 3))


def test_calibration_error_and_brier_by_hand() -> None:
    labels = np.array([0, 1, 1, 1])
    # confidences 0.9, 0.6, 0.8, 0.55 lie in bins 14, 9, 12, 9 of 15; right, wrong, right, right
    expected = (abs(1 - 0.9) + abs(1 - (0.6 + 0.55)) + abs(1 - 0.8)) / 4
    assert metrics.expected_calibration_error(TABLE, labels) == pytest.approx(expected)
    assert metrics.expected_calibration_error(TABLE, labels, bins=1) == pytest.approx(abs(3 - 2.85) / 4)
    brier = (2 * 0.1**2 + 2 * 0.6**2 + 2 * 0.2**2 + 2 * 0.45**2) / 4
    assert metrics.brier(TABLE, labels) == pytest.approx(brier)


def test_a_confidence_on_the_border_of_two_bins_is_in_the_lower() -> None:
    table = np.array([[0.8, 0.2], [0.75, 0.25]])
    # with five bins 0.8 ends the fourth, (0.6, 0.8], beside 0.75
    assert metrics.expected_calibration_error(table, np.array([0, 1]), bins=5) == pytest.approx(abs(1 - 1.55) / 2)
    assert metrics.expected_calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 1.0


def test_agreement_and_kl_by_hand() -> None:
    other = np.array([[0.5, 0.5], [0.1, 0.9], [0.3, 0.7], [0.4, 0.6]])
    assert metrics.agreement(TABLE, other) == pytest.approx(3 / 4)
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    assert metrics.mean_kl(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    sure = np.array([[1.0, 0.0]])
    assert metrics.mean_kl(sure, p) == pytest.approx(math.log(2))
    assert metrics.mean_kl(p, sure) == math.inf


def test_regression_by_hand() -> None:
    ours, theirs = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])
    assert metrics.mean_absolute_error(ours, theirs) == pytest.approx(1.0)
    assert metrics.root_mean_squared_error(ours, theirs) == pytest.approx(math.sqrt(5 / 3))
    assert metrics.r_squared(ours, theirs) == pytest.approx(1 - 5 / 2)
    assert metrics.pearson(ours, theirs) == pytest.approx(np.corrcoef(ours, theirs)[0, 1])
    assert metrics.pearson(ours, theirs) == pytest.approx(1 / math.sqrt(2 * 14 / 3))


def test_rouge_by_hand() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" and two candidates that differ in order alone
    reference = "Police killed the gunman."
    first = metrics.rouge(["police KILL the gunman"], [reference])
    second = metrics.rouge(["the gunman kill police"], [reference])
    assert first == Rouge(pytest.approx(3 / 4), pytest.approx(1 / 3), pytest.approx(3 / 4))
    assert second == Rouge(pytest.approx(3 / 4), pytest.approx(1 / 3), pytest.approx(2 / 4))
    both = metrics.rouge(["police KILL the gunman", "nothing"], [reference, "alike"])
    assert both.rouge_l == pytest.approx(3 / 8)
    # a word counts as often as both have it: 2 matches of 3 and 2 words
    assert metrics.rouge(["a a a"], ["a a"]).rouge1 == pytest.approx(4 / 5)
    assert metrics.rouge(["snake_case, 3.14"], ["snake case 3 14"]).rouge2 == 1.0
    assert metrics.rouge(["..."], ["Zürich"]) == Rouge(0.0, 0.0, 0.0)


def test_bleu_is_that_of_sacrebleu() -> None:
    ours = ["the cat is on the mat", "there is a dog in the garden today"]
    theirs = ["the cat sat on the mat", "there is a dog in the garden"]
    assert metrics.bleu(ours, theirs) == sacrebleu.corpus_bleu(ours, [theirs]).score
    assert metrics.bleu(theirs, theirs) == pytest.approx(100.0)
    assert 0 < metrics.bleu(ours, theirs) < 100


def test_exact_match_and_summary_by_hand() -> None:
    assert metrics.exact_match(["a", "b ", "c"], ["a", "b", "c"]) == pytest.approx(2 / 3)
    assert metrics.summary([1.0, 2.0, 4.0]) == Summary(pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)), 3)
    assert metrics.summary([5.0]) == Summary(5.0, None, 1)


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    code = (
        "import sys; sys.modules['sacrebleu'] = None\n"
        "from kdcache import metrics\nfrom kdcache.errors import ConfigError\n"
        "try: metrics.bleu(['a'], ['a'])\n"
        "except ConfigError as error: sys.exit(0 if \"pip install 'kdcache[text]'\" in error.hint else 1)\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_it_needs_neither_torch_nor_sacrebleu() -> None:
    code = "import sys, kdcache.metrics; sys.exit('torch' in sys.modules or 'sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


EMPTY, ONE, TWO = np.array([]), np.array([1.0]), np.array([1.0, 2.0])
CLASS = np.array([0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.accuracy(EMPTY, EMPTY), "N >= 1"),
        (lambda: metrics.accuracy(ONE, TWO), "two arrays"),
        (lambda: metrics.macro_f1(TABLE, TABLE), "two arrays"),
        (lambda: metrics.micro_f1(EMPTY, EMPTY), "N >= 1"),
        (lambda: metrics.expected_calibration_error(TABLE, CLASS), "one an example"),
        (lambda: metrics.expected_calibration_error(TABLE[:1], np.array([2])), "outside 0 to 1"),
        (lambda: metrics.expected_calibration_error(TABLE[:1], CLASS, bins=0), "at least one bin"),
        (lambda: metrics.brier(TABLE[:1] * 2, CLASS), "sums to 1"),
        (lambda: metrics.brier(TABLE[:1], np.array([0.5])), "whole numbers"),
        (lambda: metrics.brier(np.zeros((0, 3)), CLASS), "N, C >= 1"),
        (lambda: metrics.agreement(TABLE, TABLE[:2]), "different shapes"),
        (lambda: metrics.agreement(TABLE * np.nan, TABLE), "NaN"),
        (lambda: metrics.mean_kl(TABLE, -TABLE), "non-negative"),
        (lambda: metrics.mean_kl(TABLE[:, :1] * 0 + 1, TABLE), "different shapes"),
        (lambda: metrics.mean_absolute_error(TWO, TWO * np.nan), "finite"),
        (lambda: metrics.root_mean_squared_error(EMPTY, EMPTY), "N >= 1"),
        (lambda: metrics.r_squared(TWO, np.ones(2)), "all equal"),
        (lambda: metrics.pearson(TWO, np.ones(2)), "constant"),
        (lambda: metrics.bleu([], []), "at least one"),
        (lambda: metrics.bleu("text", "text"), "lists"),
        (lambda: metrics.rouge(["a"], []), "as many"),
        (lambda: metrics.exact_match([], []), "at least one"),
        (lambda: metrics.summary([]), "one or more"),
        (lambda: metrics.summary([1.0, math.inf]), "finite"),
    ],
)
def test_empty_and_mismatched_inputs_are_refused(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]


@given(tables(), st.data())
def test_classification_keeps_its_range_and_perfection(table: np.ndarray, data: st.DataObject) -> None:
    size = len(table)
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    predicted = table.argmax(axis=1)
    assert metrics.macro_f1(labels, labels) == metrics.micro_f1(labels, labels) == 1.0
    assert 0 <= metrics.macro_f1(predicted, labels) <= 1
    assert 0 <= metrics.expected_calibration_error(table, labels) <= 1
    assert 0 <= metrics.brier(table, labels) <= 2
    assert (
        metrics.brier(np.eye(4)[labels], labels) == metrics.expected_calibration_error(np.eye(4)[labels], labels) == 0
    )
    if set(predicted) <= set(labels.tolist()):
        assert metrics.micro_f1(predicted, labels) == pytest.approx(metrics.accuracy(predicted, labels))


@given(tables(), st.floats(0.01, 50))
def test_agreement_and_kl_keep_what_they_promise(table: np.ndarray, scale: float) -> None:
    other = np.roll(table, 1, axis=1)
    assert metrics.agreement(table, np.log(table) * scale) == 1.0
    assert metrics.agreement(table, other) == metrics.agreement(other, table)
    assert metrics.mean_kl(table, table) == 0.0
    assert metrics.mean_kl(table, other) >= -1e-12


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=9, unique=True), st.floats(0.1, 9), st.integers(-9, 9))
def test_regression_keeps_what_it_promises(numbers: list[int], scale: float, shift: int) -> None:
    values = np.array(numbers, dtype=np.float64)
    assert metrics.pearson(scale * values + shift, values) == pytest.approx(1.0)
    assert metrics.pearson(-scale * values, values) == pytest.approx(-1.0)
    assert metrics.r_squared(values, values) == 1.0
    assert metrics.r_squared(np.full(len(values), values.mean()), values) == pytest.approx(0.0, abs=1e-12)
    assert metrics.mean_absolute_error(values + shift, values) == pytest.approx(abs(shift))
    assert metrics.root_mean_squared_error(values[::-1], values) >= metrics.mean_absolute_error(values[::-1], values)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=2, max_size=12), st.data())
def test_rouge_is_symmetric_and_L_is_never_above_1(words: list[str], data: st.DataObject) -> None:
    other = data.draw(st.permutations(words))
    here = metrics.rouge([" ".join(words)], [" ".join(other)])
    assert here == metrics.rouge([" ".join(other)], [" ".join(words)])
    assert here.rouge1 == 1.0
    assert 0 <= here.rouge_l <= here.rouge1
    assert metrics.rouge([" ".join(words)], [" ".join(words).upper()]) == Rouge(1.0, 1.0, 1.0)
