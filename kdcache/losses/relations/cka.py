"""Centred kernel alignment: how alike two representations are, up to rotation and scale.

Legend: `S` samples of a batch, `Ds` width of the student, `Dt` of the teacher.
"""

from torch import Tensor

from kdcache.losses.relations import gram, matched, unit


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - CKA with the linear kernel, a scalar between 0 and 1.

    CKA = <K, L> / (|K| |L|) with K and L the inner products of each side's centred samples; computed as half
    the squared distance of K / |K| and L / |L|, which is the same and loses no digits near agreement. It does
    not change when a side is moved, turned, mirrored or scaled. In float32 at least; deterministic. A side whose
    samples are all equal has no CKA: the loss is 1, or 0 if the other's are too, without a gradient. Biased
    upwards for few samples, as CKA is: compare values of one batch size only. Source: Similarity of Neural
    Network Representations Revisited, Kornblith et al., 2019, section 3.

    Args:
        student: [S, Ds].
        teacher: [S, Dt].

    Raises:
        ValueError: The sides are not of the same samples.
    """
    student, teacher = matched(student, teacher)
    ours, theirs = _kernel(student), _kernel(teacher)
    # one side alone brings only its own half of the distance
    one_sided = ours.any() != theirs.any()
    return (ours - theirs).square().sum() / 2 * (1 + one_sided)


def _kernel(rows: Tensor) -> Tensor:
    # the mean of equal rows is not exactly that row, so a row is taken off first: what is left is exactly zero
    rows = rows - rows[:1].detach()
    rows = rows - rows.mean(0)
    return unit(gram(rows, rows).flatten())


plugin = cka
