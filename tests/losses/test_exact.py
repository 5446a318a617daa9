"""The divergence over the whole vocabulary from hidden states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache.errors import MismatchError
from kdcache.losses import divergence
from kdcache.losses.exact import exact_divergence
from kdcache.targets.tensor import OutputHead
from tests.losses.dense import DIVERGENCES, F_DIVERGENCES, TEMPERATURES, dense, rows

every = pytest.mark.parametrize(("name", "parameters"), DIVERGENCES)


def models(n: int = 9, v: int = 50) -> tuple[Tensor, OutputHead, Tensor, OutputHead]:
    """A student of width 4 with 3 padding rows and a teacher of width 6 with 5, all with huge logits there."""
    student = OutputHead(rows(v + 3, 4, 1).requires_grad_(), rows(1, v + 3, 2)[0].requires_grad_())
    teacher = OutputHead(rows(v + 5, 6, 3), rows(1, v + 5, 4)[0], scale=0.5, softcap=8.0)
    with torch.no_grad():
        student.bias[v:] = 90.0  # type: ignore[index]
        teacher.bias[v:] = 90.0  # type: ignore[index]
    return rows(n, 4, 5).requires_grad_(), student, rows(n, 6, 6), teacher


@every
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_it_is_the_dense_divergence_over_real_ids_with_its_gradients(
    name: str, parameters: dict[str, Any], temperature: float, chunk: int
) -> None:
    hidden, head, teacher_hidden, teacher_head = models()
    found = exact_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        temperature=temperature,
        divergence=divergence(name, **parameters),
        num_ids=50,
        chunk=chunk,
    )
    teacher, student = teacher_head.logits(teacher_hidden)[:, :50], head.logits(hidden)[:, :50]
    expected = dense(name, teacher, student, temperature, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wanted = (hidden, head.weight, head.bias)
    factors = torch.arange(9.0).cos()
    for mine, theirs in zip(
        torch.autograd.grad((found * factors).sum(), wanted),
        torch.autograd.grad((expected * factors).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("name", "parameters"), F_DIVERGENCES)
def test_gradients_pass_the_numerical_check(name: str, parameters: dict[str, Any]) -> None:
    hidden, head, teacher_hidden, teacher_head = models(3, 8)

    def loss(h: Tensor, w: Tensor, o: Tensor) -> Tensor:
        return exact_divergence(
            h,
            OutputHead(w, o),
            teacher_hidden,
            teacher_head,
            temperature=2.0,
            divergence=divergence(name, **parameters),
            num_ids=8,
            chunk=2,
        )

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_it_is_zero_for_the_teacher_itself_and_gives_the_teacher_no_gradient() -> None:
    hidden, head, _, _ = models()
    found = exact_divergence(
        hidden, head, hidden, head, temperature=2.0, divergence=divergence("forward_kl"), num_ids=50, chunk=4
    )
    assert found.abs().max() < 1e-14
    _, _, teacher_hidden, teacher_head = models()
    teacher_hidden.requires_grad_()
    loss = exact_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        temperature=2.0,
        divergence=divergence("forward_kl"),
        num_ids=50,
        chunk=4,
    )
    loss.sum().backward()
    assert hidden.grad is not None
    assert teacher_hidden.grad is None


def test_nothing_of_vocabulary_size_outlives_its_chunk() -> None:
    n, v, chunk = 64, 500, 8
    hidden, head = torch.randn(n, 4, requires_grad=True), OutputHead(torch.randn(v, 4, requires_grad=True))
    saved: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = exact_divergence(
            hidden,
            head,
            torch.randn(n, 3),
            OutputHead(torch.randn(v, 3)),
            temperature=1.0,
            divergence=divergence("jsd"),
            num_ids=v,
            chunk=chunk,
        )
    assert all(size < chunk * v for size in saved)
    loss.sum().backward()
    assert hidden.grad is not None


def test_low_precision_and_autocast_are_close_to_float32() -> None:
    hidden, head, teacher_hidden, teacher_head = models()
    wide = [t.detach().float() for t in (hidden, head.weight, head.bias, teacher_hidden)]
    setting: dict[str, Any] = {
        "temperature": 2.0,
        "divergence": divergence("forward_kl"),
        "num_ids": 50,
        "chunk": 4,
    }
    teacher = OutputHead(teacher_head.weight.float())
    expected = exact_divergence(wide[0], OutputHead(wide[1], wide[2]), wide[3], teacher, **setting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = exact_divergence(wide[0], OutputHead(wide[1], wide[2]), wide[3], teacher, **setting)
    low = [t.bfloat16() for t in wide]
    narrow = exact_divergence(
        low[0], OutputHead(low[1], low[2]), wide[3], OutputHead(teacher.weight.bfloat16()), **setting
    )
    for found in (mixed, narrow):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_wrong_inputs_are_refused() -> None:
    hidden, head, teacher_hidden, teacher_head = models()
    setting: dict[str, Any] = {"temperature": 1.0, "divergence": divergence("forward_kl")}
    with pytest.raises(MismatchError, match="53 rows, fewer than the 54"):
        exact_divergence(hidden, head, teacher_hidden, teacher_head, num_ids=54, chunk=4, **setting)
    with pytest.raises(ValueError, match="9 positions of the student, 8"):
        exact_divergence(hidden, head, teacher_hidden[:8], teacher_head, num_ids=50, chunk=4, **setting)
    with pytest.raises(ValueError, match="at least one position"):
        exact_divergence(hidden, head, teacher_hidden, teacher_head, num_ids=50, chunk=0, **setting)
    with pytest.raises(ValueError, match="positive finite"):
        exact_divergence(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            temperature=0.0,
            divergence=divergence("forward_kl"),
            num_ids=50,
            chunk=4,
        )
