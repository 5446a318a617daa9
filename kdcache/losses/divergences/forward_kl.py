"""Forward Kullback-Leibler divergence: the student covers all that the teacher holds possible."""

from torch import Tensor

from kdcache.losses import Pair


def forward_kl(pair: Pair) -> Tensor:
    """Return KL(teacher || student) [N] in nats.

    Summed as `p log(p / q) - p + q`. The last two terms cancel over all outcomes, so the value is the
    textbook one; but every term is non-negative and flat at p = q, so a sum over weighted draws has neither
    a negative value nor gradient noise once the student agrees with the teacher. Exact over all outcomes, a
    lower bound where the tail is one bucket, unbiased over weighted draws.
    """
    pair = pair.finite()
    p, q = pair.log_p.exp(), pair.log_q.exp()
    return pair.total(p * (pair.log_p - pair.log_q) - p + q)


plugin = forward_kl
