"""Attention transfer: where in the image, or in the row, the activations are large; channels need not agree.

Legend: `N` samples, `C` channels (each model its own), `H` height, `W` width, `D` width of a row.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Return |Q_S / |Q_S| - Q_T / |Q_T||^2 [N], between 0 and 2, in float32 at least.

    Q of a feature map is the mean of its squares over the channels, one number a place; Q of a row is its
    squares. So neither the scale nor the sign of the activations matters. A side that is zero everywhere stays
    zero and has no gradient. Deterministic. Source: Paying More Attention to Attention, Zagoruyko and
    Komodakis, 2017, section 3.1, equation 2, with the squared distance of the authors' program, but summed over
    the places where that averages.

    Args:
        student: [N, C, H, W], or [N, D].
        teacher: [N, C, H, W] with other channels if need be, or [N, D].

    Raises:
        ValueError: The sides differ in more than their channels, or are neither maps nor rows.
    """
    outer = [(len(side), *side.shape[2:]) if side.ndim == 4 else side.shape for side in (student, teacher)]
    if student.ndim not in (2, 4) or student.ndim != teacher.ndim or outer[0] != outer[1]:
        raise ValueError(f"activations of shapes {tuple(student.shape)} and {tuple(teacher.shape)} do not match")
    wide = torch.promote_types(student.dtype, torch.float32)
    return (_attention(student.to(wide)) - _attention(teacher.to(wide))).square().sum(1)


def _attention(activations: Tensor) -> Tensor:
    squares = activations.square()
    return normalize(squares.mean(1).flatten(1) if squares.ndim == 4 else squares, dim=1)


plugin = attention_transfer
