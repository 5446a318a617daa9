"""Mean squared error of attention maps, or of the scores before their softmax.

Legend: `S` samples, `T` positions of a padded sample, `Hs` heads of the student, `Ht` of the teacher.
"""

from torch import Tensor

from kdcache.losses.attention import maps


def map_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, per_head: bool = False) -> Tensor:
    """Return the squared difference [S], averaged over the real queries and keys, and the heads if `per_head`.

    In float32 at least; deterministic. Source: TinyBERT, Jiao et al., 2020, section 3.1, which compares the
    scores before the softmax head by head. Scores between real positions must be finite: a causal mask's minus
    infinity has no difference, so give maps of such models.

    Args:
        student: [S, Hs, T, T]: sample, head, query, key.
        teacher: [S, Ht, T, T].
        mask: bool [S, T], true at real positions.
        per_head: Compare head by head; otherwise the means over each side's heads.

    Raises:
        ValueError: The shapes do not match; the head counts matter only if `per_head`.
    """
    student, teacher = maps(student, teacher, mask, per_head=per_head)
    real = mask.sum(1).clamp(min=1)
    return (student - teacher).square().sum((2, 3)).mean(1) / real.square()


plugin = map_mse
