"""What each tail policy promises of the divergence over the whole vocabulary."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.errors import ConfigError, MismatchError
from kdcache.losses import Pair, divergence, tails
from kdcache.losses.output_layer import output_layer
from kdcache.losses.tails import POLICY_KIND, bucket, policy, renormalise, sampled
from kdcache.targets.measure import measure
from kdcache.targets.tensor import OutputHead, TensorTargets
from tests.losses.dense import DIVERGENCES, F_DIVERGENCES, TEMPERATURES, compact, dense, rows, student_side

V, K = 50, 8
every = pytest.mark.parametrize(("name", "parameters"), DIVERGENCES)
every_f = pytest.mark.parametrize(("name", "parameters"), F_DIVERGENCES)
smooth = pytest.mark.parametrize(("name", "parameters"), [one for one in DIVERGENCES if one[0] != "total_variation"])
at_every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def merged(name: str, teacher: Tensor, student: Tensor, targets: TensorTargets, temperature: float, **parameters: Any):  # type: ignore[no-untyped-def]
    """The divergence after the tail's probabilities are added up, densely."""

    def merge(logits: Tensor) -> Tensor:
        p = torch.softmax(logits / temperature, 1)
        tail = p.scatter(1, targets.ids, 0.0).sum(1, keepdim=True)
        return torch.cat([p.gather(1, targets.ids), tail], 1).log()

    return dense(name, merge(teacher), merge(student), 1.0, **parameters)


@every
@at_every_temperature
def test_bucket_is_the_divergence_of_the_merged_tail(name: str, parameters: dict[str, Any], temperature: float) -> None:
    teacher, student = rows(30, V, 1), rows(30, V, 2)
    targets = compact(teacher, K)
    pair = bucket(targets, *student_side(student, targets, temperature), temperature)
    torch.testing.assert_close(pair.log_p.exp().sum(1), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(pair.log_q.exp().sum(1), torch.ones(30, dtype=torch.float64))
    expected = merged(name, teacher, student, targets, temperature, **parameters)
    torch.testing.assert_close(divergence(name, **parameters)(pair), expected, rtol=1e-10, atol=1e-12)


@every_f
@given(seed=st.integers(0, 10_000), k=st.integers(1, 15), temperature=st.sampled_from(TEMPERATURES))
def test_bucket_never_exceeds_the_dense_divergence(
    name: str, parameters: dict[str, Any], seed: int, k: int, temperature: float
) -> None:
    teacher, student = rows(6, 16, seed), rows(6, 16, seed + 1)
    targets = compact(teacher, k)
    pair = bucket(targets, *student_side(student, targets, temperature), temperature)
    found = divergence(name, **parameters)(pair)
    assert (found <= dense(name, teacher, student, temperature, **parameters) + 1e-12).all()
    assert (found >= -1e-12).all()


@every_f
@at_every_temperature
def test_sampled_is_unbiased(name: str, parameters: dict[str, Any], temperature: float) -> None:
    teacher, student = rows(1, V, 3), rows(1, V, 4)
    repeats, draws = 3000, 16
    targets = compact(teacher.repeat(repeats, 1), K, draws, seed=5)
    assert targets.draw_ids is not None
    head_logits, rest = student_side(student.repeat(repeats, 1), targets, temperature)
    pair = sampled(targets, head_logits, rest, temperature, student[0][targets.draw_ids])
    found = divergence(name, **parameters)(pair)
    expected = dense(name, teacher, student, temperature, **parameters)
    error = found.std() / repeats**0.5
    assert (found.mean() - expected).abs() < 4 * error
    assert error < 0.05 * expected  # tight enough to see the 5 % that a lost tail would be
    bounded = divergence(name, **parameters)(bucket(targets[:1], head_logits[:1], rest[:1], temperature))
    assert expected - bounded > 4 * error


@pytest.mark.parametrize("name", sorted({name for name, _ in F_DIVERGENCES}))
def test_the_gradient_of_sampled_is_unbiased(name: str) -> None:
    teacher, student = rows(1, 20, 3), rows(1, 20, 4)
    repeats, temperature = 4000, 2.0
    targets = compact(teacher.repeat(repeats, 1), 4, 8, seed=1)
    assert targets.draw_ids is not None
    many = student.repeat(repeats, 1).requires_grad_()
    pair = sampled(targets, *student_side(many, targets, temperature), temperature, many.gather(1, targets.draw_ids))
    (found,) = torch.autograd.grad(divergence(name)(pair).sum(), many)
    student.requires_grad_()
    (expected,) = torch.autograd.grad(dense(name, teacher, student, temperature).sum(), student)
    errors = found.std(0) / repeats**0.5
    assert ((found.mean(0) - expected[0]).abs() < 4 * errors + 1e-12).all()


@smooth
def test_sampled_has_no_gradient_noise_once_the_student_agrees(name: str, parameters: dict[str, Any]) -> None:
    teacher = rows(10, V, 3)
    targets = compact(teacher, K, 4)
    assert targets.draw_ids is not None
    student = (teacher + 1.0).requires_grad_()
    pair = sampled(targets, *student_side(student, targets, 2.0), 2.0, student.gather(1, targets.draw_ids))
    loss = divergence(name, **parameters)(pair)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_adaptive_over_draws_tends_to_the_exact_value(temperature: float) -> None:
    teacher, student = rows(12, V, 3), rows(12, V, 4)
    expected = dense("adaptive_kl", teacher, student, temperature)
    errors = []
    for draws in (16, 20_000):
        targets = compact(teacher, K, draws, seed=5)
        assert targets.draw_ids is not None
        side = student_side(student, targets, temperature)
        pair = sampled(targets, *side, temperature, student.gather(1, targets.draw_ids))
        errors.append((divergence("adaptive_kl")(pair) - expected).abs().mean() / expected.mean())
    assert errors[1] < 0.02
    assert errors[1] < errors[0]


def test_adaptive_over_a_bucket_is_no_bound() -> None:
    # three alike outcomes merged change neither KL, but together they are the likeliest
    teacher = torch.tensor([[0.3, 0.25, 0.15, 0.15, 0.15]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.05, 0.25, 0.25, 0.25]], dtype=torch.float64).log()
    targets = compact(teacher, 2)
    found = divergence("adaptive_kl")(bucket(targets, *student_side(student, targets, 1.0), 1.0))
    assert (found > dense("adaptive_kl", teacher, student, 1.0) + 0.01).all()


def test_sampled_works_on_draws_measured_in_float32() -> None:
    teacher, student = rows(1, V, 7), rows(1, V, 8)
    repeats = 3000
    uniforms = torch.rand(repeats, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(repeats, dtype=torch.int64)
    targets = measure(teacher.repeat(repeats, 1), zeros, k=K, uniforms=uniforms)
    assert targets.draw_ids is not None
    head_logits, rest = student_side(student.repeat(repeats, 1), targets, 2.0)
    found = divergence("forward_kl")(sampled(targets, head_logits, rest, 2.0, student[0][targets.draw_ids]))
    expected = dense("forward_kl", teacher, student, 2.0)
    assert (found.mean() - expected).abs() < 4 * found.std() / repeats**0.5


@every
@at_every_temperature
def test_with_the_whole_vocabulary_kept_all_policies_are_exact(
    name: str, parameters: dict[str, Any], temperature: float
) -> None:
    teacher, student = rows(12, V, 1), rows(12, V, 2)
    targets = compact(teacher, V)
    head_logits, rest = student_side(student, targets, temperature)
    # a capture of the whole vocabulary keeps draws of no weight
    no_tail = TensorTargets(
        targets.ids,
        targets.logits,
        targets.tail,
        targets.label_logit,
        V,
        torch.zeros(12, 2, dtype=torch.int64),
        teacher[:, :1].repeat(1, 2),
    )
    pairs = [
        bucket(targets, head_logits, rest, temperature),
        renormalise(targets, head_logits, rest, temperature),
        sampled(no_tail, head_logits, rest, temperature, student[:, :1].repeat(1, 2)),
    ]
    expected = dense(name, teacher, student, temperature, **parameters)
    for pair in pairs:
        found = divergence(name, **parameters)(pair)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every
def test_renormalise_ignores_what_lies_outside_the_head(name: str, parameters: dict[str, Any]) -> None:
    teacher, student = rows(5, V, 1), rows(5, V, 2)
    targets = compact(teacher, K)
    head_logits, rest = student_side(student, targets, 2.0)
    found = divergence(name, **parameters)(renormalise(targets, head_logits, rest, 2.0))
    expected = dense(name, targets.logits, head_logits, 2.0, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_renormalise_warns_once_and_only_when_something_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    tails._warn_of_bias.cache_clear()
    teacher = rows(2, V, 1)
    with caplog.at_level(logging.WARNING):
        whole = compact(teacher, V)
        renormalise(whole, *student_side(teacher, whole, 1.0), 1.0)
        assert not caplog.records
        targets = compact(teacher, K)
        for _ in range(3):
            renormalise(targets, *student_side(teacher, targets, 1.0), 1.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "biased" in caplog.text


@every_f
@pytest.mark.parametrize("tail", ["bucket", "sampled", "renormalise"])
def test_gradients_through_the_fused_layer_pass_the_numerical_check(
    name: str, parameters: dict[str, Any], tail: str
) -> None:
    targets = compact(rows(3, 12, 1), 4, 2)
    assert targets.draw_ids is not None
    hidden, weight, bias = (rows(*shape).requires_grad_() for shape in ((3, 3, 5), (12, 3, 6), (1, 12, 7)))

    def loss(h: Tensor, w: Tensor, o: Tensor) -> Tensor:
        head_logits, draw_logits, rest = output_layer(
            h, OutputHead(w, o[0], softcap=9.0), targets.ids, targets.draw_ids, (0.5,), chunk=2
        )
        extra = {"draw_logits": draw_logits} if tail == "sampled" else {}
        return divergence(name, **parameters)(policy(tail)(targets, head_logits, rest[:, 0], 2.0, **extra))

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@every
@at_every_temperature
def test_the_gradient_of_the_fused_bucket_is_that_of_the_dense_one(
    name: str, parameters: dict[str, Any], temperature: float
) -> None:
    teacher = rows(9, V, 1)
    targets = compact(teacher, K)
    hidden, weight = rows(9, 6, 5).requires_grad_(), rows(V, 6, 6).requires_grad_()
    outputs = output_layer(hidden, OutputHead(weight), targets.ids, targets.ids[:, :0], (1 / temperature,), chunk=4)
    pair = bucket(targets, outputs[0], outputs[2][:, 0], temperature)
    found = torch.autograd.grad(divergence(name, **parameters)(pair).sum(), (hidden, weight))
    loss = merged(name, teacher, hidden @ weight.T, targets, temperature, **parameters).sum()
    for mine, theirs in zip(found, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@every
@pytest.mark.parametrize("tail", ["bucket", "sampled", "renormalise"])
def test_extreme_and_masked_teachers_give_finite_losses_and_gradients(
    name: str, parameters: dict[str, Any], tail: str
) -> None:
    teacher = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    teacher[0, 1:] = -1e4
    teacher[1] = 1e4
    teacher[2, 5:] = -torch.inf
    teacher[3, 6] = 1e4
    teacher[4, :] *= 1e4
    uniforms = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = measure(teacher, torch.zeros(5, dtype=torch.int64), k=4, uniforms=uniforms)
    assert targets.draw_ids is not None
    student = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    student[3:] *= 1e4
    student.requires_grad_()
    extra = {"draw_logits": student.gather(1, targets.draw_ids)} if tail == "sampled" else {}
    pair = policy(tail)(targets, *student_side(student, targets, 2.0), 2.0, **extra)
    loss = divergence(name, **parameters)(pair)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("tail", ["bucket", "sampled", "renormalise"])
def test_bfloat16_is_close_to_float32(tail: str) -> None:
    uniforms = torch.rand(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = measure(rows(9, V, 1), torch.zeros(9, dtype=torch.int64), k=K, uniforms=uniforms)
    assert targets.draw_ids is not None
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = rows(9, 16, 5, 0.5).to(dtype), rows(V, 16, 6, 0.5).to(dtype)
        found = output_layer(hidden, OutputHead(weight), targets.ids, targets.draw_ids, (0.5,), chunk=4)
        extra = {"draw_logits": found[1]} if tail == "sampled" else {}
        values.append(divergence("forward_kl")(policy(tail)(targets, found[0], found[2][:, 0], 2.0, **extra)))
    torch.testing.assert_close(values[1], values[0], rtol=0.03, atol=0.005)


@pytest.mark.parametrize("gap", [60.0, 200.0, 1e5, torch.inf])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_sampled_is_exact_where_the_teacher_masks_the_tail(gap: float, name: str) -> None:
    teacher, student = rows(6, V, 1), rows(6, V, 2)
    teacher[:, K:] -= gap
    uniforms = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = measure(teacher, torch.zeros(6, dtype=torch.int64), k=K, uniforms=uniforms)
    assert targets.draw_ids is not None
    head_logits, rest = student_side(student, targets, 1.0)
    found = divergence(name)(sampled(targets, head_logits, rest, 1.0, student.gather(1, targets.draw_ids)))
    expected = dense(name, teacher.clamp(min=-1e6), student, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sampled_without_draws_is_refused_with_what_to_do() -> None:
    targets = compact(rows(2, V, 1), K)
    head_logits, rest = student_side(rows(2, V, 2), targets, 1.0)
    with pytest.raises(MismatchError, match="no tail draws") as caught:
        sampled(targets, head_logits, rest, 1.0, head_logits[:, :0])
    assert "Capture with tail draws" in caught.value.hint


def test_every_policy_says_what_it_is_and_unknown_ones_are_refused() -> None:
    assert set(POLICY_KIND) == {"exact", "sampled", "bucket", "renormalise"}
    assert {policy(name) for name in ("bucket", "sampled", "renormalise")} == {bucket, sampled, renormalise}
    for name in ("exact", "drop"):
        with pytest.raises(ConfigError, match=name):
            policy(name)


def test_pairs_without_weights_are_the_ones_that_list_every_outcome() -> None:
    targets = compact(rows(2, V, 1), K, 3)
    assert targets.draw_ids is not None
    student = rows(2, V, 2)
    side = student_side(student, targets, 1.0)
    assert isinstance(bucket(targets, *side, 1.0), Pair)
    assert bucket(targets, *side, 1.0).weight is None
    weight = sampled(targets, *side, 1.0, student.gather(1, targets.draw_ids)).weight
    assert weight is not None
    assert (weight[:, :K] == 1).all()
    assert (weight[:, K] == 0).all()
