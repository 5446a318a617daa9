"""Adaptive Kullback-Leibler divergence: forward and reverse, weighed by where the student is further off."""

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses import Pair
from kdcache.losses.divergences.forward_kl import forward_kl
from kdcache.losses.divergences.reverse_kl import reverse_kl


def adaptive_kl(pair: Pair, mu: float = 0.5) -> Tensor:
    """Return share * KL(p || q) + (1 - share) * KL(q || p) [N] in nats; p is the teacher.

    The share is what the teacher's likeliest outcomes hold of the sum of |p - q|: those outcomes, by descending
    p, whose probabilities add up to `mu` at most, and the likeliest in any case. It is a constant to the
    gradient. Where both sides agree it is 0, and so is the value.

    Exact over all outcomes. Not an f-divergence, because the share is a ratio that depends on which outcomes
    are listed: with the tail as one bucket the value is no bound (that bucket is one outcome, even the
    likeliest), and over weighted draws it is not unbiased, though it tends to the exact value with their
    number. Ties go by the order in the list. Source: Rethinking Kullback-Leibler Divergence in
    Knowledge Distillation for Large Language Models (AKL), Wu et al., 2024, and its code for what is head.

    Raises:
        ConfigError: mu is not between 0 and 1.
    """
    if not 0 <= mu <= 1:
        raise ConfigError(f"The mu of adaptive_kl lies between 0 and 1, not at {mu}.", hint="The paper takes 0.5.")
    with torch.no_grad():
        share = _share(pair, mu)
    return share * forward_kl(pair) + (1 - share) * reverse_kl(pair)


def _share(pair: Pair, mu: float) -> Tensor:
    p, order = pair.log_p.exp().sort(dim=1, descending=True, stable=True)
    gaps = (p - pair.log_q.exp().gather(1, order)).abs()
    if pair.weight is not None:
        weight = pair.weight.gather(1, order)
        p, gaps = p * weight, gaps * weight
    likeliest = p.cumsum(1) <= mu
    likeliest[:, 0] = True
    whole = gaps.sum(1)
    return (gaps * likeliest).sum(1) / whole.masked_fill(whole == 0, 1.0)


plugin = adaptive_kl
