"""Generalised Jensen-Shannon divergence: bounded, between forward and reverse Kullback-Leibler."""

import math

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses import Pair


def jsd(pair: Pair, beta: float = 0.5) -> Tensor:
    """Return JSD(beta) [N] in nats: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    p is the teacher. Divided by beta it tends to the forward KL as beta goes to 0; divided by 1 - beta, to
    the reverse KL as beta goes to 1. At 0.5 it is at most log 2. Exact over all outcomes, a lower bound where
    the tail is one bucket, unbiased over weighted draws. Source: On-Policy Distillation of Language Models
    (GKD), Agarwal et al., 2024, section 2.

    Raises:
        ConfigError: beta is not strictly between 0 and 1, where the divergence would vanish.
    """
    if not 0 < beta < 1:
        raise ConfigError(
            f"The beta of jsd lies strictly between 0 and 1, not at {beta}.",
            hint="Use forward_kl or reverse_kl for the two ends.",
        )
    pair = pair.finite()
    p, q = pair.log_p.exp(), pair.log_q.exp()
    log_m = torch.logaddexp(pair.log_p + math.log(beta), pair.log_q + math.log1p(-beta))
    return pair.total(beta * p * (pair.log_p - log_m) + (1 - beta) * q * (pair.log_q - log_m))


plugin = jsd
