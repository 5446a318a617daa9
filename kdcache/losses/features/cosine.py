"""Cosine distance of features.

Legend: `N` rows, `D` width.
"""

from torch import Tensor
from torch.nn.functional import cosine_similarity

from kdcache.losses.features import matched


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cos(student, teacher) [N], between 0 and 2, in float32 at least; 1 where one side is zero.

    Deterministic. Source: DistilBERT, Sanh et al., 2019, section 2.

    Args:
        student: [N, D], projected to the teacher's width.
        teacher: [N, D].

    Raises:
        ValueError: The shapes differ.
    """
    student, teacher = matched(student, teacher)
    return 1 - cosine_similarity(student, teacher, dim=-1)


plugin = cosine
