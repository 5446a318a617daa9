"""Relational knowledge distillation by angles: the angle at each sample between every two others.

Legend: `S` samples of a batch, `Ds` width of the student, `Dt` of the teacher.
"""

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kdcache.losses.relations import gram, matched, unit


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over triplets of Huber(cos at s_j of s_i and s_k, cos at t_j of t_i and t_k), a scalar.

    The mean is over the S (S - 1) (S - 2) ordered triplets of different samples; Huber's threshold is 1. It
    does not change when a side is moved, turned, mirrored or scaled. In float32 at least; deterministic. Where
    two samples of a triplet are equal there is no angle: its cosine counts as 0, without a gradient. Memory:
    [S, S, D] and [S, S, S]. Source: Relational Knowledge Distillation, Park et al., 2019, section 3.2.2;
    averaged where the paper sums. The authors' program divides by S^3 instead.

    Args:
        student: [S, Ds].
        teacher: [S, Dt].

    Raises:
        ValueError: The sides are not of the same samples.
    """
    student, teacher = matched(student, teacher)
    samples = len(student)
    terms = smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none")
    # i = j and k = j are zero on both sides; i = k is one angle of nothing unless two samples are equal
    one = torch.eye(samples, dtype=torch.bool, device=terms.device)
    return terms.masked_fill(one, 0).sum() / max(1, samples * (samples - 1) * (samples - 2))


def _cosines(rows: Tensor) -> Tensor:
    towards = unit(rows - rows[:, None])
    return gram(towards, towards)


plugin = rkd_angle
