"""Losses on attention, sample by sample: maps, and the relations of queries, keys or values.

Legend: `S` samples, `T` positions of a padded sample, `Hs` heads of the student, `Ht` of the teacher, `H` of
both, `Ds` width of the student, `Dt` of the teacher.

    map_kl           divergence of attention maps (probabilities)
    map_mse          squared difference of attention maps or scores
    value_relation   divergence of who is like whom among the positions; widths and head counts may differ

A mask [S, T] is true at real positions. What stands at the others, on either side, changes neither a value nor a
gradient; a sample without real positions has loss 0. Nothing here averages over samples or weighs terms: that is
done once, by training. One file is one loss; others come from entry points of the group
`kdcache.losses.attention`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from kdcache import registry


class AttentionLoss(Protocol):
    """What `find` returns."""

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, /) -> Tensor:
        """Return the loss [S] of every sample, in float32 at least, differentiable.

        Args:
            student: Maps [S, Hs, T, T], or vectors [S, T, Ds] for `value_relation`.
            teacher: [S, Ht, T, T], or [S, T, Dt].
            mask: bool [S, T], true at real positions.
        """


def maps(student: Tensor, teacher: Tensor, mask: Tensor, *, per_head: bool) -> tuple[Tensor, Tensor]:
    """Return both sides' maps with zeros in rows and columns of padding: [S, H, T, T], or [S, 1, T, T] of means.

    Both are in the student's dtype, or float32 where that is narrower.

    Args:
        student: [S, Hs, T, T]: sample, head, query, key.
        teacher: [S, Ht, T, T].
        mask: bool [S, T].
        per_head: Keep the heads, which must then be as many; otherwise the mean over each side's heads.

    Raises:
        ValueError: The shapes do not match, or the mask is not boolean.
    """
    square = [(len(side), *side.shape[2:]) for side in (student, teacher) if side.ndim == 4]
    if square != 2 * [(*mask.shape, *mask.shape[1:])] or (per_head and student.shape != teacher.shape):
        shapes = tuple(student.shape), tuple(teacher.shape), tuple(mask.shape)
        raise ValueError(f"maps and mask of shapes {shapes} do not match{' head by head' if per_head else ''}")
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is boolean, not {mask.dtype}")
    wide = torch.promote_types(student.dtype, torch.float32)
    padding = ~(mask[:, None, :, None] & mask[:, None, None, :])
    student, teacher = (side.to(wide).masked_fill(padding, 0) for side in (student, teacher))
    return (student, teacher) if per_head else (student.mean(1, keepdim=True), teacher.mean(1, keepdim=True))


def mean_of_rows(terms: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [S] of one term a query [S, H, T] over heads and real positions; 0 where there are none."""
    return terms.mean(1).masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)


def find(name: str, /, **parameters: Any) -> AttentionLoss:
    """Return the attention loss of that name with its parameters set, such as `find("map_kl", per_head=True)`.

    Raises:
        ConfigError: There is no such loss, or it has no such parameter.
    """
    return registry.bound(registry.find(__name__, name), f"attention loss {name}", 3, parameters)


__all__ = ["AttentionLoss", "find", "maps", "mean_of_rows"]
