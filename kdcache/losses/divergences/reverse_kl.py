"""Reverse Kullback-Leibler divergence: the student stays where the teacher has mass."""

from torch import Tensor

from kdcache.losses import Pair


def reverse_kl(pair: Pair) -> Tensor:
    """Return KL(student || teacher) [N] in nats.

    Summed as `q log(q / p) - q + p`, for the reason given at `forward_kl`. An outcome that the teacher holds
    impossible costs q times minus `FLOOR`: large, not infinite. Exact over all outcomes, a lower bound where the
    tail is one bucket, unbiased over weighted draws.
    """
    pair = pair.finite()
    p, q = pair.log_p.exp(), pair.log_q.exp()
    return pair.total(q * (pair.log_q - pair.log_p) - q + p)


plugin = reverse_kl
