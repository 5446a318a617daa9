"""Relation losses against loops over samples, and what each of them does not see."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from kdcache import registry
from kdcache.errors import ConfigError
from kdcache.losses.relations import find
from tests.losses.dense import rows

NAMES = ["cka", "crd", "pkt", "rkd_angle", "rkd_distance", "similarity_preserving"]
ZERO_AT_AGREEMENT = [name for name in NAMES if name != "crd"]
Matrix = list[list[float]]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.hypot(*a) / math.hypot(*b)


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def huber(a: float, b: float) -> float:
    d = abs(a - b)
    return d * d / 2 if d < 1 else d - 0.5


def slow_rkd_distance(student: Matrix, teacher: Matrix) -> float:
    pairs = list(permutations(range(len(student)), 2))
    both = []
    for side in (student, teacher):
        distances = [math.dist(side[i], side[j]) for i, j in pairs]
        both.append([d / (sum(distances) / len(pairs)) for d in distances])
    return sum(map(huber, *both)) / len(pairs)


def slow_rkd_angle(student: Matrix, teacher: Matrix) -> float:
    triplets = list(permutations(range(len(student)), 3))
    both = [[cosine(minus(x[i], x[j]), minus(x[k], x[j])) for i, j, k in triplets] for x in (student, teacher)]
    return sum(map(huber, *both)) / len(triplets)


def slow_similarity_preserving(student: Matrix, teacher: Matrix) -> float:
    total = 0.0
    for i in range(len(student)):
        ours, theirs = [dot(student[i], row) for row in student], [dot(teacher[i], row) for row in teacher]
        total += sum((a / math.hypot(*ours) - b / math.hypot(*theirs)) ** 2 for a, b in zip(ours, theirs))
    return total / len(student) ** 2


def slow_pkt(student: Matrix, teacher: Matrix) -> float:
    total = 0.0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        p, q = ([(1 + cosine(side[i], side[j])) / 2 for j in others] for side in (teacher, student))
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q))
    return total / len(student)


def slow_cka(student: Matrix, teacher: Matrix) -> float:
    """By the feature covariances of the paper, not by the Gram matrices of the loss."""
    x, y = ([[v - sum(c) / len(c) for v in c] for c in zip(*side)] for side in (student, teacher))

    def squares(a: Matrix, b: Matrix) -> float:
        return sum(dot(u, v) ** 2 for u in a for v in b)

    return 1 - squares(y, x) / math.sqrt(squares(x, x) * squares(y, y))


def slow_crd(student: Matrix, teacher: Matrix, temperature: float = 0.07, negatives: Matrix | None = None) -> float:
    total = 0.0
    for i, row in enumerate(student):
        found = [math.exp(cosine(row, other) / temperature) for other in teacher + (negatives or [])]
        total -= math.log(found[i] / sum(found))
    return total / len(student)


ORACLES = {
    "cka": slow_cka,
    "crd": slow_crd,
    "pkt": slow_pkt,
    "rkd_angle": slow_rkd_angle,
    "rkd_distance": slow_rkd_distance,
    "similarity_preserving": slow_similarity_preserving,
}


def value_and_gradient(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss = find(name)(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def turn(width: int) -> Tensor:
    return torch.linalg.qr(rows(width, width, 9))[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [3, 6])
def test_the_value_is_that_of_the_formula(name: str, samples: int) -> None:
    student, teacher = rows(samples, 5, 1), rows(samples, 5 if name == "crd" else 8, 2)
    found = find(name)(student, teacher)
    assert found.shape == ()
    assert float(found) == pytest.approx(ORACLES[name](student.tolist(), teacher.tolist()), abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_the_numerical_check(name: str) -> None:
    loss, teacher = find(name), rows(4, 3, 2)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), rows(4, 3, 1).requires_grad_())


@pytest.mark.parametrize("name", ZERO_AT_AGREEMENT)
def test_agreement_costs_nothing(name: str) -> None:
    loss, gradient = value_and_gradient(name, rows(6, 5, 2), rows(6, 5, 2))
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert float(gradient.abs().max()) < 1e-9
    assert float(find(name)(rows(6, 5, 1), rows(6, 5, 2))) > 1e-3


UNSEEN = [
    *((name, what) for name in ("rkd_distance", "rkd_angle", "cka") for what in ("scale", "turn", "move")),
    *((name, what) for name in ("similarity_preserving", "pkt") for what in ("scale", "turn")),
    *(("pkt", "scale each"), ("crd", "scale each")),
]


@pytest.mark.parametrize(("name", "what"), UNSEEN)
def test_what_a_loss_does_not_see(name: str, what: str) -> None:
    student, teacher = rows(6, 5, 1), rows(6, 5, 2)
    changed = {
        "scale": 17 * student,
        "scale each": student * torch.arange(1, 7)[:, None],
        "turn": student @ turn(5),
        "move": student + rows(1, 5, 3),
    }[what]
    torch.testing.assert_close(find(name)(changed, teacher), find(name)(student, teacher))
    if name in ZERO_AT_AGREEMENT:
        assert float(find(name)(changed, student)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_samples_does_not_matter(name: str) -> None:
    student, teacher, order = rows(6, 5, 1), rows(6, 5, 2), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(find(name)(student[order], teacher[order]), find(name)(student, teacher))


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_has_no_relations(name: str) -> None:
    loss, gradient = value_and_gradient(name, rows(1, 5, 1), rows(1, 5, 2))
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert float(gradient.abs().max()) < 1e-12


def test_two_samples_have_no_angles() -> None:
    loss, gradient = value_and_gradient("rkd_angle", rows(2, 5, 1), rows(2, 5, 2))
    assert (float(loss), float(gradient.abs().max())) == (0, 0)


def repeated(samples: int, seed: int) -> Tensor:
    side = rows(samples, 5, seed).float()
    side[1], side[3] = side[0], side[2]
    return side


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (repeated(6, 1), rows(6, 5, 2).float()),
        (rows(6, 5, 1).float(), repeated(6, 2)),
        (repeated(6, 1), repeated(6, 2)),
        (rows(1, 5, 1).float().expand(6, 5), rows(6, 5, 2).float()),
        (rows(6, 5, 1).float(), rows(1, 5, 2).float().expand(6, 5)),
        (rows(1, 5, 1).float().expand(6, 5), rows(1, 5, 2).float().expand(6, 5)),
        (torch.zeros(6, 5), rows(6, 5, 2).float()),
        (rows(6, 5, 1).float(), torch.zeros(6, 5)),
        (torch.zeros(6, 5), torch.zeros(6, 5)),
        (torch.zeros(1, 5), torch.zeros(1, 5)),
        (torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).repeat(3, 1), rows(6, 2, 2).float()),
    ],
)
def test_equal_opposite_and_empty_rows_give_finite_values_and_gradients(
    name: str, student: Tensor, teacher: Tensor
) -> None:
    loss, gradient = value_and_gradient(name, student, teacher)
    assert loss.isfinite()
    assert float(loss) >= 0
    assert gradient.isfinite().all()
    assert float(gradient.abs().max()) < 1e3


def test_equal_samples_have_distance_and_cosine_zero() -> None:
    student, teacher = rows(4, 5, 1), rows(4, 5, 2)
    student[1] = student[0]
    expected = slow_rkd_distance(student.tolist(), teacher.tolist())
    assert float(find("rkd_distance")(student, teacher)) == pytest.approx(expected, abs=1e-12)
    total = 0.0
    for i, j, k in permutations(range(4), 3):
        both = []
        for side in (student.tolist(), teacher.tolist()):
            a, b = minus(side[i], side[j]), minus(side[k], side[j])
            both.append(cosine(a, b) if any(a) and any(b) else 0.0)
        total += huber(*both)
    assert float(find("rkd_angle")(student, teacher)) == pytest.approx(total / 24, abs=1e-12)


def test_cka_of_a_side_without_variety() -> None:
    same, other = rows(1, 5, 1).float().expand(6, 5), rows(6, 5, 2).float()
    assert float(find("cka")(same, other)) == pytest.approx(1)
    assert float(find("cka")(other, same)) == pytest.approx(1)
    assert float(find("cka")(same, 3 * same)) == 0


def test_pkt_of_opposite_samples_is_bounded() -> None:
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert 1 < float(find("pkt")(student, student[[0, 2, 1]])) < 20


def test_crd_counts_negatives_of_the_store_and_of_the_batch() -> None:
    student, teacher, negatives = rows(4, 5, 1), rows(4, 5, 2), rows(7, 5, 3)
    found = find("crd", temperature=0.3)(student, teacher, negatives=negatives)
    expected = slow_crd(student.tolist(), teacher.tolist(), 0.3, negatives.tolist())
    assert float(found) == pytest.approx(expected, abs=1e-10)
    alone = find("crd", temperature=0.3, negatives=negatives)(student[:1], teacher[:1])
    assert float(alone) == pytest.approx(
        slow_crd(student[:1].tolist(), teacher[:1].tolist(), 0.3, negatives.tolist()), abs=1e-10
    )
    assert torch.autograd.gradcheck(
        lambda s: find("crd", temperature=0.3)(s, teacher, negatives=negatives), student.clone().requires_grad_()
    )


def test_crd_bounds_the_information_from_below() -> None:
    teacher = rows(64, 16, 1)
    assert float(find("crd")(teacher, teacher)) < 0.1
    assert float(find("crd", temperature=1e6)(rows(64, 16, 2), teacher)) == pytest.approx(math.log(64), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_even_under_autocast(name: str, dtype: torch.dtype) -> None:
    student, teacher = (50 * rows(6, 64, 1)).to(dtype), (50 * rows(6, 64, 2)).to(dtype)
    expected = find(name)(student.double(), teacher.double()).float()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, gradient = value_and_gradient(name, student, teacher)
        assert loss.dtype == torch.float32
        assert gradient.isfinite().all()
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (6, 1, 5), (5,)])
def test_sides_of_other_samples_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not match"):
        find(name)(rows(6, 5, 1), torch.zeros(shape))
    with pytest.raises(ValueError, match="do not match"):
        find(name)(torch.zeros(0, 5), torch.zeros(0, 5))


def test_crd_refuses_other_widths_and_temperatures() -> None:
    with pytest.raises(ValueError, match="do not match"):
        find("crd")(rows(6, 5, 1), rows(6, 1, 2))
    for negatives in (rows(3, 1, 3), torch.zeros(5)):
        with pytest.raises(ValueError, match="do not match"):
            find("crd")(rows(6, 5, 1), rows(6, 5, 2), negatives=negatives)
    with pytest.raises(ConfigError, match="positive"):
        find("crd", temperature=0.0)(rows(6, 5, 1), rows(6, 5, 2))


def test_losses_are_found_by_name_and_refuse_unknown_parameters() -> None:
    assert registry.names("kdcache.losses.relations") == NAMES
    with pytest.raises(ConfigError, match="no relation named 'rkd'"):
        find("rkd")
    with pytest.raises(ConfigError, match="no parameter 'tau'") as error:
        find("crd", tau=0.1)
    assert "temperature, negatives" in error.value.hint
