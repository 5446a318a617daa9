"""Feature losses against loops over single numbers, and the stored moments."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kdcache import registry
from kdcache.errors import ConfigError
from kdcache.losses.features import EPSILON, Moments, find
from tests.losses.dense import rows

NAMES = ["attention_transfer", "cosine", "mse", "smooth_l1"]


def pictures(samples: int, channels: int, seed: int) -> Tensor:
    return rows(samples, channels * 6, seed).reshape(samples, channels, 2, 3)


def slow(name: str, student: list[float], teacher: list[float], beta: float = 1.0) -> float:
    """One row's loss, number by number."""
    if name == "mse":
        return sum((s - t) ** 2 for s, t in zip(student, teacher)) / len(student)
    if name == "smooth_l1":
        terms = [abs(s - t) for s, t in zip(student, teacher)]
        return sum(d * d / (2 * beta) if d < beta else d - beta / 2 for d in terms) / len(terms)
    if name == "cosine":
        return 1 - sum(s * t for s, t in zip(student, teacher)) / math.hypot(*student) / math.hypot(*teacher)
    q, p = [s * s for s in student], [t * t for t in teacher]
    return sum((a / math.hypot(*q) - b / math.hypot(*p)) ** 2 for a, b in zip(q, p))


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_the_value_of_the_formula(name: str) -> None:
    student, teacher = rows(5, 7, 1), rows(5, 7, 2)
    expected = [slow(name, s, t) for s, t in zip(student.tolist(), teacher.tolist())]
    torch.testing.assert_close(find(name)(student, teacher).tolist(), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("beta", [0.25, 3.0])
def test_beta_is_where_the_square_ends(beta: float) -> None:
    student, teacher = rows(5, 7, 1), rows(5, 7, 2)
    expected = [slow("smooth_l1", s, t, beta) for s, t in zip(student.tolist(), teacher.tolist())]
    torch.testing.assert_close(find("smooth_l1", beta=beta)(student, teacher).tolist(), expected)
    absolute = find("smooth_l1", beta=0.0)(student, teacher)
    torch.testing.assert_close(absolute, (student - teacher).abs().mean(1))
    with pytest.raises(ConfigError, match="negative"):
        find("smooth_l1", beta=-1.0)(student, teacher)


@pytest.mark.parametrize("name", NAMES)
def test_agreement_costs_nothing(name: str) -> None:
    teacher = rows(5, 7, 2)
    torch.testing.assert_close(find(name)(teacher, teacher), torch.zeros(5).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_the_numerical_check(name: str) -> None:
    loss = find(name)
    assert torch.autograd.gradcheck(lambda s: loss(s, rows(3, 4, 2)), rows(3, 4, 1).requires_grad_())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = (50 * rows(5, 64, 1)).to(dtype), (50 * rows(5, 64, 2)).to(dtype)
    found = find(name)(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, find(name)(student.double(), teacher.double()).float(), atol=1e-6, rtol=1e-5)
    # the student's dtype counts, as the teacher's is only that of the store
    assert find(name)(student.float(), teacher).dtype == torch.float32
    assert find(name)(student, teacher.double()).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_have_finite_gradients(name: str) -> None:
    student = torch.zeros(3, 4, requires_grad=True)
    loss = find(name)(student, rows(3, 4, 2).float())
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 1), (5, 6)])
def test_shapes_that_would_broadcast_are_refused(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not match"):
        find(name)(rows(5, 7, 1), rows(*shape, 2))


def test_cosine_ignores_length_and_spans_zero_to_two() -> None:
    teacher, loss, one = rows(5, 7, 2), find("cosine"), torch.ones(5).double()
    torch.testing.assert_close(loss(3 * teacher, teacher), 0 * one, atol=1e-12, rtol=0)
    torch.testing.assert_close(loss(-teacher, teacher), 2 * one)
    torch.testing.assert_close(loss(0 * teacher, teacher), one)
    torch.testing.assert_close(loss(rows(5, 7, 1), teacher), 1 - cosine_similarity(rows(5, 7, 1), teacher))


def test_attention_transfer_sums_the_channels_place_by_place() -> None:
    student, teacher = pictures(4, 5, 1), pictures(4, 3, 2)
    places = [(y, x) for y in range(2) for x in range(3)]
    found = find("attention_transfer")(student, teacher)
    for sample in range(4):
        both = []
        for side in (student, teacher):
            energy = [sum(float(side[sample, c, y, x]) ** 2 for c in range(side.shape[1])) for y, x in places]
            both.append([value / math.hypot(*energy) for value in energy])
        expected = sum((a - b) ** 2 for a, b in zip(*both))
        assert float(found[sample]) == pytest.approx(expected, abs=1e-12)


def test_attention_transfer_ignores_scale_sign_and_the_order_of_channels() -> None:
    student, teacher, loss = pictures(4, 5, 1), pictures(4, 3, 2), find("attention_transfer")
    torch.testing.assert_close(loss(-7 * student.flip(1), 0.1 * teacher), loss(student, teacher))
    assert loss(student, student.repeat(1, 2, 1, 1)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.clone().requires_grad_())
    assert loss(student.half(), teacher.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (pictures(4, 3, 1), pictures(1, 3, 2)),
        (pictures(4, 3, 1), pictures(4, 3, 2).mT),
        (pictures(4, 3, 1), rows(4, 6, 2)),
        (pictures(4, 3, 1)[0], pictures(4, 3, 2)[0]),
    ],
)
def test_attention_transfer_refuses_what_has_no_common_places(student: Tensor, teacher: Tensor) -> None:
    with pytest.raises(ValueError, match="do not match"):
        find("attention_transfer")(student, teacher)


def test_moments_normalise_channel_by_channel() -> None:
    values = 3 * rows(2000, 4, 1) + torch.tensor([0.0, 1.0, 50.0, -2.0])
    moments = Moments(values.mean(0), values.var(0, correction=0))
    found = moments.normalise(values.reshape(20, 100, 4))
    for channel in range(4):
        expected = (values[7, channel] - moments.mean[channel]) / math.sqrt(moments.variance[channel] + EPSILON)
        assert float(found[0, 7, channel]) == pytest.approx(float(expected), abs=1e-12)
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.square().mean((0, 1)), torch.ones(4).double(), atol=1e-5, rtol=0)


def test_moments_keep_to_float32_and_survive_a_constant_channel() -> None:
    moments = Moments(torch.tensor([1.0, 2.0]).half(), torch.tensor([0.0, 4.0]).half())
    found = moments.normalise(torch.tensor([[1.0, 4.0]]).bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0]]), atol=1e-5, rtol=0)


def test_moments_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="one width"):
        Moments(torch.zeros(3), torch.ones(4))
    with pytest.raises(ValueError, match="one width"):
        Moments(torch.zeros(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="do not match"):
        Moments(torch.zeros(1), torch.ones(1)).normalise(torch.zeros(2, 3))


def test_losses_are_found_by_name_and_refuse_unknown_parameters() -> None:
    assert registry.names("kdcache.losses.features") == NAMES
    with pytest.raises(ConfigError, match="no feature named 'mes'"):
        find("mes")
    with pytest.raises(ConfigError, match="no parameter 'bate'") as error:
        find("smooth_l1", bate=2.0)
    assert "beta" in error.value.hint
    with pytest.raises(ConfigError, match="no parameter 'teacher'") as error:
        find("mse", teacher=rows(2, 3, 1))
    assert "none" in error.value.hint
