"""The fused output layer, against the dense product."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.errors import MismatchError
from kdcache.losses.output_layer import first_ids, log_partition, output_layer, suitable_chunk
from kdcache.targets.tensor import OutputHead

BS = (2.0, 1.0, 0.25)


def a_layer(
    n: int = 7, d: int = 5, v: int = 23, *, bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(n + d + v)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64)
    offset = torch.randn(v, generator=generator, dtype=torch.float64) if bias else None
    tensors = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, offset)]
    return tensors[0], tensors[1], tensors[2]  # type: ignore[return-value]


def some_ids(n: int, v: int, k: int, e: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(v * k)
    head = torch.stack([torch.randperm(v, generator=generator)[:k] for _ in range(n)])
    return head, torch.randint(0, v, (n, e), generator=generator)


def dense(hidden: Tensor, head: OutputHead, head_ids: Tensor, extra_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    others = z.scatter(1, head_ids, -torch.inf)
    rest = torch.stack([torch.logsumexp(b * others, 1) for b in BS], 1)
    return z.gather(1, head_ids), z.gather(1, extra_ids), rest


def scalar(outputs: tuple[Tensor, ...]) -> Tensor:
    """A sum that gives every finite output another gradient."""
    total = outputs[0].new_zeros(())
    for output in outputs:
        factor = torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape).cos()
        total = total + (output.masked_fill(output.isinf(), 0.0) * factor).sum()
    return total


@pytest.mark.parametrize("k", [1, 6, 23])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 3.0), (2.0, 5.0)])
def test_values_and_gradients_are_those_of_the_dense_layer(
    k: int, bias: bool, scale: float, softcap: float | None
) -> None:
    hidden, weight, offset = a_layer(bias=bias)
    head = OutputHead(weight, offset, scale, softcap)
    head_ids, extra_ids = some_ids(7, 23, k, 4)
    wanted = [t for t in (hidden, weight, offset) if t is not None]
    found = output_layer(hidden, head, head_ids, extra_ids, BS, chunk=3)
    expected = dense(hidden, head, head_ids, extra_ids)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(scalar(found), wanted), torch.autograd.grad(scalar(expected), wanted), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradients_pass_the_numerical_check(softcap: float | None) -> None:
    hidden, weight, offset = a_layer(4, 3, 11)
    head_ids, extra_ids = some_ids(4, 11, 3, 2)

    def function(h: Tensor, w: Tensor, o: Tensor) -> tuple[Tensor, ...]:
        return output_layer(h, OutputHead(w, o, 0.7, softcap), head_ids, extra_ids, (1.0, 0.5), chunk=3)

    assert torch.autograd.gradcheck(function, (hidden, weight, offset))


@given(chunk=st.integers(1, 12), n=st.integers(0, 11), k=st.integers(1, 9), e=st.integers(0, 3))
def test_the_chunk_does_not_change_the_answer(chunk: int, n: int, k: int, e: int) -> None:
    hidden, weight, offset = a_layer(max(n, 1), 4, 9)
    hidden = hidden[:n]
    head_ids = some_ids(n, 9, k, e)[0] if n else torch.empty(0, k, dtype=torch.int64)
    extra_ids = some_ids(n, 9, k, e)[1] if n else torch.empty(0, e, dtype=torch.int64)
    head = OutputHead(weight, offset)
    found = output_layer(hidden, head, head_ids, extra_ids, BS, chunk=chunk)
    whole = output_layer(hidden, head, head_ids, extra_ids, BS, chunk=100)
    for mine, theirs in zip(found, whole, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(scalar(outputs), (weight, offset)) for outputs in (found, whole)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_only_asked_gradients_are_given_and_unused_outputs_cost_none() -> None:
    hidden, weight, offset = a_layer()
    head_ids, extra_ids = some_ids(7, 23, 4, 1)
    frozen = OutputHead(weight.detach(), offset.detach() if offset is not None else None)
    for index in range(3):
        found = output_layer(hidden, frozen, head_ids, extra_ids, BS, chunk=3)[index].sum()
        expected = dense(hidden, frozen, head_ids, extra_ids)[index].sum()
        (mine,), (theirs,) = torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden)
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    output = output_layer(hidden.detach(), OutputHead(weight), head_ids, extra_ids, BS, chunk=3)
    scalar(output).backward()
    assert weight.grad is not None
    assert hidden.grad is None


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def peaks(n: int, chunk: int, v: int) -> tuple[int, int]:
    """The largest tensor made, and the largest saved between forward and backward."""
    hidden, weight, offset = a_layer(n, 3, v, dtype=torch.float32)
    head_ids, extra_ids = torch.arange(4).repeat(n, 1), torch.zeros(n, 2, dtype=torch.int64)
    saved: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as mode, torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        outputs = output_layer(hidden, OutputHead(weight, offset), head_ids, extra_ids, BS, chunk=chunk)
        scalar(outputs).backward()
    return mode.largest, max(saved)


def test_the_largest_tensor_is_a_chunk_of_logits_whatever_the_number_of_positions() -> None:
    v, chunk = 2000, 8
    for n in (8, 64, 512):
        largest, saved = peaks(n, chunk, v)
        assert largest == chunk * v
        assert saved <= max(v * 3, n * 4)


def test_bfloat16_is_close_to_float32_and_gives_float32_results() -> None:
    hidden, weight, offset = a_layer(6, 16, 50, dtype=torch.float32)
    head_ids, extra_ids = some_ids(6, 50, 8, 2)
    expected = output_layer(hidden, OutputHead(weight, offset), head_ids, extra_ids, BS, chunk=4)
    gradients = torch.autograd.grad(scalar(expected), (hidden, weight))
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, offset) if t is not None]
    found = output_layer(low[0], OutputHead(low[1], low[2]), head_ids, extra_ids, BS, chunk=4)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.15)
    for mine, theirs in zip(torch.autograd.grad(scalar(found), low[:2]), gradients, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - theirs).norm() < 0.03 * theirs.norm()


def test_autocast_multiplies_in_bfloat16_and_gives_float32_gradients() -> None:
    hidden, weight, offset = a_layer(6, 16, 50, dtype=torch.float32)
    head_ids, extra_ids = some_ids(6, 50, 8, 2)
    plain = output_layer(hidden, OutputHead(weight, offset), head_ids, extra_ids, BS, chunk=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output_layer(hidden, OutputHead(weight, offset), head_ids, extra_ids, BS, chunk=4)
    assert not torch.equal(found[0], plain[0])
    assert torch.equal(found[0], found[0].bfloat16().float())
    expected = torch.autograd.grad(scalar(plain), (hidden, weight))
    for mine, theirs in zip(torch.autograd.grad(scalar(found), (hidden, weight)), expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_a_rest_far_below_the_head_keeps_its_precision() -> None:
    z = torch.tensor([[30.0, -30.0, -31.0, -29.0]])
    eye = torch.eye(4)
    rest = output_layer(z, OutputHead(eye), torch.tensor([[0]]), torch.zeros(1, 0, dtype=torch.int64), (1.0,), chunk=1)[
        2
    ]
    assert rest.item() == pytest.approx(math.log(math.exp(-30) + math.exp(-31) + math.exp(-29)), rel=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_and_masked_ids_stay_finite(size: float) -> None:
    hidden = torch.tensor([[size, 1.0], [-size, 1.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 0.0], [0.0, 1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    outputs = output_layer(
        hidden, OutputHead(weight, bias), torch.tensor([[0], [0]]), torch.tensor([[1], [1]]), (1.0, 2.0), chunk=2
    )
    z = log_partition(outputs[0], outputs[2][:, 0], 1.0)
    assert z.tolist() == [1e4, 1e4]
    (z.sum() + outputs[2].sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_with_the_whole_vocabulary_kept_the_rest_is_empty_and_harmless() -> None:
    hidden, weight, offset = a_layer()
    head_ids = torch.arange(23).repeat(7, 1)
    head_logits, _, rest = output_layer(hidden, OutputHead(weight, offset), head_ids, head_ids[:, :0], BS, chunk=3)
    assert torch.isneginf(rest).all()
    z = log_partition(head_logits, rest[:, 1], 1.0)
    torch.testing.assert_close(z, torch.logsumexp(head_logits, 1))
    (grad,) = torch.autograd.grad(z.sum(), weight)
    assert torch.isfinite(grad).all()


def test_the_head_of_the_first_ids_leaves_padding_out_and_carries_gradients() -> None:
    hidden, weight, offset = a_layer()
    head = OutputHead(weight, offset, 0.5, 7.0)
    cut = first_ids(head, 20)
    torch.testing.assert_close(cut.logits(hidden), head.logits(hidden)[:, :20])
    (grad,) = torch.autograd.grad(cut.logits(hidden).sum(), weight)
    assert grad.shape == weight.shape
    assert grad[20:].eq(0).all()
    assert first_ids(head, 23) is head
    with pytest.raises(MismatchError, match="23 rows, fewer than the 24"):
        first_ids(head, 24)


def test_wrong_shapes_and_chunks_are_refused() -> None:
    hidden, weight, _ = a_layer()
    head_ids, extra_ids = some_ids(7, 23, 4, 1)
    with pytest.raises(ValueError, match="do not agree"):
        output_layer(hidden, OutputHead(weight), head_ids[:1], extra_ids, BS, chunk=3)
    with pytest.raises(ValueError, match="at least one position"):
        output_layer(hidden, OutputHead(weight), head_ids, extra_ids, BS, chunk=0)


@pytest.mark.parametrize(
    ("num_ids", "device", "expected"), [(49152, "cpu", 128), (262144, "cpu", 24), (10**9, "cpu", 1)]
)
def test_an_automatic_chunk_keeps_a_tensor_of_logits_small(num_ids: int, device: str, expected: int) -> None:
    chunk = suitable_chunk(num_ids, torch.device(device))
    assert chunk == expected
    assert chunk == 1 or chunk * num_ids * 4 <= 26e6
    assert suitable_chunk(num_ids, torch.device("meta")) >= chunk
