"""Mean squared error of features.

Legend: `N` rows, `D` width.
"""

from torch import Tensor

from kdcache.losses.features import matched


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference [N] averaged over the width, in float32 at least. Deterministic.

    Source: the hint loss of FitNets, Romero et al., 2015, equation 3, averaged instead of summed.

    Args:
        student: [N, D], projected to the teacher's width.
        teacher: [N, D].

    Raises:
        ValueError: The shapes differ.
    """
    student, teacher = matched(student, teacher)
    return (student - teacher).square().mean(-1)


plugin = mse
