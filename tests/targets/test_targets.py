"""Targets in numpy and on torch: the same maths, and right against dense rows."""

import numpy as np
import pytest
import torch

from kdcache.targets import Targets
from kdcache.targets.tensor import OutputHead, TensorTargets
from tests.targets.dense import compact, language_like_rows, logsumexp, softmax

TEMPERATURES = [0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 40.0]


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return language_like_rows(50, 2000, 3)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_of_kept_ids_are_those_of_the_full_softmax(logits: np.ndarray, temperature: float) -> None:
    targets = compact(logits, 64)
    dense = np.take_along_axis(softmax(logits / temperature), targets.ids.astype(np.int64), axis=1)
    assert np.allclose(targets.probabilities(temperature), dense, rtol=0.01, atol=0)
    total = targets.probabilities(temperature).sum(1) + targets.tail_mass(temperature)
    assert np.allclose(total, 1.0)


def test_label_log_probability_is_right_inside_and_outside_the_head(logits: np.ndarray) -> None:
    labels = np.argsort(-logits, axis=1)[np.arange(50), np.arange(50) * 30]
    targets = compact(logits, 64, labels)
    dense = np.log(softmax(logits))[np.arange(50), labels]
    assert np.allclose(targets.label_log_probability(), dense, atol=1e-4)


def test_with_every_id_kept_the_tail_is_empty() -> None:
    logits = language_like_rows(5, 30, 0)
    targets = compact(logits, 30)
    assert (targets.tail_mass(2.0) == 0).all()
    assert np.allclose(targets.log_partition(2.0), logsumexp(logits / 2), atol=1e-5)
    tensors = TensorTargets.from_numpy(targets)
    assert torch.allclose(tensors.log_partition(2.0), torch.logsumexp(torch.tensor(logits) / 2, 1).float())


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_torch_and_numpy_agree(logits: np.ndarray, temperature: float) -> None:
    targets = compact(logits, 16)
    tensors = TensorTargets.from_numpy(targets)
    for name in ("log_partition", "tail_log_partition", "tail_mass"):
        ours = getattr(targets, name)(temperature)
        theirs = getattr(tensors, name)(temperature).numpy()
        assert np.allclose(ours, theirs, rtol=1e-5, atol=3e-4), name


def test_numpy_to_torch_and_back_changes_nothing(logits: np.ndarray) -> None:
    targets = compact(logits, 16)
    back = TensorTargets.from_numpy(targets).numpy()
    for name in ("ids", "logits", "tail", "label_logit"):
        assert np.array_equal(getattr(back, name), getattr(targets, name))
        assert getattr(back, name).dtype == getattr(targets, name).dtype


def test_slices_and_concatenation_are_inverse(logits: np.ndarray) -> None:
    tensors = TensorTargets.from_numpy(compact(logits, 8))
    joined = TensorTargets.concatenate([tensors[:20], tensors[20:]])
    assert torch.equal(joined.ids, tensors.ids)
    assert torch.equal(joined.tail, tensors.tail)
    assert len(compact(logits, 8)[10:12]) == 2


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(logits: np.ndarray, bad: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        compact(logits, 8).log_partition(bad)


def test_draw_weights_without_draws_say_so(logits: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no tail draws"):
        compact(logits, 8).draw_weights(1.0)


def test_output_head_applies_scale_then_softcap() -> None:
    head = OutputHead(torch.eye(3) * 4, torch.tensor([0.0, 1.0, 0.0]), scale=0.5, softcap=2.0)
    expected = 2 * np.tanh((np.array([4.0, 1.0, 0.0]) * 0.5) / 2)
    assert np.allclose(head.logits(torch.tensor([[1.0, 0.0, 0.0]]))[0].numpy(), expected)


def test_targets_are_immutable(logits: np.ndarray) -> None:
    with pytest.raises(AttributeError):
        compact(logits, 8).vocab_size = 3  # type: ignore[misc]
    assert isinstance(compact(logits, 8), Targets)


@pytest.mark.parametrize("k", [1, 5, 16])
def test_narrowed_targets_are_those_of_a_smaller_k(logits: np.ndarray, k: int) -> None:
    ours, wanted = compact(logits, 16).narrow(k), compact(logits, k)
    assert np.array_equal(ours.ids, wanted.ids)
    assert np.array_equal(ours.logits, wanted.logits)
    assert np.allclose(ours.tail, wanted.tail, atol=1e-3)
    whole = compact(logits, logits.shape[1]).narrow(k)
    assert np.allclose(whole.tail, wanted.tail, atol=1e-3)
    for temperature in (0.7, 1.0, 4.0):
        assert np.allclose(ours.tail_mass(temperature), wanted.tail_mass(temperature), atol=1e-3)


def test_narrowing_refuses_what_it_cannot_do(logits: np.ndarray) -> None:
    targets = compact(logits, 4)
    for k in (0, 5):
        with pytest.raises(ValueError, match="entries"):
            targets.narrow(k)
    ids = np.zeros((len(targets), 2), dtype=np.int32)
    drawn = Targets(
        targets.ids, targets.logits, targets.tail, targets.label_logit, targets.vocab_size, ids, ids.astype(np.float32)
    )
    with pytest.raises(ValueError, match="draws"):
        drawn.narrow(2)
    assert drawn.narrow(4) is drawn
