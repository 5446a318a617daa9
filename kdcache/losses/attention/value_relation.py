"""Relations among a sample's positions by its queries, keys or values: widths and head counts may differ.

Legend: `S` samples, `T` positions of a padded sample, `Ds` width of the student, `Dt` of the teacher.
"""

import math

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses.attention import mean_of_rows


def value_relation(student: Tensor, teacher: Tensor, mask: Tensor, *, heads: int = 1) -> Tensor:
    """Return KL(teacher || student) [S] in nats, averaged over the relation heads and the real positions.

    Each side's vectors are split into `heads` relation heads of width d, its own; the relation of a head is
    softmax(X X^T / sqrt(d)) over the real positions. The products run in float32 at least, whatever the
    autocast. Deterministic. Memory: [S, heads, T, T]. Source: MiniLM, Wang et al., 2020, section 3.2, for
    values, where the heads are those of attention; MiniLMv2, Wang et al., 2021, section 3.1, for relation heads
    and for queries and keys, which are passed the same way.

    Args:
        student: [S, T, Ds], vectors of all attention heads side by side.
        teacher: [S, T, Dt].
        mask: bool [S, T], true at real positions.
        heads: Relation heads of both sides; divides both widths.

    Raises:
        ConfigError: `heads` is not positive.
        ValueError: The shapes do not match, a width is not a multiple of `heads`, or the mask is not boolean.
    """
    if heads < 1:
        raise ConfigError(f"value_relation has at least one relation head, not {heads}.", hint="Its default is 1.")
    if student.ndim != 3 or teacher.ndim != 3 or not student.shape[:2] == teacher.shape[:2] == mask.shape:
        shapes = tuple(student.shape), tuple(teacher.shape), tuple(mask.shape)
        raise ValueError(f"vectors and mask of shapes {shapes} do not match")
    if student.shape[2] % heads or teacher.shape[2] % heads:
        raise ValueError(f"widths {student.shape[2]} and {teacher.shape[2]} are not multiples of {heads} heads")
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is boolean, not {mask.dtype}")
    wide = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        log_p, log_q = _log_relation(teacher.to(wide), mask, heads), _log_relation(student.to(wide), mask, heads)
    return mean_of_rows((log_p.exp() * (log_p - log_q)).sum(-1), mask)


def _log_relation(vectors: Tensor, mask: Tensor, heads: int) -> Tensor:
    width = vectors.shape[2] // heads
    split = vectors.masked_fill(~mask[:, :, None], 0).reshape(*mask.shape, heads, width).transpose(1, 2)
    scores = split @ split.mT / math.sqrt(width)
    # the lowest float and not minus infinity: the difference of two of those would be NaN
    lowest = torch.finfo(scores.dtype).min
    return torch.log_softmax(scores.masked_fill(~mask[:, None, None, :], lowest), dim=-1)


plugin = value_relation
