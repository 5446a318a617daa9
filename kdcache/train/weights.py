"""How much each position counts: hard or easy ones more, by what the teacher said or by the student's own loss.

Legend: `N` counted positions.

Weights are scaled to a mean of 1 over the batch, so that they shift attention and not the learning rate.
"""

import torch
from torch import Tensor

from kdcache.losses.difficulty import scores
from kdcache.targets.tensor import TensorTargets
from kdcache.train.config import WeightConfig


def position_weights(
    config: WeightConfig, targets: TensorTargets | None, labels: Tensor, student_loss: Tensor
) -> Tensor:
    """Return the weights [N], without gradient: score ** power, scaled to a mean of 1.

    The scores are those of `kdcache.losses.difficulty`, and `student_loss`: the student's own cross-entropy, as it is
    now. A negative power makes large scores count less.

    Args:
        config: By which score.
        targets: The teacher, where the score is its.
        labels: int64 [N].
        student_loss: [N], the student's cross-entropy.
    """
    with torch.no_grad():
        if config.by == "student_loss":
            score = student_loss.detach()
        else:
            assert targets is not None  # training has asked for them
            score = scores(config.by, targets, labels)
        weight = score.float().clamp(min=1e-3) ** config.power
        return weight / weight.mean().clamp(min=1e-12)
