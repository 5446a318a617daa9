"""Skewed Kullback-Leibler divergence: forward, against a student mixed with a little of the teacher."""

import math

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses import Pair


def skew_kl(pair: Pair, skew: float = 0.1) -> Tensor:
    """Return KL(p || m) [N] in nats, m = skew p + (1 - skew) q; p is the teacher. At most -log(skew).

    Tends to the forward KL as the skew goes to 0. An f-divergence: exact over all outcomes, a lower bound where
    the tail is one bucket, unbiased over weighted draws. Summed as `p log(p / m) - p + m`, for the reason given
    at `forward_kl`. Source: DistiLLM, Ko et al., 2024, section 3.1.

    Raises:
        ConfigError: The skew is not strictly between 0 and 1.
    """
    if not 0 < skew < 1:
        raise ConfigError(
            f"The skew of a divergence lies strictly between 0 and 1, not at {skew}.",
            hint="Use forward_kl or reverse_kl for 0; at 1 the divergence vanishes.",
        )
    pair = pair.finite()
    p, q = pair.log_p.exp(), pair.log_q.exp()
    log_m = torch.logaddexp(pair.log_p + math.log(skew), pair.log_q + math.log1p(-skew))
    return pair.total(p * (pair.log_p - log_m) + (1 - skew) * (q - p))


plugin = skew_kl
