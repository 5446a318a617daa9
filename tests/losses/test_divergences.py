"""What every divergence promises, on pairs over the whole vocabulary."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache import registry
from kdcache.errors import ConfigError
from kdcache.losses import DIVERGENCES as NAMES
from kdcache.losses import FLOOR, Pair, divergence
from tests.losses.dense import DIVERGENCES, F_DIVERGENCES, dense, rows

every = pytest.mark.parametrize(("name", "parameters"), DIVERGENCES)
every_f = pytest.mark.parametrize(("name", "parameters"), F_DIVERGENCES)


def a_pair(teacher: torch.Tensor, student: torch.Tensor) -> Pair:
    return Pair(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1))


@every
def test_it_is_the_textbook_sum(name: str, parameters: dict[str, Any]) -> None:
    teacher, student = rows(20, 50, 1), rows(20, 50, 2)
    found = divergence(name, **parameters)(a_pair(teacher, student))
    torch.testing.assert_close(found, dense(name, teacher, student, 1.0, **parameters), rtol=1e-12, atol=1e-12)


@every
@given(seed=st.integers(0, 1000), scale=st.floats(0.0, 30.0), step=st.floats(1e-6, 10.0))
def test_it_is_zero_at_agreement_and_never_negative(
    name: str, parameters: dict[str, Any], seed: int, scale: float, step: float
) -> None:
    teacher = rows(4, 12, seed, scale)
    loss = divergence(name, **parameters)
    assert loss(a_pair(teacher, teacher)).abs().max() < 1e-14
    assert (loss(a_pair(teacher, teacher + step * rows(4, 12, seed + 1, 1.0))) > -1e-14).all()


@every_f
def test_gradients_pass_the_numerical_check(name: str, parameters: dict[str, Any]) -> None:
    teacher, student = rows(3, 7, 1), rows(3, 7, 2).requires_grad_()
    weight = rows(3, 7, 3).abs()
    loss = divergence(name, **parameters)
    log_p = torch.log_softmax(teacher, -1)
    assert torch.autograd.gradcheck(lambda s: loss(Pair(log_p, torch.log_softmax(s, -1))), student)
    assert torch.autograd.gradcheck(lambda s: loss(Pair(log_p, torch.log_softmax(s, -1), weight)), student)


@every
def test_the_gradient_vanishes_at_agreement_whatever_the_weights(name: str, parameters: dict[str, Any]) -> None:
    student = rows(3, 7, 1).requires_grad_()
    log_q = torch.log_softmax(student, -1)
    loss = divergence(name, **parameters)(Pair(log_q.detach(), log_q, rows(3, 7, 3).exp()))
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.abs().max() < 1e-14
    assert grad.abs().max() < 1e-14


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_outcomes_give_finite_values_and_gradients(
    name: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    inf = torch.inf
    log_p = torch.tensor([[-inf, 0.0, -inf], [0.0, -inf, -inf], [-1.0, -0.5, -inf]], dtype=dtype)
    log_q = torch.tensor([[0.0, -inf, -inf], [0.0, -inf, -inf], [-0.5, -1.0, -inf]], dtype=dtype, requires_grad=True)
    value = divergence(name, **parameters)(Pair(log_p, log_q))
    (grad,) = torch.autograd.grad(value.sum(), log_q)
    assert torch.isfinite(value).all()
    assert torch.isfinite(grad).all()
    assert value[0] > 0.3
    assert value[1].abs() < 1e-6


@every
@pytest.mark.parametrize("size", [1e4, -1e4, torch.finfo(torch.float32).min])
def test_extreme_logits_give_finite_values_and_gradients(name: str, parameters: dict[str, Any], size: float) -> None:
    teacher = torch.tensor([[size, 0.0, 1.0], [0.0, size, 1.0]])
    student = torch.tensor([[1.0, 0.0, max(size, -1e4)], [0.0, 1.0, -1e4]], requires_grad=True)
    value = divergence(name, **parameters)(a_pair(teacher, student))
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(value).all()
    assert torch.isfinite(grad).all()


def test_a_confident_student_still_gets_a_gradient_far_below_the_floor() -> None:
    student = torch.tensor([[0.0, 3 * FLOOR]], requires_grad=True)
    value = divergence("forward_kl")(a_pair(torch.tensor([[0.0, 0.0]]), student))
    (grad,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(grad, torch.tensor([[0.5, -0.5]]))


def test_weights_count_each_term_that_many_times() -> None:
    pair = a_pair(rows(4, 6, 1), rows(4, 6, 2))
    for name, parameters in F_DIVERGENCES:  # to adaptive_kl, weights also say which outcomes are likeliest
        loss = divergence(name, **parameters)
        once = loss(Pair(pair.log_p, pair.log_q, torch.ones_like(pair.log_p)))
        torch.testing.assert_close(once, loss(pair))
        doubled = loss(Pair(pair.log_p, pair.log_q, 2 * torch.ones_like(pair.log_p)))
        torch.testing.assert_close(doubled, 2 * once)


def test_jsd_is_symmetric_and_bounded_at_one_half_and_tends_to_both_divergences() -> None:
    pair = a_pair(rows(9, 6, 1), rows(9, 6, 2))
    mirrored = Pair(pair.log_q, pair.log_p)
    half = divergence("jsd")(pair)
    torch.testing.assert_close(half, divergence("jsd")(mirrored))
    far = divergence("jsd")(a_pair(torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 90.0]])))
    assert far.item() == pytest.approx(0.6931472)
    near_zero = divergence("jsd", beta=1e-6)(pair) / 1e-6
    torch.testing.assert_close(near_zero, divergence("forward_kl")(pair), rtol=1e-4, atol=1e-6)
    near_one = divergence("jsd", beta=1 - 1e-6)(pair) / 1e-6
    torch.testing.assert_close(near_one, divergence("reverse_kl")(pair), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_jsd_refuses_a_beta_at_which_it_vanishes(beta: float) -> None:
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        divergence("jsd", beta=beta)(a_pair(rows(1, 3, 1), rows(1, 3, 2)))


@pytest.mark.parametrize("name", ["tails", "kl", "output_layer", ""])
def test_an_unknown_divergence_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        divergence(name)
    assert caught.value.hint == (
        "Choose one of: adaptive_kl, forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl, total_variation."
    )


def test_a_misspelt_divergence_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match="no divergence named 'forward_k'") as caught:
        divergence("forward_k")
    assert caught.value.hint == "Did you mean 'forward_kl'?"


def test_every_divergence_is_listed_and_tested() -> None:
    assert list(NAMES) == registry.names("kdcache.losses.divergences")
    assert {name for name, _ in DIVERGENCES} == set(NAMES)


def test_a_parameter_that_the_divergence_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="forward_kl has no parameter 'beta'"):
        divergence("forward_kl", beta=0.5)


@pytest.mark.parametrize("skew", [0.0, 1.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl"])
def test_a_skew_at_which_the_divergence_is_another_or_none_is_refused(name: str, skew: float) -> None:
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        divergence(name, skew=skew)(a_pair(rows(1, 3, 1), rows(1, 3, 2)))


def test_the_skewed_divergences_are_bounded_and_tend_to_the_plain_ones() -> None:
    pair = a_pair(rows(9, 6, 1), rows(9, 6, 2))
    torch.testing.assert_close(
        divergence("skew_kl", skew=1e-9)(pair), divergence("forward_kl")(pair), rtol=1e-5, atol=0
    )
    near = divergence("skew_reverse_kl", skew=1e-9)(pair)
    torch.testing.assert_close(near, divergence("reverse_kl")(pair), rtol=1e-5, atol=0)
    far = a_pair(torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 90.0]]))
    for name in ("skew_kl", "skew_reverse_kl"):
        assert divergence(name, skew=0.1)(far).item() == pytest.approx(2.3025851)


def test_total_variation_is_one_where_nothing_is_shared() -> None:
    far = a_pair(torch.tensor([[90.0, 0.0]]), torch.tensor([[0.0, 90.0]]))
    assert divergence("total_variation")(far).item() == pytest.approx(1.0)


@every
def test_an_outcome_of_no_weight_does_not_count(name: str, parameters: dict[str, Any]) -> None:
    pair = a_pair(rows(4, 6, 1), rows(4, 6, 2))
    more = [torch.cat([side, torch.full((4, 1), -0.1, dtype=torch.float64)], 1) for side in (pair.log_p, pair.log_q)]
    weight = torch.tensor([1.0] * 6 + [0.0], dtype=torch.float64).repeat(4, 1)
    loss = divergence(name, **parameters)
    torch.testing.assert_close(loss(Pair(*more, weight)), loss(pair))


def test_an_outcome_listed_twice_at_half_the_weight_is_one_outcome_to_the_adaptive_share() -> None:
    # all of it is head, or all of it tail, as long as mu does not fall inside
    log_p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()
    pick = torch.tensor([0, 0, 1, 2])
    weight = torch.tensor([[0.5, 0.5, 1.0, 1.0]], dtype=torch.float64)
    for mu in (0.61, 0.95, 1.0):
        loss = divergence("adaptive_kl", mu=mu)
        torch.testing.assert_close(loss(Pair(log_p[:, pick], log_q[:, pick], weight)), loss(Pair(log_p, log_q)))


def test_the_adaptive_share_by_hand() -> None:
    log_p = torch.tensor([[0.3, 0.1, 0.4, 0.2]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.1, 0.4, 0.3, 0.2]], dtype=torch.float64).log()
    pair = Pair(log_p, log_q)
    forward, reverse = divergence("forward_kl")(pair), divergence("reverse_kl")(pair)
    for mu, share in ((0.0, 0.1 / 0.6), (0.5, 0.1 / 0.6), (0.75, 0.3 / 0.6), (1.0, 1.0)):
        expected = share * forward + (1 - share) * reverse
        torch.testing.assert_close(divergence("adaptive_kl", mu=mu)(pair), expected)
    for mu in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            divergence("adaptive_kl", mu=mu)(pair)


def test_the_adaptive_share_is_a_constant_to_the_gradient() -> None:
    teacher, student = rows(5, 9, 1), rows(5, 9, 2).requires_grad_()
    pair = a_pair(teacher, student)
    values = [divergence(name)(pair) for name in ("forward_kl", "reverse_kl", "adaptive_kl")]
    forward, reverse, adaptive = (torch.autograd.grad(v.sum(), student, retain_graph=True)[0] for v in values)
    share = ((values[2] - values[1]) / (values[0] - values[1])).detach()[:, None]
    torch.testing.assert_close(adaptive, share * forward + (1 - share) * reverse)
