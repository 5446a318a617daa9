"""Probabilistic knowledge transfer: who is near whom, as conditional probabilities.

Legend: `S` samples of a batch, `Ds` width of the student, `Dt` of the teacher.
"""

import torch
from torch import Tensor

from kdcache.losses.relations import gram, matched, unit

SMALLEST = 1e-7
"""Of the kernel: samples in exactly opposite directions would have a divergence without bound."""


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over samples of KL(teacher || student) in nats, a scalar, of who their neighbours are.

    p(j | i) = K(i, j) / sum over k != i of K(i, k), with K = (1 + cosine) / 2, at least `SMALLEST`. The lengths
    of the features do not matter, nor their rotation. In float32 at least; deterministic. A sample that is zero
    has cosine 0 with all others, without a gradient. Source: Learning Deep Representations with Probabilistic
    Knowledge Transfer, Passalis and Tefas, 2018, section 3: conditional probabilities, cosine kernel and
    divergence, averaged over i where the paper sums. The authors' program counts j = i and divides by S^2.

    Args:
        student: [S, Ds].
        teacher: [S, Dt].

    Raises:
        ValueError: The sides are not of the same samples.
    """
    student, teacher = matched(student, teacher)
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    log_p, log_q = _log_conditional(teacher, itself), _log_conditional(student, itself)
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(itself, 0).sum() / len(student)


def _log_conditional(rows: Tensor, itself: Tensor) -> Tensor:
    rows = unit(rows)
    kernel = ((1 + gram(rows, rows)) / 2).clamp(min=SMALLEST)
    # a sample alone has no others to sum over, and its terms are left out
    total = kernel.masked_fill(itself, 0).sum(1, keepdim=True).clamp(min=SMALLEST)
    return kernel.log() - total.log()


plugin = pkt
