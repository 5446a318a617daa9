"""Skewed reverse Kullback-Leibler divergence: reverse, against a teacher mixed with a little of the student."""

from torch import Tensor

from kdcache.losses import Pair
from kdcache.losses.divergences.skew_kl import skew_kl


def skew_reverse_kl(pair: Pair, skew: float = 0.1) -> Tensor:
    """Return KL(q || m) [N] in nats, m = (1 - skew) p + skew q; p is the teacher. At most -log(skew).

    `skew_kl` with the sides exchanged. Tends to the reverse KL as the skew goes to 0, and unlike it stays small
    where the teacher holds an outcome impossible. An f-divergence: exact over all outcomes, a lower bound where
    the tail is one bucket, unbiased over weighted draws. Source: DistiLLM, Ko et al., 2024, section 3.1.

    Raises:
        ConfigError: The skew is not strictly between 0 and 1.
    """
    pair = pair.finite()
    return skew_kl(Pair(pair.log_q, pair.log_p, pair.weight), skew)


plugin = skew_reverse_kl
