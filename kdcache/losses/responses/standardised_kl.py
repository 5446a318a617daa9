"""Kullback-Leibler divergence of standardised logits: the student imitates relations, not magnitudes."""

import torch
from torch import Tensor

from kdcache.losses import Heads, Pair, Response
from kdcache.losses.divergences.forward_kl import forward_kl
from kdcache.targets import inverse

LEAST_VARIANCE = 1e-12
"""Of a row of logits, in squared nats: a row that is flat up to rounding stays flat."""


def standardised_kl(heads: Heads) -> Tensor:
    """Return KL(teacher || student) [N] in nats at T, after each row of logits is standardised.

    A row is shifted to mean 0 and scaled to standard deviation 1 (dividing by K) over the kept ids, so any
    positive scale and any shift of the student's logits is free; T is the base temperature that follows. Exact
    where K = V; else it is over the head alone, both sides renormalised: neither a bound nor an estimate.
    Masked ids within the head would rule the deviation: leave them out of it. Source: Logit Standardization in
    Knowledge Distillation, Sun et al., 2024, algorithm 1; its code divides by K - 1, which changes T by a
    constant factor.
    """
    heads = heads.wide()
    b = inverse(heads.temperature)
    log_p, log_q = (torch.log_softmax(_standardise(z) * b, 1) for z in (heads.targets.logits, heads.logits))
    return forward_kl(Pair(log_p, log_q))


def _standardise(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(1, keepdim=True)
    return centred * centred.square().mean(1, keepdim=True).clamp(min=LEAST_VARIANCE).rsqrt()


plugin = Response(standardised_kl, tempered=True, whole=False, labels=False)
