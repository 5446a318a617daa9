"""Feature losses and the projector."""

import pytest
import torch
from torch import Tensor

from kdcache.losses.hidden_cosine import hidden_cosine
from kdcache.losses.hidden_mse import hidden_mse
from kdcache.losses.projector import Projector
from tests.losses.dense import rows


def test_mse_is_the_mean_over_the_width() -> None:
    student, teacher = rows(5, 7, 1), rows(5, 7, 2)
    torch.testing.assert_close(hidden_mse(student, teacher), ((student - teacher) ** 2).sum(1) / 7)
    assert hidden_mse(teacher, teacher).eq(0).all()


def test_cosine_ignores_length_and_spans_zero_to_two() -> None:
    teacher = rows(5, 7, 2)
    one = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(hidden_cosine(3 * teacher, teacher), 0 * one, atol=1e-12, rtol=0)
    torch.testing.assert_close(hidden_cosine(-teacher, teacher), 2 * one)
    torch.testing.assert_close(hidden_cosine(0 * teacher, teacher), one)


@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine])
def test_gradients_pass_the_numerical_check(loss) -> None:  # type: ignore[no-untyped-def]
    assert torch.autograd.gradcheck(lambda s: loss(s, rows(3, 4, 2)), rows(3, 4, 1).requires_grad_())


@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine])
def test_half_precision_is_computed_in_float32(loss) -> None:  # type: ignore[no-untyped-def]
    student, teacher = rows(5, 64, 1).bfloat16(), rows(5, 64, 2).bfloat16()
    found = loss(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(student.double(), teacher.double()).float())


@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine])
def test_shapes_that_would_broadcast_are_refused(loss) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="do not match"):
        loss(rows(5, 7, 1), rows(1, 7, 2))


def kept(projector: Projector, hidden: Tensor) -> Tensor:
    return projector(hidden).norm(dim=1) / hidden.norm(dim=1)


def test_the_projector_starts_as_the_identity_where_the_widths_agree() -> None:
    hidden = rows(5, 6, 1).float()
    torch.testing.assert_close(Projector(6, 6)(hidden), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projector_starts_by_keeping_lengths_and_angles(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    projector = Projector(6, 10, dtype=dtype)
    hidden = rows(5, 6, 1).to(dtype)
    torch.testing.assert_close(kept(projector, hidden), torch.ones(5, dtype=dtype))
    narrowing = Projector(10, 6)
    torch.testing.assert_close(narrowing.weight @ narrowing.weight.T, torch.eye(6), atol=1e-5, rtol=0)


def test_the_projector_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    hidden = rows(200, 4, 1).float()
    teacher = hidden @ rows(4, 6, 2).float() + 1.0
    projector = Projector(4, 6)
    optimiser = torch.optim.Adam(projector.parameters(), lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        hidden_mse(projector(hidden), teacher).mean().backward()
        optimiser.step()
    assert hidden_mse(projector(hidden), teacher).mean() < 1e-3
