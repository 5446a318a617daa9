"""Divergence of attention maps: each query's distribution over the keys.

Legend: `S` samples, `T` positions of a padded sample, `Hs` heads of the student, `Ht` of the teacher.
"""

from torch import Tensor

from kdcache.losses.attention import maps, mean_of_rows

SMALLEST = 1e-12
"""Probability below which a logarithm goes no further down, so that no divergence is infinite."""


def map_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, per_head: bool = False) -> Tensor:
    """Return KL(teacher || student) [S] in nats, averaged over the real queries, and the heads if `per_head`.

    Padding is left out and each row rescaled to sum to one over the real keys, which also undoes the rounding of
    maps stored in half precision. Keys that a causal mask forbids are zero on both sides and count nothing; a
    key that only the student holds impossible costs up to p log(p / `SMALLEST`), without a gradient of its own.
    In float32 at least; deterministic. Source: MiniLM, Wang et al., 2020, section 3.1.

    Args:
        student: [S, Hs, T, T]: sample, head, query, key; probabilities.
        teacher: [S, Ht, T, T].
        mask: bool [S, T], true at real positions.
        per_head: Compare head by head; otherwise the means over each side's heads.

    Raises:
        ValueError: The shapes do not match; the head counts matter only if `per_head`.
    """
    q, p = maps(student, teacher, mask, per_head=per_head)
    q, p = _rescaled(q), _rescaled(p)
    terms = p * (p.clamp(min=SMALLEST).log() - q.clamp(min=SMALLEST).log())
    return mean_of_rows(terms.sum(-1), mask)


def _rescaled(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True).clamp(min=SMALLEST)


plugin = map_kl
