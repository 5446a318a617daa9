"""Attention losses against loops over heads and positions, and their blindness to padding."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdcache import registry
from kdcache.errors import ConfigError
from kdcache.losses.attention import AttentionLoss, find
from tests.losses.dense import rows

NAMES = ["map_kl", "map_mse", "value_relation"]
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]).bool()
"""All real, padded on the right, and real positions that are not side by side."""

CASES = [
    ("map_kl", {}, 4, 2),
    ("map_kl", {"per_head": True}, 3, 3),
    ("map_mse", {}, 4, 2),
    ("map_mse", {"per_head": True}, 3, 3),
    ("value_relation", {}, 6, 8),
    ("value_relation", {"heads": 2}, 6, 8),
]
"""A loss, its parameters, and the heads or the width of each side."""


def given(name: str, size: int, seed: int) -> Tensor:
    """What a loss reads of one side: maps [S, size, T, T] that heed the mask, or vectors [S, T, size]."""
    if name == "value_relation":
        return rows(3, 5 * size, seed, scale=1.0).reshape(3, 5, size)
    scores = rows(3, size * 25, seed).reshape(3, size, 5, 5)
    return torch.softmax(scores.masked_fill(~MASK[:, None, None], -torch.inf), -1)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def slow(name: str, student: Tensor, teacher: Tensor, per_head: bool = False, heads: int = 1) -> list[float]:
    """Every sample's loss, cut down to its real positions first."""
    found = []
    for sample in range(len(student)):
        real = [t for t in range(5) if MASK[sample, t]]
        if name == "value_relation":
            terms = []
            for head in range(heads):
                for t in real:
                    both = []
                    for side in (teacher, student):
                        d = side.shape[2] // heads
                        x = side[sample, :, head * d : (head + 1) * d].tolist()
                        both.append(softmax([sum(a * b for a, b in zip(x[t], x[u])) / math.sqrt(d) for u in real]))
                    terms.append(kl(*both))
            found.append(sum(terms) / len(terms))
            continue
        q, p = student[sample], teacher[sample]
        pairs = list(zip(q, p)) if per_head else [(q.mean(0), p.mean(0))]
        terms = []
        for ours, theirs in pairs:
            for t in real:
                a, b = ([float(side[t, u]) for u in real] for side in (theirs, ours))
                terms.append(kl(a, b) if name == "map_kl" else sum((x - y) ** 2 for x, y in zip(a, b)) / len(real))
        found.append(sum(terms) / len(terms))
    return found


def of(name: str, **parameters: int | bool) -> Callable[[Tensor, Tensor], Tensor]:
    loss: AttentionLoss = find(name, **parameters)
    return lambda student, teacher: loss(student, teacher, MASK)


@pytest.mark.parametrize(("name", "parameters", "ours", "theirs"), CASES)
def test_every_sample_has_the_value_of_the_formula(name: str, parameters: dict, ours: int, theirs: int) -> None:
    student, teacher = given(name, ours, 1), given(name, theirs, 2)
    expected = torch.tensor(slow(name, student, teacher, **parameters)).double()
    torch.testing.assert_close(of(name, **parameters)(student, teacher), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("name", "parameters", "ours", "theirs"), CASES)
def test_gradients_pass_the_numerical_check(name: str, parameters: dict, ours: int, theirs: int) -> None:
    # maps with a little mass everywhere: at a zero there is no slope on both sides
    student = (0.05 + given(name, ours, 1)).requires_grad_()
    loss = of(name, **parameters)
    assert torch.autograd.gradcheck(lambda s: loss(s, given(name, theirs, 2)), student)


@pytest.mark.parametrize(("name", "parameters", "ours", "theirs"), CASES)
def test_agreement_costs_nothing(name: str, parameters: dict, ours: int, theirs: int) -> None:
    student = given(name, ours, 1).requires_grad_()
    loss = of(name, **parameters)(student, student.detach())
    assert loss.abs().max() < 1e-12
    if name == "value_relation":
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-9


@pytest.mark.parametrize(("name", "parameters", "ours", "theirs"), CASES)
@pytest.mark.parametrize("junk", [7.0, 1e30, torch.inf, torch.nan])
def test_what_stands_at_padding_changes_nothing(
    name: str, parameters: dict, ours: int, theirs: int, junk: float
) -> None:
    real = MASK[:, :, None] if name == "value_relation" else (MASK[:, :, None] & MASK[:, None])[:, None]
    results = []
    for content in (0.0, junk):
        student, teacher = (given(name, n, s).masked_fill(~real, content) for n, s in ((ours, 1), (theirs, 2)))
        student.requires_grad_()
        loss = of(name, **parameters)(student, teacher)
        loss.sum().backward()
        assert student.grad is not None
        assert not student.grad.masked_select(~real).any()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


@pytest.mark.parametrize(("name", "parameters", "ours", "theirs"), CASES)
def test_a_longer_padding_changes_nothing(name: str, parameters: dict, ours: int, theirs: int) -> None:
    student, teacher = given(name, ours, 1), given(name, theirs, 2)
    pad = (0, 0, 0, 2) if name == "value_relation" else (0, 2, 0, 2)
    longer = [torch.nn.functional.pad(side, pad) for side in (student, teacher)]
    found = find(name, **parameters)(*longer, torch.nn.functional.pad(MASK, (0, 2)))
    torch.testing.assert_close(found, of(name, **parameters)(student, teacher))


@pytest.mark.parametrize(("name", "parameters", "ours", "theirs"), CASES)
def test_a_sample_without_positions_costs_nothing(name: str, parameters: dict, ours: int, theirs: int) -> None:
    student = given(name, ours, 1).requires_grad_()
    mask = MASK.clone()
    mask[1] = False
    loss = find(name, **parameters)(student, given(name, theirs, 2), mask)
    loss.sum().backward()
    assert float(loss[1].detach()) == 0
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[1].any()


@pytest.mark.parametrize(("name", "parameters", "ours", "theirs"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_even_under_autocast(
    name: str, parameters: dict, ours: int, theirs: int, dtype: torch.dtype
) -> None:
    student, teacher = given(name, ours, 1).to(dtype), given(name, theirs, 2).to(dtype)
    loss = of(name, **parameters)
    expected = loss(student.double(), teacher.double()).float()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = loss(student, teacher)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "parameters", "ours", "theirs"), CASES)
def test_one_sample_and_equal_rows_are_finite(name: str, parameters: dict, ours: int, theirs: int) -> None:
    student, teacher = given(name, ours, 1)[:1].float(), given(name, theirs, 2)[:1].float()
    student[..., 1, :] = student[..., 0, :]
    student.requires_grad_()
    loss = find(name, **parameters)(student, teacher, MASK[:1])
    loss.sum().backward()
    assert loss.shape == (1,)
    assert loss.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["map_kl", "map_mse"])
def test_causal_maps_are_compared_where_there_is_something(name: str) -> None:
    student, teacher = (torch.softmax(rows(8, 64, seed).view(1, 8, 8, 8).tril(), -1).tril() for seed in (1, 2))
    student, teacher = student / student.sum(-1, keepdim=True), teacher / teacher.sum(-1, keepdim=True)
    student.requires_grad_()
    loss = find(name)(student, teacher, torch.ones(1, 8).bool())
    loss.sum().backward()
    assert float(loss.detach()) > 0
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_map_kl_rescales_rows_and_bounds_what_is_impossible() -> None:
    student, teacher = given("map_kl", 2, 1), given("map_kl", 2, 2)
    torch.testing.assert_close(of("map_kl")(0.7 * student, 1.3 * teacher), of("map_kl")(student, teacher))
    one_hot = torch.eye(5).expand(3, 2, 5, 5).double()
    assert (of("map_kl")(one_hot, one_hot.flip(-1)) < 30).all()


def test_relations_do_not_see_rotations_and_permuted_positions_move_along() -> None:
    student, teacher = given("value_relation", 6, 1), given("value_relation", 8, 2)
    expected = of("value_relation")(student, teacher)
    turn = torch.linalg.qr(rows(6, 6, 9))[0]
    torch.testing.assert_close(of("value_relation")(student @ turn, teacher), expected)
    order = torch.tensor([4, 1, 3, 0, 2])
    found = find("value_relation")(student[:, order], teacher[:, order], MASK[:, order])
    torch.testing.assert_close(found, expected)


def test_relations_of_large_vectors_are_finite() -> None:
    student = -1e4 * given("value_relation", 6, 1).float()
    assert of("value_relation")(student, 2 * student).isfinite().all()


@pytest.mark.parametrize("name", ["map_kl", "map_mse"])
def test_maps_that_do_not_match_are_refused(name: str) -> None:
    good, mask = given(name, 2, 1), MASK
    for other in (good[:1], good[..., :1], good[..., :1, :], good[0], given(name, 2, 2)[:, 0]):
        for student, teacher in ((good, other), (other, good)):
            with pytest.raises(ValueError, match="do not match"):
                find(name)(student, teacher, mask)
    for wrong in (mask[:1], mask[:, :1], mask[0], mask[:, None, None]):
        with pytest.raises(ValueError, match="do not match"):
            find(name)(good, good, wrong)
    with pytest.raises(ValueError, match="head by head"):
        find(name, per_head=True)(given(name, 4, 1), good, mask)
    with pytest.raises(ValueError, match="head by head"):
        find(name, per_head=True)(given(name, 1, 1), good, mask)
    with pytest.raises(ValueError, match="boolean"):
        find(name)(good, good, mask.long())


def test_vectors_that_do_not_match_are_refused() -> None:
    good, loss = given("value_relation", 6, 1), find("value_relation")
    for other in (good[:1], good[:, :1], good[0]):
        with pytest.raises(ValueError, match="do not match"):
            loss(good, other, MASK)
        with pytest.raises(ValueError, match="do not match"):
            loss(other, good, MASK)
    with pytest.raises(ValueError, match="do not match"):
        loss(good, good, MASK[:, :1])
    with pytest.raises(ValueError, match="boolean"):
        loss(good, good, MASK.float())
    with pytest.raises(ValueError, match="multiples of 4"):
        find("value_relation", heads=4)(good, given("value_relation", 8, 2), MASK)
    with pytest.raises(ConfigError, match="at least one"):
        find("value_relation", heads=0)(good, good, MASK)


def test_losses_are_found_by_name_and_refuse_unknown_parameters() -> None:
    assert registry.names("kdcache.losses.attention") == NAMES
    with pytest.raises(ConfigError, match="no attention named 'map'"):
        find("map")
    with pytest.raises(ConfigError, match="no parameter 'mask'") as error:
        find("map_kl", mask=MASK)
    assert "per_head" in error.value.hint
