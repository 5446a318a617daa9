"""What every response loss promises, against answers computed the slow way over the whole vocabulary."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kdcache import registry
from kdcache.errors import ConfigError, MismatchError
from kdcache.losses import RESPONSES, Heads, Response, response
from kdcache.losses.output_layer import output_layer
from kdcache.targets.measure import measure
from kdcache.targets.tensor import OutputHead, TensorTargets
from tests.losses.dense import TEMPERATURES, compact, kl, rows, student_side

V, K = 20, 6
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dist", {}),
    ("dist", {"beta": 0.5, "gamma": 2.0}),
    ("dist", {"beta": 2.0, "gamma": 0.0}),
    ("dkd", {}),
    ("dkd", {"alpha": 2.0, "beta": 0.5}),
    ("logit_mse", {}),
    ("logit_mse", {"center": False}),
    ("ranking", {}),
    ("ranking", {"top": 3}),
    ("regression", {}),
    ("regression", {"kind": "huber"}),
    ("regression", {"kind": "l1"}),
    ("sigmoid", {}),
    ("standardised_kl", {}),
]
TRAITS = {  # tempered, whole, labels
    "dist": (True, True, False),
    "dkd": (True, False, True),
    "logit_mse": (False, False, False),
    "ranking": (False, False, False),
    "regression": (False, True, False),
    "sigmoid": (True, True, False),
    "standardised_kl": (True, False, False),
}
every = pytest.mark.parametrize(("name", "parameters"), CASES)
partial_heads = pytest.mark.parametrize(("name", "parameters"), [case for case in CASES if not TRAITS[case[0]][1]])
at_every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def heads_of(teacher: Tensor, student: Tensor, labels: Tensor, k: int, temperature: float) -> Heads:
    """What training hands to a response loss, from dense rows."""
    targets = compact(teacher, k)
    told = teacher.gather(1, labels[:, None])[:, 0]
    targets = TensorTargets(targets.ids, targets.logits, targets.tail, told, targets.vocab_size)
    logits, rest = student_side(student, targets, temperature)
    return Heads(targets, logits, rest, labels, student.gather(1, labels[:, None])[:, 0], temperature)


def some(n: int = 9, v: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher, student and labels, of which some are the teacher's first and some its last choice."""
    teacher, student = rows(n, v, 1), rows(n, v, 2)
    order = teacher.argsort(1, descending=True)
    return teacher, student, order[torch.arange(n), torch.arange(n) * (v - 1) // max(n - 1, 1)]


def slow(name: str, z: Tensor, s: Tensor, labels: Tensor, t: float, **parameters: Any) -> Tensor:
    """A response loss of whole rows [N, V], one position at a time where the formula is one of positions."""
    if name == "dist":
        return slow_dist(torch.softmax(z / t, 1), torch.softmax(s / t, 1), **parameters)
    one = {
        "dkd": slow_dkd,
        "logit_mse": slow_logit_mse,
        "ranking": slow_ranking,
        "regression": slow_regression,
        "sigmoid": slow_sigmoid,
        "standardised_kl": slow_standardised_kl,
    }[name]
    return torch.stack([one(*row, t, **parameters) for row in zip(z, s, labels, strict=True)])


def pearson(x: Tensor, y: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([x, y]))[0, 1]


def slow_dist(p: Tensor, q: Tensor, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    inter = torch.stack([1 - pearson(p[n], q[n]) for n in range(len(p))])
    intra = torch.stack([1 - pearson(p[:, v], q[:, v]) for v in range(p.shape[1])])
    return beta * inter + gamma * intra.mean()


def slow_dkd(z: Tensor, s: Tensor, y: Tensor, t: float, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    p, q = torch.softmax(z / t, 0), torch.softmax(s / t, 0)
    others = torch.arange(len(z)) != y
    target = p[y] * (p[y] / q[y]).log() + p[others].sum() * (p[others].sum() / q[others].sum()).log()
    return alpha * target + beta * kl(torch.log_softmax(z[others] / t, 0), torch.log_softmax(s[others] / t, 0))


def slow_logit_mse(z: Tensor, s: Tensor, y: Tensor, t: float, center: bool = True) -> Tensor:
    if center:
        z, s = z - z.mean(), s - s.mean()
    return sum((a - b) ** 2 for a, b in zip(z, s, strict=True)) / len(z)  # type: ignore[return-value]


def slow_ranking(z: Tensor, s: Tensor, y: Tensor, t: float, top: int | None = None) -> Tensor:
    left, total = list(range(len(z))), torch.zeros((), dtype=z.dtype)
    for _ in range(len(z) if top is None else min(top, len(z))):
        best = max(left, key=lambda i: float(z[i]))
        total = total - torch.log_softmax(s[left], 0)[left.index(best)]
        left.remove(best)
    return total


def slow_regression(z: Tensor, s: Tensor, y: Tensor, t: float, kind: str = "mse") -> Tensor:
    gap = (z - s).abs()
    return {"mse": gap**2, "l1": gap, "huber": torch.where(gap < 1, gap**2 / 2, gap - 0.5)}[kind].mean()


def slow_sigmoid(z: Tensor, s: Tensor, y: Tensor, t: float) -> Tensor:
    p, q = torch.sigmoid(z / t), torch.sigmoid(s / t)
    return (functional.binary_cross_entropy(q, p, reduction="none") + p * p.log() + (1 - p) * (1 - p).log()).sum()


def slow_standardised_kl(z: Tensor, s: Tensor, y: Tensor, t: float) -> Tensor:
    z, s = ((x - x.mean()) / x.std(correction=0) for x in (z, s))
    return kl(torch.log_softmax(z / t, 0), torch.log_softmax(s / t, 0))


@every
@at_every_temperature
def test_with_the_whole_vocabulary_kept_it_is_the_slow_answer_with_its_gradient(
    name: str, parameters: dict[str, Any], temperature: float
) -> None:
    teacher, student, labels = some()
    student.requires_grad_()
    found = response(name, **parameters).loss(heads_of(teacher, student, labels, V, temperature))
    expected = slow(name, teacher, student, labels, temperature, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    factors = torch.arange(9.0).cos()
    (mine,) = torch.autograd.grad((found * factors).sum(), student)
    (theirs,) = torch.autograd.grad((expected * factors).sum(), student)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["logit_mse", "ranking", "standardised_kl"])
@at_every_temperature
def test_over_a_head_it_is_the_slow_answer_of_the_kept_ids_alone(name: str, temperature: float) -> None:
    teacher, student, labels = some()
    heads = heads_of(teacher, student, labels, K, temperature)
    expected = slow(name, heads.targets.logits, heads.logits, labels, temperature)
    torch.testing.assert_close(response(name).loss(heads), expected, rtol=1e-9, atol=1e-11)


def merged(z: Tensor, s: Tensor, y: Tensor, k: int, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at T = 1 of both sides after the tail, less the label, became one outcome; and where the label is."""
    kept = z.argsort(descending=True)[:k].tolist()
    tail = [i for i in range(len(z)) if i not in kept and i != int(y)]
    single = [*kept, int(y)] if int(y) not in kept else kept
    sides = []
    for logits in (z, s):
        p = torch.softmax(logits / t, 0)
        sides.append(torch.stack([*(p[i] for i in single), p[tail].sum()]).log())
    return sides[0], sides[1], torch.tensor(single.index(int(y)))


@at_every_temperature
@pytest.mark.parametrize("k", [1, K, V - 2])
def test_dkd_over_a_head_is_that_of_the_merged_tail_with_the_label_in_head_or_tail(k: int, temperature: float) -> None:
    teacher, student, labels = some()
    heads = heads_of(teacher, student.requires_grad_(), labels, k, temperature)
    inside = (heads.targets.ids == labels[:, None]).any(1)
    assert inside.any()
    assert not inside.all()
    found = response("dkd").loss(heads)
    sides = [merged(*row, k, temperature) for row in zip(teacher, student, labels, strict=True)]
    expected = torch.stack([slow_dkd(*side, 1.0) for side in sides])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    (mine,) = torch.autograd.grad(found.sum(), student)
    (theirs,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_dkd_over_a_head_never_exceeds_the_one_over_the_whole_vocabulary(seed: int) -> None:
    teacher, student = rows(30, 12, seed), rows(30, 12, seed + 100)
    labels = torch.randint(12, (30,), generator=torch.Generator().manual_seed(seed))
    whole = slow("dkd", teacher, student, labels, 2.0)
    for k in (1, 3, 8):
        found = response("dkd").loss(heads_of(teacher, student, labels, k, 2.0))
        assert (found <= whole + 1e-9).all()
        assert (found >= -1e-12).all()


def test_dkd_reads_a_label_in_the_head_from_the_head() -> None:
    teacher, student, _ = some()
    heads = heads_of(teacher, student, teacher.argmax(1), K, 2.0)
    untold = TensorTargets(
        heads.targets.ids,
        heads.targets.logits,
        heads.targets.tail,
        torch.full_like(heads.targets.label_logit, torch.nan),
        V,
    )
    dark = Heads(untold, heads.logits, heads.rest, heads.labels, heads.label_logit, 2.0)
    torch.testing.assert_close(response("dkd").loss(dark), response("dkd").loss(heads))


def test_dkd_with_a_label_that_is_the_whole_tail_is_finite_and_has_a_gradient() -> None:
    teacher, student = rows(4, V, 1), rows(4, V, 2).requires_grad_()
    found = response("dkd").loss(heads_of(teacher, student, teacher.argmin(1), V - 1, 2.0))
    torch.testing.assert_close(found, slow("dkd", teacher, student, teacher.argmin(1), 2.0), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert torch.isfinite(grad).all()


@partial_heads
@pytest.mark.parametrize("k", [1, K, V])
def test_gradients_pass_the_numerical_check(name: str, parameters: dict[str, Any], k: int) -> None:
    teacher, student, labels = some(4)
    loss = response(name, **parameters).loss
    assert torch.autograd.gradcheck(lambda s: loss(heads_of(teacher, s, labels, k, 2.0)), student.requires_grad_())


@every
def test_gradients_through_the_fused_layer_pass_the_numerical_check(name: str, parameters: dict[str, Any]) -> None:
    v = 7
    teacher = rows(3, v, 1)
    labels = torch.tensor([0, 3, 6])
    hidden, weight, bias = (rows(*shape).requires_grad_() for shape in ((3, 3, 5), (v, 3, 6), (1, v, 7)))
    targets = heads_of(teacher, teacher, labels, v, 2.0).targets
    loss = response(name, **parameters).loss

    def fused(h: Tensor, w: Tensor, o: Tensor) -> Tensor:
        logits, extra, rest = output_layer(h, OutputHead(w, o[0]), targets.ids, labels[:, None], (0.5,), chunk=2)
        return loss(Heads(targets, logits, rest[:, 0], labels, extra[:, 0], 2.0))

    assert torch.autograd.gradcheck(fused, (hidden, weight, bias))


@every
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_it_is_zero_with_no_gradient_at_agreement_and_else_not_negative(
    name: str, parameters: dict[str, Any], scale: float
) -> None:
    teacher, _, labels = some()
    teacher = teacher * scale
    student = teacher.clone().requires_grad_()
    loss = response(name, **parameters).loss
    k = V if TRAITS[name][1] else K
    agreed = loss(heads_of(teacher, student, labels, k, 2.0))
    (grad,) = torch.autograd.grad(agreed.sum(), student)
    if name == "ranking":
        assert (agreed > 0).all()
    else:
        assert agreed.abs().max() < 1e-12
        assert grad.abs().max() < 1e-7
    assert (loss(heads_of(teacher, rows(9, V, 8, 3.0), labels, k, 2.0)) > -1e-12).all()


@every
def test_a_shift_of_a_row_is_free_where_logits_have_no_origin(name: str, parameters: dict[str, Any]) -> None:
    teacher, student, labels = some()
    k = V if TRAITS[name][1] else K
    loss = response(name, **parameters).loss
    shifted = student + rows(9, 1, 5)
    moved = (loss(heads_of(teacher, shifted, labels, k, 2.0)) - loss(heads_of(teacher, student, labels, k, 2.0))).abs()
    if name in ("sigmoid", "regression") or parameters == {"center": False}:
        assert moved.max() > 1e-2
    else:
        assert moved.max() < 1e-9


def test_standardised_kl_ignores_the_size_of_the_students_logits_and_dist_does_not_ask_for_equality() -> None:
    teacher, student, labels = some()
    loss = response("standardised_kl").loss
    for k in (K, V):
        plain = loss(heads_of(teacher, student, labels, k, 2.0))
        torch.testing.assert_close(loss(heads_of(teacher, 3 * student - 1, labels, k, 2.0)), plain)
    p = torch.softmax(teacher, 1)
    faded = (0.5 * p + 0.5 / V).log()
    assert response("dist", gamma=0.0).loss(heads_of(teacher, faded, labels, V, 1.0)).abs().max() < 1e-12


def test_the_temperature_counts_only_where_the_loss_is_tempered() -> None:
    teacher, student, labels = some()
    for name in RESPONSES:
        at_one, at_two = (response(name).loss(heads_of(teacher, student, labels, V, t)) for t in (1.0, 2.0))
        assert torch.equal(at_one, at_two) != response(name).tempered


def test_ranking_is_the_probability_of_an_order_and_over_a_head_a_bound() -> None:
    student = rows(1, 4, 2)
    total = 0.0
    for order in itertools.permutations(range(4)):
        teacher = torch.zeros(1, 4, dtype=torch.float64)
        teacher[0, list(order)] = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
        total += math.exp(-response("ranking").loss(heads_of(teacher, student, torch.tensor([0]), 4, 1.0)).item())
    assert total == pytest.approx(1.0)
    teacher, student, labels = some()
    for top in (None, 3):
        whole = response("ranking", top=top).loss(heads_of(teacher, student, labels, V, 1.0))
        head = response("ranking", top=top).loss(heads_of(teacher, student, labels, K, 1.0))
        assert (head <= whole).all()
    beyond = response("ranking", top=99).loss(heads_of(teacher, student, labels, K, 1.0))
    torch.testing.assert_close(beyond, response("ranking").loss(heads_of(teacher, student, labels, K, 1.0)))


def test_dist_of_positions_or_classes_that_do_not_vary() -> None:
    teacher, student, labels = some(4)
    alone = response("dist").loss(heads_of(teacher[:1], student[:1], labels[:1], V, 1.0))
    torch.testing.assert_close(alone, response("dist", gamma=0.0).loss(heads_of(teacher, student, labels, V, 1.0))[:1])
    assert response("dist").loss(heads_of(teacher[:0], student[:0], labels[:0], V, 1.0)).shape == (0,)
    flat = torch.full((4, V), 0.3).requires_grad_()
    value = response("dist").loss(heads_of(teacher.float(), flat, labels, V, 1.0))
    (grad,) = torch.autograd.grad(value.sum(), flat)
    torch.testing.assert_close(value, torch.ones(4), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() < 10


def test_dist_counts_classes_of_tiny_probability_as_much_as_any() -> None:
    teacher, student, labels = some()
    teacher[:, 0] -= 60.0
    student[:, 0] -= 60.0
    exact = response("dist", beta=0.0).loss(heads_of(teacher, student, labels, V, 1.0))
    found = response("dist", beta=0.0).loss(heads_of(teacher.float(), student.float(), labels, V, 1.0))
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(name: str, parameters: dict[str, Any], dtype: torch.dtype) -> None:
    teacher, student, labels = some()
    heads = heads_of(teacher, student, labels, V if TRAITS[name][1] else K, 2.0)
    targets = heads.targets.each(lambda values: values.to(dtype) if values.is_floating_point() else values.int())
    low = heads.logits.to(dtype).requires_grad_()
    narrow = Heads(targets, low, heads.rest.to(dtype), labels, heads.label_logit.to(dtype), 2.0)
    found = response(name, **parameters).loss(narrow)
    (grad,) = torch.autograd.grad(found.sum(), low)
    assert found.dtype == torch.float32
    assert grad.dtype == dtype
    assert torch.isfinite(grad).all()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), response(name, **parameters).loss(heads), rtol=tolerance, atol=tolerance)


@every
def test_extreme_and_masked_teachers_give_finite_losses_and_gradients(name: str, parameters: dict[str, Any]) -> None:
    teacher = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    teacher[0, 1:] = -1e4
    teacher[1] = 1e4
    teacher[2, 5:] = -1e4 if TRAITS[name][1] else -torch.inf
    teacher[3, 6] = 1e4
    teacher[4] *= 1e4
    teacher[5] = 0.0
    labels = torch.tensor([0, 3, 11, 6, 1, 4])
    student = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    student[3:5] *= 1e4
    student[5] = 0.0
    student.requires_grad_()
    targets = measure(teacher, labels, k=12 if TRAITS[name][1] else 4)
    label_logit = student.gather(1, labels[:, None])[:, 0]
    heads = Heads(targets, *student_side(student, targets, 2.0), labels, label_logit, 2.0)
    value = response(name, **parameters).loss(heads)
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", [name for name, (_, whole, _) in TRAITS.items() if whole])
def test_a_loss_of_whole_rows_refuses_a_head(name: str) -> None:
    with pytest.raises(MismatchError, match="keep 6 of 20 outputs"):
        response(name).loss(heads_of(*some(), K, 1.0))


def test_every_response_loss_is_listed_and_says_what_it_needs() -> None:
    assert list(RESPONSES) == registry.names("kdcache.losses.responses")
    assert {name for name, _ in CASES} == set(RESPONSES)
    for name, traits in TRAITS.items():
        found = response(name)
        assert isinstance(found, Response)
        assert (found.tempered, found.whole, found.labels) == traits


@pytest.mark.parametrize("name", ["dk", "forward_kl", ""])
def test_an_unknown_response_loss_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no response named {name!r}") as caught:
        response(name)
    assert caught.value.hint in ("Did you mean 'dkd'?", f"Choose one of: {', '.join(RESPONSES)}.")


@pytest.mark.parametrize("name", RESPONSES)
def test_a_parameter_that_the_loss_lacks_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"response {name} has no parameter 'heads', 'skew'"):
        response(name, skew=0.5, heads=1)


def test_values_that_make_no_sense_are_refused() -> None:
    heads = heads_of(*some(), V, 1.0)
    with pytest.raises(ConfigError, match="top of ranking is 1 at least, not 0"):
        response("ranking", top=0).loss(heads)
    with pytest.raises(ConfigError, match="no distance of outputs named 'l2'") as caught:
        response("regression", kind="l2").loss(heads)
    assert caught.value.hint == "Choose one of: huber, l1, mse."
