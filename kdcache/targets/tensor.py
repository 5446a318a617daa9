"""The compact teacher distribution on torch tensors: the fields and the maths of `kdcache.targets.Targets`.

Legend: `N` positions, `K` kept entries, `M` tail draws, `J` log-partition nodes, `V` vocabulary, `D` width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.targets import Targets, inverse
from kdcache.targets.log_partition import AT_ONE, NODES, interpolation_weights, require_at_one


@dataclass(frozen=True, slots=True)
class OutputHead:
    """A model's output layer: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, D].
        bias: [V], or None.
        scale: Factor on the logits (Cohere's logit scale, the inverse of Granite's logits scaling).
        softcap: c in c * tanh(logits / c) (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, V] of hidden states [N, D], in the dtype of the matrix product."""
        return self.shape_logits(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def shape_logits(self, logits: Tensor) -> Tensor:
        """Return the logits with scale, then softcap, applied."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def to(self, device: torch.device | str) -> "OutputHead":
        """Return the head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return OutputHead(self.weight.to(device), bias, self.scale, self.softcap)


@dataclass(frozen=True, slots=True)
class TensorTargets:
    """What a teacher said at N positions, on one device; see `kdcache.targets.Targets` for the fields.

    Ids are int64, or int32 from a store (widened where they index), values float32 (float64 in checks of gradients);
    methods compute in the values' dtype.
    """

    ids: Tensor
    logits: Tensor
    tail: Tensor
    label_logit: Tensor
    vocab_size: int
    draw_ids: Tensor | None = None
    draw_logits: Tensor | None = None

    @staticmethod
    def from_numpy(targets: Targets) -> "TensorTargets":
        """Return the targets as tensors on the CPU: ids widened to int64, values shared where possible."""

        def ids(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))

        def values(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

        return TensorTargets(
            ids=ids(targets.ids),
            logits=values(targets.logits),
            tail=values(targets.tail),
            label_logit=values(targets.label_logit),
            vocab_size=targets.vocab_size,
            draw_ids=None if targets.draw_ids is None else ids(targets.draw_ids),
            draw_logits=None if targets.draw_logits is None else values(targets.draw_logits),
        )

    def numpy(self) -> Targets:
        """Return the targets as numpy arrays on the host: ids int32, values float32."""

        def array(tensor: Tensor | None, kind: type) -> np.ndarray | None:
            return None if tensor is None else tensor.detach().cpu().numpy().astype(kind, copy=False)

        return Targets(
            ids=array(self.ids, np.int32),  # type: ignore[arg-type]
            logits=array(self.logits, np.float32),  # type: ignore[arg-type]
            tail=array(self.tail, np.float32),  # type: ignore[arg-type]
            label_logit=array(self.label_logit, np.float32),  # type: ignore[arg-type]
            vocab_size=self.vocab_size,
            draw_ids=array(self.draw_ids, np.int32),
            draw_logits=array(self.draw_logits, np.float32),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> "TensorTargets":
        """Return the targets of some positions: a slice, a mask or indices."""
        return self.each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TensorTargets":
        """Return the targets on a device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TensorTargets":
        """Return the targets in page-locked host memory."""
        return self.each(lambda tensor: tensor.pin_memory())

    def each(self, function: Callable[[Tensor], Tensor]) -> "TensorTargets":
        """Return the targets with a function applied to every tensor."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {n: function(v) if isinstance(v, Tensor) else v for n, v in values.items()}
        return TensorTargets(**mapped)

    @staticmethod
    def concatenate(parts: "list[TensorTargets]") -> "TensorTargets":
        """Return the positions of several targets of the same K, M and V, one after the other."""
        first = parts[0]
        joined: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            if isinstance(getattr(first, field.name), Tensor)
            else getattr(first, field.name)
            for field in fields(first)
        }
        return TensorTargets(**joined)

    @property
    def k(self) -> int:
        """K, the number of kept entries."""
        return self.ids.shape[1]

    def tail_log_partition(self, temperature: float) -> Tensor:
        """Return log sum over the tail of exp(z / T) [N]; minus infinity where the tail is empty."""
        b = inverse(temperature)
        size = self.vocab_size - self.k
        if size == 0:
            return torch.full_like(self.label_logit, -torch.inf)
        if self.tail.shape[1] == len(AT_ONE):
            require_at_one(b)
            return self.tail[:, 0] + self.logits[:, -1]
        weights = interpolation_weights(b)
        empty = torch.isneginf(self.tail[:, 0])
        values = self.tail.masked_fill(empty[:, None], 0.0)
        u = values @ values.new_tensor(weights[1:]) + weights[0] * math.log(size)
        if b > NODES[-1]:
            slope = (values[:, -1] - values[:, -2]) / (NODES[-1] - NODES[-2])
            u = u.maximum(values[:, -1] + slope * (b - NODES[-1])).minimum(values[:, -1])
        return (u + b * self.logits[:, -1]).masked_fill(empty, -torch.inf)

    def log_partition(self, temperature: float) -> Tensor:
        """Return log sum over the whole vocabulary of exp(z / T) [N]."""
        head = torch.logsumexp(self.logits * inverse(temperature), dim=-1)
        return torch.logaddexp(head, self.tail_log_partition(temperature))

    def tail_mass(self, temperature: float) -> Tensor:
        """Return the probability [N] of all ids outside the head together, at T."""
        return torch.exp(self.tail_log_partition(temperature) - self.log_partition(temperature))

    def draw_log_proposal(self) -> Tensor:
        """Return the log-probability [N, M] with which each draw was drawn; see `Targets`.

        Raises:
            ValueError: The targets hold no draws.
        """
        if self.draw_logits is None:
            raise ValueError("these targets hold no tail draws")
        at_one = self.draw_logits - self.tail_log_partition(1.0)[:, None]
        at_two = self.draw_logits / 2 - self.tail_log_partition(2.0)[:, None]
        return torch.logaddexp(at_one, at_two) - math.log(2)
