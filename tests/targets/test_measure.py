"""What the device measures, against sorting and summing in float64."""

import shutil

import numpy as np
import pytest
import torch

from kdcache.targets import measure as measure_module
from kdcache.targets.measure import measure, measure_rows
from kdcache.targets.tensor import OutputHead
from tests.targets.dense import compact, language_like_rows, softmax


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return language_like_rows(60, 1500, 5)


def test_measured_targets_equal_the_sorted_and_summed_ones(logits: np.ndarray) -> None:
    labels = np.random.default_rng(0).integers(0, 1500, 60)
    expected = compact(logits, 32, labels)
    found = measure(torch.tensor(logits).float(), torch.tensor(labels), k=32).numpy()
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.logits, expected.logits)
    assert np.array_equal(found.label_logit, expected.label_logit)
    assert np.allclose(found.tail, expected.tail, atol=2e-5)


def test_equal_logits_are_ordered_by_id() -> None:
    row = torch.zeros(1, 100)
    row[0, [70, 30, 50]] = 5.0
    found = measure(row, torch.zeros(1, dtype=torch.int64), k=3)
    assert found.ids.tolist() == [[30, 50, 70]]


def test_a_tail_far_below_the_head_is_held_at_the_limit_and_stays_finite() -> None:
    row = torch.full((1, 50), -3000.0)
    row[0, :4] = 10.0
    found = measure(row, torch.zeros(1, dtype=torch.int64), k=4).numpy()
    assert np.isfinite(found.tail).all()
    assert found.tail_mass(1.0)[0] < 1e-13


def test_masked_vocabulary_outside_the_head_has_no_mass(logits: np.ndarray) -> None:
    z = torch.tensor(logits).float()
    z[:, 1000:] = -torch.inf
    found = measure(z, torch.zeros(60, dtype=torch.int64), k=16).numpy()
    assert np.allclose(found.log_partition(1.0), torch.logsumexp(z.double(), 1).numpy(), atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_show_in_the_first_kept_logit(logits: np.ndarray, bad: float) -> None:
    z = torch.tensor(logits).float()
    z[4, 900] = bad
    found = measure(z, torch.zeros(60, dtype=torch.int64), k=16)
    assert (~torch.isfinite(found.logits[:, 0])).nonzero().flatten().tolist() == [4]


def test_tiles_change_nothing(logits: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(60, 24, generator=generator)
    head = OutputHead(torch.randn(1500, 24, generator=generator))
    labels = torch.arange(60)
    uniforms = torch.rand(60, 5, generator=generator, dtype=torch.float64)
    whole = measure(head.logits(hidden), labels, k=8, uniforms=uniforms)
    monkeypatch.setitem(measure_module.TILE_ELEMENTS, "cpu", 1500 * 7)
    monkeypatch.setattr(measure_module, "PRODUCT_ELEMENTS", 1500 * 21)
    tiled = measure_rows(hidden, labels, k=8, head=head, uniforms=uniforms)
    assert torch.equal(whole.ids, tiled.ids)
    assert torch.allclose(whole.logits, tiled.logits, atol=1e-5)
    assert torch.allclose(whole.tail, tiled.tail, atol=1e-5)
    assert whole.draw_ids is not None
    assert tiled.draw_ids is not None
    assert torch.equal(whole.draw_ids, tiled.draw_ids)


def test_draws_come_from_the_tail_only_and_estimate_its_mass_without_bias(logits: np.ndarray) -> None:
    draws = 4000
    uniforms = torch.rand(60, draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = measure(torch.tensor(logits).float(), torch.zeros(60, dtype=torch.int64), k=16, uniforms=uniforms)
    targets = found.numpy()
    assert targets.draw_ids is not None
    assert not any(set(ids) & set(kept) for ids, kept in zip(targets.draw_ids.tolist(), targets.ids.tolist()))
    for temperature in (0.7, 1.0, 2.0, 4.0):
        weights = targets.draw_weights(temperature)
        spread = weights.std(axis=1) * draws / np.sqrt(draws)
        dense = 1 - np.take_along_axis(softmax(logits / temperature), targets.ids.astype(np.int64), axis=1).sum(1)
        assert (np.abs(weights.sum(1) - dense) < 5 * spread + 1e-3).all()


def test_draws_at_the_ends_of_the_unit_interval_stay_in_the_tail(logits: np.ndarray) -> None:
    uniforms = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64).expand(60, 2)
    found = measure(torch.tensor(logits).float(), torch.zeros(60, dtype=torch.int64), k=16, uniforms=uniforms)
    assert found.draw_logits is not None
    assert (found.draw_logits <= found.logits[:, -1:]).all()


def test_every_id_kept_leaves_an_empty_tail() -> None:
    z = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    found = measure(z, torch.zeros(3, dtype=torch.int64), k=20)
    assert torch.isneginf(found.tail).all()
    assert torch.allclose(found.log_partition(3.0), torch.logsumexp(z / 3, 1))


@pytest.mark.parametrize(("size", "k"), [(1500, 1), (1501, 7), (1500, 300), (1024, 16), (70, 64)])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_largest_are_found_by_blocks_of_ids(size: int, k: int, steps: int) -> None:
    z = torch.randn(40, size, generator=torch.Generator().manual_seed(size + k))
    if steps:  # many equal logits, across blocks and at the border of the head
        z = (z * steps).round() / steps
    z[3, 5], z[4, -1] = torch.inf, torch.nan
    found = measure(z, torch.zeros(40, dtype=torch.int64), k=k)
    expected = z.sort(dim=1, descending=True, stable=True).values[:, :k]
    assert torch.equal(found.logits[:4], expected[:4])
    assert torch.equal(found.logits[5:], expected[5:])
    assert torch.isnan(found.logits[4, 0])
    assert all(len(set(row)) == k for row in found.ids.tolist())


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a compiler"
)
def test_one_compiled_pass_gives_the_same_tail(logits: np.ndarray) -> None:
    z = torch.tensor(logits).bfloat16()
    z[:, 900:] = -torch.inf
    labels = torch.zeros(60, dtype=torch.int64)
    plain, fused = measure(z, labels, k=16), measure(z, labels, k=16, fused=True)
    assert torch.equal(plain.ids, fused.ids)
    assert torch.allclose(plain.tail, fused.tail, atol=2e-5)
    assert torch.allclose(measure(z[:1], labels[:1], k=16, fused=True).tail, plain.tail[:1], atol=2e-5)
