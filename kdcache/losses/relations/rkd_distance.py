"""Relational knowledge distillation by distances: the shape of the cloud of samples, whatever its size.

Legend: `S` samples of a batch, `Ds` width of the student, `Dt` of the teacher.
"""

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kdcache.losses.relations import matched


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over pairs i != j of Huber(|s_i - s_j| / mean, |t_i - t_j| / mean), a scalar.

    Each side's mean distance is that of all S (S - 1) pairs of different samples, so the loss does not change
    when a side is moved, turned, mirrored or scaled. Huber's threshold is 1. In float32 at least; deterministic.
    Two equal samples have distance 0 and no gradient along it; a side without any distance counts as zeros.
    Memory: [S, S, D]. Source: Relational Knowledge Distillation, Park et al., 2019, section 3.2.1; averaged
    where the paper sums. The authors' program divides by S^2 and takes the mean of positive distances only.

    Args:
        student: [S, Ds].
        teacher: [S, Dt].

    Raises:
        ValueError: The sides are not of the same samples.
    """
    student, teacher = matched(student, teacher)
    pairs = max(1, len(student) * (len(student) - 1))
    terms = smooth_l1_loss(_distances(student, pairs), _distances(teacher, pairs), reduction="sum")
    return terms / pairs


def _distances(rows: Tensor, pairs: int) -> Tensor:
    # differences, not inner products: exactly zero for equal rows, and accurate for close ones
    distances: Tensor = torch.linalg.vector_norm(rows[:, None] - rows, dim=-1)
    mean = distances.sum() / pairs
    return distances / mean.masked_fill(mean == 0, torch.inf)


plugin = rkd_distance
