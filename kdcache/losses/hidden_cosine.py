"""Cosine distance of hidden states."""

from torch import Tensor
from torch.nn.functional import cosine_similarity


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cos(student, teacher) [N], between 0 and 2, in float32 at least; 1 where one side is zero.

    Args:
        student: [N, D], projected to the teacher's width.
        teacher: [N, D].

    Raises:
        ValueError: The shapes differ: a broadcast would compare each position with every other.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"hidden states of shapes {tuple(student.shape)} and {tuple(teacher.shape)} do not match")
    if student.element_size() < 4:
        student = student.float()
    return 1 - cosine_similarity(student, teacher.to(student.dtype), dim=-1)
