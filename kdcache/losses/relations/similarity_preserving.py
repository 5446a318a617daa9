"""Similarity-preserving distillation: samples that are alike to the teacher are alike to the student.

Legend: `S` samples of a batch, `Ds` width of the student, `Dt` of the teacher.
"""

from torch import Tensor

from kdcache.losses.relations import gram, matched, unit


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Return |G_S - G_T|^2 / S^2, a scalar: G holds all inner products of a side's samples, each row at length 1.

    The norm is Frobenius'. The loss does not change when a side is turned, mirrored or scaled; it does when one
    is moved. In float32 at least; deterministic. The row of a sample that is zero stays zero, without a
    gradient. Source: Similarity-Preserving Knowledge Distillation, Tung and Mori, 2019, section 3.

    Args:
        student: [S, Ds], activations of a sample flattened.
        teacher: [S, Dt].

    Raises:
        ValueError: The sides are not of the same samples.
    """
    student, teacher = matched(student, teacher)
    return (unit(gram(student, student)) - unit(gram(teacher, teacher))).square().mean()


plugin = similarity_preserving
