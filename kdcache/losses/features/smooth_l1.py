"""Smooth L1 distance of features: a few channels of huge activations do not drown the others.

Legend: `N` rows, `D` width.
"""

from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kdcache.errors import ConfigError
from kdcache.losses.features import matched


def smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Return the smooth absolute difference [N] averaged over the width, in float32 at least.

    A difference d counts d^2 / (2 beta) where |d| < beta, else |d| - beta / 2: value and slope are continuous.
    Deterministic. Source: Fast R-CNN, Girshick, 2015, equation 3, whose beta is 1.

    Args:
        student: [N, D], projected to the teacher's width.
        teacher: [N, D].
        beta: Where the square turns into a line, in units of the features; 0 is the absolute difference.

    Raises:
        ConfigError: beta is negative.
        ValueError: The shapes differ.
    """
    if beta < 0:
        raise ConfigError(f"The beta of smooth_l1 is not negative, unlike {beta}.", hint="Its default is 1.0.")
    student, teacher = matched(student, teacher)
    return smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(-1)


plugin = smooth_l1
