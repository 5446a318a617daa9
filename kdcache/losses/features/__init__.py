"""Losses on features, position by position or sample by sample: pure functions of two tensors of activations.

Legend: `N` rows (positions or samples), `D` width, `C` channels, `H` height, `W` width of a feature map.

    mse                  squared difference, averaged over the width
    cosine               1 - cosine of the angle
    smooth_l1            squared near zero, absolute beyond: outliers count less
    attention_transfer   squared distance of normalised squared activations; the channels may differ

The student's side comes projected to the teacher's width (`kdcache.losses.projector`), except where a loss says
otherwise. Nothing here masks, averages over rows or weighs terms: that is done once, by training. One file is
one loss; others come from entry points of the group `kdcache.losses.features`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kdcache import registry

EPSILON = 1e-5
"""Added to a variance before its root, so that a channel that never varies is not divided by zero."""


class FeatureLoss(Protocol):
    """What `find` returns."""

    def __call__(self, student: Tensor, teacher: Tensor, /) -> Tensor:
        """Return the loss [N] of every row of two tensors [N, D], in float32 at least, differentiable."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of every channel over a whole store, to normalise the teacher's features by.

    Attributes:
        mean: [D].
        variance: [D], mean squared deviation; not negative.

    Raises:
        ValueError: The two are not vectors of one width.
    """

    mean: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.variance.shape:
            shapes = tuple(self.mean.shape), tuple(self.variance.shape)
            raise ValueError(f"mean and variance are two vectors of one width, not of shapes {shapes}")

    def normalise(self, values: Tensor) -> Tensor:
        """Return (values - mean) / sqrt(variance + `EPSILON`), [..., D] as given, in float32 at least.

        Raises:
            ValueError: The last axis of the values is not D.
        """
        if values.shape[-1:] != self.mean.shape:
            raise ValueError(f"values {tuple(values.shape)} and moments of width {len(self.mean)} do not match")
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return (values - self.mean.to(values)) * torch.rsqrt(self.variance.to(values) + EPSILON)


def matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides in the student's dtype, or float32 where that is narrower.

    Raises:
        ValueError: The shapes differ: a broadcast would compare each row with every other.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"features of shapes {tuple(student.shape)} and {tuple(teacher.shape)} do not match")
    if student.element_size() < 4:
        student = student.float()
    return student, teacher.to(student.dtype)


def find(name: str, /, **parameters: Any) -> FeatureLoss:
    """Return the feature loss of that name with its parameters set, such as `find("smooth_l1", beta=0.5)`.

    Raises:
        ConfigError: There is no such loss, or it has no such parameter.
    """
    return registry.bound(registry.find(__name__, name), f"feature loss {name}", 2, parameters)


__all__ = ["EPSILON", "FeatureLoss", "Moments", "find", "matched"]
