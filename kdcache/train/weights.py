"""How much each position counts: hard or easy ones more, by what the teacher said or by the student's own loss.

Legend: `N` counted positions.

Weights are scaled to a mean of 1 over the batch, so that they shift attention and not the learning rate.
"""

import torch
from torch import Tensor

from kdcache.targets.tensor import TensorTargets
from kdcache.train.config import WeightConfig
from kdcache.train.temperature import entropy


def position_weights(
    config: WeightConfig, targets: TensorTargets | None, labels: Tensor, student_loss: Tensor
) -> Tensor:
    """Return the weights [N], without gradient: score ** power, scaled to a mean of 1.

    The scores: `teacher_loss` (nats of the label), `entropy` (nats, of the head and the tail as one outcome),
    `confidence` (the largest probability), `margin` (between the two largest probabilities), `correct` (1 where the
    teacher puts the label first, else 0.1), `student_loss` (the student's own cross-entropy, as it is now). A negative
    power makes large scores count less.

    Args:
        config: By which score.
        targets: The teacher, where the score is its.
        labels: int64 [N].
        student_loss: [N], the student's cross-entropy.
    """
    with torch.no_grad():
        score = student_loss.detach() if config.by == "student_loss" else _score(config.by, targets, labels)
        weight = score.float().clamp(min=1e-3) ** config.power
        return weight / weight.mean().clamp(min=1e-12)


def _score(by: str, targets: TensorTargets | None, labels: Tensor) -> Tensor:
    assert targets is not None  # training has asked for them
    whole = targets.log_partition(1.0)
    if by == "teacher_loss":
        return (whole - targets.label_logit).nan_to_num(0.0)
    if by == "entropy":
        return entropy(targets)
    log_p = targets.logits - whole[:, None]
    if by == "correct":
        return torch.where(targets.ids[:, 0] == labels, 1.0, 0.1)
    p = log_p.exp()
    if by == "margin" and p.shape[1] > 1:
        return p[:, 0] - p[:, 1]
    return p[:, 0]
