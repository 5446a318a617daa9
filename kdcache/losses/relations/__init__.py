"""Losses on how the samples of a batch relate to each other: pure functions of two matrices of features.

Legend: `S` samples of a batch, `Ds` width of the student, `Dt` of the teacher, `M` rows.

    rkd_distance            distances of pairs, in units of their mean
    rkd_angle               cosines of the angles of triplets
    similarity_preserving   rows of the matrix of inner products
    pkt                     conditional probabilities of neighbours
    cka                     1 - linear centred kernel alignment
    crd                     each sample against all others; the widths must agree

Relations have no width, so the student needs no projector, except for `crd`. Every loss is a mean, so its size
does not grow with the batch. One file is one loss; others come from entry points of the group
`kdcache.losses.relations`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from kdcache import registry


class RelationLoss(Protocol):
    """What `find` returns."""

    def __call__(self, student: Tensor, teacher: Tensor, /, **tensors: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar tensor in float32 at least, differentiable.

        0, with a gradient of 0, where a batch has too few samples to have relations.

        Args:
            student: [S, Ds].
            teacher: [S, Dt].
            tensors: What a loss needs of each batch besides, such as the `negatives` of `crd`.
        """


def matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides in the student's dtype, or float32 where that is narrower.

    Raises:
        ValueError: The sides are not matrices with one row for each of the same S samples.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) == 0:
        raise ValueError(f"samples of shapes {tuple(student.shape)} and {tuple(teacher.shape)} do not match")
    wide = torch.promote_types(student.dtype, torch.float32)
    return student.to(wide), teacher.to(wide)


def unit(rows: Tensor) -> Tensor:
    """Return the rows [..., D] at length one; a row of zeros stays as it is and has no gradient."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    # dividing by infinity gives zero in the value and in both gradients, where 1 / 0 would give NaN
    return rows / norm.masked_fill(norm == 0, torch.inf)


def gram(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products [..., S, M] of rows [..., S, D] and [..., M, D], whatever the autocast."""
    with torch.autocast(left.device.type, enabled=False):
        products: Tensor = left @ right.mT
    return products


def find(name: str, /, **parameters: Any) -> RelationLoss:
    """Return the relation loss of that name with its parameters set, such as `find("crd", temperature=0.1)`.

    Raises:
        ConfigError: There is no such loss, or it has no such parameter.
    """
    return registry.bound(registry.find(__name__, name), f"relation loss {name}", 2, parameters)


__all__ = ["RelationLoss", "find", "gram", "matched", "unit"]
