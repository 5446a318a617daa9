"""Span losses: the definitions in float64, their bounds, their limits, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from kdcache import registry
from kdcache.errors import ConfigError, MismatchError
from kdcache.losses.output_layer import output_layer
from kdcache.losses.spans import SPAN_LOSSES, Firsts, Sides, is_span_loss, span_loss
from kdcache.targets.measure import measure
from kdcache.targets.tensor import OutputHead, TensorTargets


def sides_of(seed: int = 0, count: int = 40) -> tuple[Tensor, Tensor]:
    """Log-probabilities of spans from nearly sure to hopeless."""
    random = torch.Generator().manual_seed(seed)
    surprise = torch.rand(2, count, generator=random, dtype=torch.float64) ** 4 * 60 + 1e-3
    return -surprise[0], -surprise[1]


def firsts_of(teacher: Tensor, student: Tensor, k: int, temperature: float) -> Firsts:
    """What training would make of dense logits [C, V] and [C, U]."""
    targets = measure(teacher, torch.zeros(len(teacher), dtype=torch.int64), k=k)
    wide = targets.each(lambda one: one.double() if one.is_floating_point() else one)
    best = student.topk(min(k, student.shape[1]), 1)
    rest = (student / temperature).scatter(1, best.indices, -torch.inf).logsumexp(1)
    return Firsts(wide, best.values, rest, temperature)


def dense_uld(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """The definition: both softmaxes sorted, the shorter one filled up with zeros."""
    p, q = ((one / temperature).softmax(1).sort(1, descending=True).values for one in (teacher, student))
    longest = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(one, (0, longest - one.shape[1])) for one in (p, q))
    return (p - q).abs().sum(1)


def logits_of(count: int, size: int, seed: int) -> Tensor:
    return 3 * torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_named_losses_are_the_plugins() -> None:
    assert list(SPAN_LOSSES) == registry.names("kdcache.losses.spans")
    assert is_span_loss("uld")
    assert not is_span_loss("forward_kl")
    with pytest.raises(ConfigError, match="no parameter 'beta'"):
        span_loss("uld", beta=2.0)


@pytest.mark.parametrize("tau", [1.0, 3.0, 100.0])
def test_span_likelihood_is_tau_times_the_kl_of_two_softened_outcomes(tau: float) -> None:
    log_p, log_q = sides_of()
    p, q = (log_p / tau).exp(), (log_q / tau).exp()
    expected = tau * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    found = span_loss("span_likelihood", tau=tau).loss(Sides(log_p, log_q))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert (found >= -1e-12).all()
    single = span_loss("span_likelihood", tau=tau).loss(Sides(log_p.float(), log_q.float()))
    assert torch.allclose(single.double(), expected, rtol=1e-4, atol=1e-4)


def test_span_likelihood_tends_to_a_divergence_of_surprises() -> None:
    log_p, log_q = sides_of()
    a, b = -log_p, -log_q
    found = span_loss("span_likelihood", tau=1e6).loss(Sides(log_p, log_q))
    assert torch.allclose(found, a * (a / b).log() - a + b, rtol=1e-3, atol=1e-4)


def test_span_likelihood_is_zero_at_the_teacher_and_finite_at_every_limit() -> None:
    log_p, _ = sides_of()
    assert span_loss("span_likelihood").loss(Sides(log_p, log_p)).abs().max() < 1e-12
    ends = torch.tensor([0.0, 1e-7, -1e-9, -3.0, -200.0, -math.inf], dtype=torch.float32)
    log_p, log_q = (one.flatten() for one in torch.meshgrid(ends, ends, indexing="ij"))
    for tau in (1.0, 100.0):
        own = log_q.clone().requires_grad_()
        value = span_loss("span_likelihood", tau=tau).loss(Sides(log_p, own))
        value.sum().backward()
        assert value.isfinite().all()
        assert own.grad is not None
        assert own.grad.isfinite().all()
    # a student that is certain where the teacher is not can still learn to doubt
    own = torch.zeros(1, requires_grad=True)
    span_loss("span_likelihood").loss(Sides(torch.tensor([-3.0]), own)).sum().backward()
    assert own.grad is not None
    assert own.grad.item() > 0


def test_a_tau_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        span_loss("span_likelihood", tau=0.0).loss(Sides(*sides_of()))


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_gradcheck_of_span_likelihood(tau: float) -> None:
    log_p, log_q = sides_of(count=12)
    assert torch.autograd.gradcheck(
        lambda one: span_loss("span_likelihood", tau=tau).loss(Sides(log_p, one)), log_q.requires_grad_()
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("size", [7, 20, 31])
def test_uld_is_exact_with_every_logit_of_the_teacher(size: int, temperature: float) -> None:
    teacher, student = logits_of(9, 20, 1), logits_of(9, size, 2)
    sides = Sides(teacher[:, 0], teacher[:, 0], firsts_of(teacher, student, 20, temperature))
    assert torch.allclose(span_loss("uld").loss(sides), dense_uld(teacher, student, temperature), atol=1e-6)


def test_uld_of_a_head_is_a_lower_bound_that_rises_with_k() -> None:
    teacher, student = logits_of(50, 40, 3), logits_of(50, 60, 4)
    whole, before = dense_uld(teacher, student, 1.0), torch.zeros(50, dtype=torch.float64)
    for k in (1, 4, 16, 40):
        found = span_loss("uld").loss(Sides(teacher[:, 0], teacher[:, 0], firsts_of(teacher, student, k, 1.0)))
        assert (found <= whole + 1e-3).all()  # the tail's log-partition is kept in steps of 1/1024
        assert (found >= before - 1e-3).all()
        before = found
    assert torch.allclose(before, whole, atol=1e-6)


def test_uld_is_exact_where_the_student_has_no_more_ids_than_the_head() -> None:
    teacher, student = logits_of(30, 40, 3), logits_of(30, 6, 4)
    found = span_loss("uld").loss(Sides(teacher[:, 0], teacher[:, 0], firsts_of(teacher, student, 8, 1.0)))
    assert torch.allclose(found, dense_uld(teacher, student, 1.0), atol=2e-3)


def test_uld_does_not_see_what_the_probability_is_given_to() -> None:
    teacher = logits_of(5, 20, 5)
    turned = teacher[:, torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    assert span_loss("uld").loss(Sides(teacher[:, 0], teacher[:, 0], firsts_of(teacher, turned, 20, 1.0))).max() < 1e-6


@pytest.mark.parametrize(("k", "size"), [(20, 20), (5, 31), (8, 6)])
def test_gradcheck_of_uld_through_the_output_layer(k: int, size: int) -> None:
    teacher, random = logits_of(4, 20, 1), torch.Generator().manual_seed(7)
    hidden = torch.randn(4, 3, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(size, 3, generator=random, dtype=torch.float64, requires_grad=True)
    targets = firsts_of(teacher, logits_of(4, size, 2), k, 2.0).targets

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        best = (hidden @ weight.T).detach().topk(min(k, size), 1).indices
        logits, _, rest = output_layer(hidden, OutputHead(weight), best, best[:, :1], (0.5,), chunk=3)
        return span_loss("uld").loss(Sides(teacher[:, 0], teacher[:, 0], Firsts(targets, logits, rest[:, 0], 2.0)))

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_uld_at_another_temperature_needs_a_teacher_that_told_its_tail_there() -> None:
    teacher = logits_of(3, 20, 1)
    firsts = firsts_of(teacher, teacher, 5, 2.0)
    known = TensorTargets(firsts.targets.ids, firsts.targets.logits, firsts.targets.tail[:, :1], teacher[:, 0], 20)
    with pytest.raises(MismatchError, match="T = 1"):
        span_loss("uld").loss(Sides(teacher[:, 0], teacher[:, 0], Firsts(known, firsts.logits, firsts.rest, 2.0)))
