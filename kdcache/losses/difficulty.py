"""How hard a position is, by what the teacher said there: scores that weigh positions or draw samples.

Legend: `N` positions.
"""

from typing import Literal

import torch
from torch import Tensor

from kdcache.losses import FLOOR
from kdcache.targets.tensor import TensorTargets

Score = Literal["teacher_loss", "entropy", "confidence", "margin", "correct"]

OF_LABELS = ("teacher_loss", "correct")
"""Scores that look at the label."""

NOT_CORRECT = 0.1
"""Score of a position where the teacher puts another id than the label first; 1 where it is right."""


def scores(by: Score, targets: TensorTargets, labels: Tensor) -> Tensor:
    """Return the score [N] of every position, all at T = 1.

    `teacher_loss` (nats of the label, at most 10,000; 0 where the teacher did not tell it), `entropy` (nats, see it),
    `confidence` (the largest probability), `margin` (between the two largest probabilities), `correct` (1 where the
    teacher puts the label first, else 0.1).

    Args:
        by: Which score.
        targets: The teacher.
        labels: int64 [N].
    """
    if by == "entropy":
        return entropy(targets)
    whole = targets.log_partition(1.0)
    if by == "teacher_loss":
        # a label that it holds impossible counts as everywhere else: not without limit
        return (whole - targets.label_logit).nan_to_num(0.0, posinf=-FLOOR)
    if by == "correct":
        return torch.where(targets.ids[:, 0] == labels, 1.0, NOT_CORRECT)
    p = (targets.logits - whole[:, None]).exp()
    if by == "margin" and p.shape[1] > 1:
        return p[:, 0] - p[:, 1]
    return p[:, 0]


def entropy(targets: TensorTargets) -> Tensor:
    """Return the teacher's entropy [N] at T = 1 in nats, its tail as one outcome: a lower bound, exact where K = V."""
    whole = targets.log_partition(1.0)
    tail = targets.tail_log_partition(1.0) - whole
    both = torch.cat([targets.logits - whole[:, None], tail[:, None]], 1).clamp(min=-1e4)
    return -(both.exp() * both).sum(1)
