"""The student's output layer fused with what losses need of it: a few logits and the mass of all others.

Legend: `N` positions, `n` positions of a chunk, `D` width, `V` vocabulary, `K` head ids, `E` extra ids,
`B` inverse temperatures, `b = 1/T`.

The largest tensor is `[n, V]` (or the weight and its gradient). Nothing of size `[*, V]` outlives its chunk:
the backward pass computes the logits of each chunk again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from kdcache.errors import MismatchError
from kdcache.targets.tensor import OutputHead


def output_layer(
    hidden: Tensor,
    head: OutputHead,
    head_ids: Tensor,
    extra_ids: Tensor,
    inverse_temperatures: tuple[float, ...],
    *,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's logits of some ids and the log-sum-exp over all other ids, without `[N, V]`.

    The product with the weight runs in the autocast dtype, else in the dtype of `hidden`; scale, softcap and
    sums run in float32, or float64 where the product does; so are the results. Gradients reach `hidden`, the
    weight and the bias; over chunks they are summed in float32 or better. Deterministic, and independent of
    `chunk` up to rounding. First derivatives only.

    Args:
        hidden: [N, D], last hidden states.
        head: The output layer: softcap(scale * (hidden @ weight.T + bias)).
        head_ids: int64 [N, K], unique within a row, 0 <= id < V; K = V is allowed.
        extra_ids: int64 [N, E], 0 <= id < V, any: labels, tail draws, repeats.
        inverse_temperatures: The B values of b at which `rest` is wanted.
        chunk: Positions at a time.

    Returns:
        The raw logits of the head ids [N, K] and of the extra ids [N, E], and the rest [N, B]: the
        log-sum-exp of b * logit over the ids outside `head_ids`, summed directly rather than as what is left
        of a total; minus infinity where there are none.

    Raises:
        ValueError: A shape does not fit, or `chunk` is not positive.
    """
    rows = len(hidden)
    if chunk < 1:
        raise ValueError(f"a chunk has at least one position, not {chunk}")
    if hidden.ndim != 2 or len(head_ids) != rows or len(extra_ids) != rows:
        shapes = [tuple(tensor.shape) for tensor in (hidden, head_ids, extra_ids)]
        raise ValueError(f"hidden [N, D], head ids [N, K] and extra ids [N, E] do not agree: {shapes}")
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    setting = _Setting(head.scale, head.softcap, inverse_temperatures, chunk, dtype)
    with torch.autocast(device, enabled=False):
        head_logits, extra_logits, rest = _OutputLayer.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, head_ids, extra_ids, setting
        )
    return head_logits, extra_logits, rest


CHUNK_ELEMENTS = {"cpu": 128 * 49152, "other": 1 << 26}
"""Logits of a chunk: on the CPU the fastest of those measured (docs/log.md), elsewhere a quarter of a gigabyte."""


def suitable_chunk(num_ids: int, device: torch.device) -> int:
    """Return how many positions of a vocabulary to handle at a time on a device."""
    return max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["other"]) // num_ids)


def log_partition(head_logits: Tensor, rest: Tensor, inverse_temperature: float) -> Tensor:
    """Return the log-sum-exp [N] of b * logit over the whole vocabulary.

    Args:
        head_logits: [N, K], raw.
        rest: [N], the rest at this inverse temperature.
        inverse_temperature: b.
    """
    return torch.logaddexp(torch.logsumexp(head_logits * inverse_temperature, dim=-1), rest)


def first_ids(head: OutputHead, num_ids: int) -> OutputHead:
    """Return the output head of ids 0 to `num_ids` - 1, as a view: without the rows that pad a vocabulary.

    Raises:
        MismatchError: The head has fewer rows than that.
    """
    rows = len(head.weight)
    if rows < num_ids:
        raise MismatchError(
            f"The output head has {rows} rows, fewer than the {num_ids} ids of the vocabulary.",
            hint="Use a student with the teacher's tokenizer, or resize its embeddings.",
        )
    if rows == num_ids:
        return head
    bias = None if head.bias is None else head.bias[:num_ids]
    return OutputHead(head.weight[:num_ids], bias, head.scale, head.softcap)


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the layer needs besides tensors; `dtype` is that of the product."""

    scale: float
    softcap: float | None
    inverse_temperatures: tuple[float, ...]
    chunk: int
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums and results."""
        return torch.promote_types(self.dtype, torch.float32)

    def chunks(self, rows: int) -> list[slice]:
        """Return the runs of positions that are handled at a time."""
        return [slice(start, start + self.chunk) for start in range(0, rows, self.chunk)]

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits [n, V] of a chunk in the wide dtype, a new tensor."""
        z = linear(hidden.to(self.dtype), weight, bias).to(self.wide)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z


class _OutputLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head_ids: Tensor,
        extra_ids: Tensor,
        setting: _Setting,
    ) -> tuple[Tensor, Tensor, Tensor]:
        narrow, narrow_bias = _cast(weight, bias, setting.dtype)
        rows = len(hidden)
        head = hidden.new_empty(head_ids.shape, dtype=setting.wide)
        extra = hidden.new_empty(extra_ids.shape, dtype=setting.wide)
        rest = hidden.new_empty(rows, len(setting.inverse_temperatures), dtype=setting.wide)
        for here in setting.chunks(rows):
            z = setting.logits(hidden[here], narrow, narrow_bias)
            torch.gather(z, 1, head_ids[here], out=head[here])
            torch.gather(z, 1, extra_ids[here], out=extra[here])
            z.scatter_(1, head_ids[here], -torch.inf)
            top = z.amax(1, keepdim=True)
            z.sub_(top.masked_fill_(torch.isneginf(top), 0.0))
            for j, b in enumerate(setting.inverse_temperatures):
                rest[here, j] = (z * b).exp_().sum(1).log_() + b * top[:, 0]
        ctx.save_for_backward(hidden, weight, bias, head_ids, extra_ids, rest)
        ctx.setting = setting
        ctx.set_materialize_grads(False)
        return head, extra, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, head_ids, extra_ids, rest = ctx.saved_tensors
        setting: _Setting = ctx.setting
        narrow, narrow_bias = _cast(weight, bias, setting.dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=setting.wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=setting.wide) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for here in setting.chunks(len(hidden)):
                z = setting.logits(hidden[here], narrow, narrow_bias)
                grad_head, grad_extra, grad_rest = (None if g is None else g[here] for g in grads)
                wide = _grad_logits(z, head_ids[here], rest[here], grad_rest, setting)
                for ids, grad in ((head_ids[here], grad_head), (extra_ids[here], grad_extra)):
                    if grad is not None:
                        wide.scatter_add_(1, ids, grad)
                _through_shape(wide, z, setting)
                if grad_bias is not None:
                    grad_bias += wide.sum(0)
                narrow_grad = wide.to(setting.dtype)
                if grad_hidden is not None:
                    grad_hidden[here] = narrow_grad @ narrow
                if grad_weight is not None:
                    _add_product(grad_weight, narrow_grad, hidden[here].to(setting.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _grad_logits(z: Tensor, head_ids: Tensor, rest: Tensor, grad_rest: Tensor | None, setting: _Setting) -> Tensor:
    """Return what `rest` gives the logits [n, V]: b * grad * exp(b z - rest) outside the head, 0 inside."""
    if grad_rest is None:
        return torch.zeros_like(z)
    # an empty rest is minus infinity, and exp(-inf - -inf) is NaN
    lift = rest.masked_fill(torch.isneginf(rest), 0.0)
    total: Tensor | None = None
    for j, b in enumerate(setting.inverse_temperatures):
        part = (z * b).sub_(lift[:, j : j + 1]).exp_().mul_(b * grad_rest[:, j : j + 1])
        total = part if total is None else total.add_(part)
    # inside the head the powers may have overflowed: overwritten, whatever they are
    return torch.zeros_like(z) if total is None else total.scatter_(1, head_ids, 0.0)


def _through_shape(grad: Tensor, z: Tensor, setting: _Setting) -> None:
    """Carry the gradient [n, V] in place from the shaped logits `z` (which is used up) to the product."""
    if setting.softcap is not None:
        grad.mul_(z.div_(setting.softcap).square_().neg_().add_(1.0))
    if setting.scale != 1.0:
        grad.mul_(setting.scale)


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Add grad.T @ hidden [V, D] to a total whose dtype may be wider than theirs."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, hidden)
    else:
        total += grad.T @ hidden
