"""Mean squared error of hidden states."""

from torch import Tensor


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference [N] averaged over the width, in float32 at least.

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
    return (student - teacher.to(student.dtype)).square().mean(-1)
