"""Likelihood of spans: the student finds a piece of text as likely as the teacher does, whatever its tokens are."""

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses import FLOOR
from kdcache.losses.spans import Sides, SpanLoss

LEAST = 1e-6
"""Surprise in nats that stands in for none: a probability of exactly 1 has no finite divergence from any other."""


def span_likelihood(sides: Sides, tau: float = 100.0) -> Tensor:
    """Return tau * KL((p', 1 - p') || (q', 1 - q')) [C] in nats, with p' = p ** (1 / tau) and q' = q ** (1 / tau).

    p and q are what teacher and student give the span's text. Each span has two outcomes, this text and any other: of
    what the teacher holds possible instead, the loss says only how much it is. So it needs the label's logit and the
    log-partition of each token, and no row of the teacher.

    At tau = 1 it is the KL of the two outcomes, which hardly sees unlikely text: its gradient has the size of p. As
    tau grows, tau * KL tends to a log(a / b) - a + b in the surprises a = -log p and b = -log q, in which all spans
    count. The factor tau keeps its size; without it the value falls as 1 / tau.

    Source: Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching (ALM), Minixhofer et al., 2025,
    the binarised objective with f = KL. What it is not: the paper's correction for tokens that tell where the next one
    begins (outcome chunk debiasing) is left out, as it needs the teacher's whole rows. So p is the probability of one
    way to write the text, after one way to write what stands before, and only as comparable as the two tokenisations
    are. The factor tau is not the paper's.

    Args:
        sides: Both sides at C spans.
        tau: Softens both outcomes; the paper's experiments take 100.

    Raises:
        ConfigError: tau is not positive.
    """
    if tau <= 0:
        raise ConfigError(f"The tau of span_likelihood is above 0, not {tau}.", hint="The paper takes 100.")
    dtype = torch.promote_types(torch.promote_types(sides.log_p.dtype, sides.log_q.dtype), torch.float32)
    a, b = (_surprise(side.to(dtype)) / tau for side in (sides.log_p, sides.log_q))
    return tau * (torch.exp(-a) * (b - a) - torch.expm1(-a) * (_log_other(a) - _log_other(b)))


def _surprise(log_probability: Tensor) -> Tensor:
    """Return -log p in nats within its limits; the gradient is that of -log p, or a student at p = 1 would stay."""
    nats = -log_probability
    limited = nats.clamp(min=LEAST, max=-FLOOR)
    return torch.where(torch.isinf(nats), limited, nats + (limited - nats).detach())


def _log_other(nats: Tensor) -> Tensor:
    """Return log(1 - exp(-nats)), precise near both ends; each form sees its own side only, or its gradient is NaN."""
    near, far = nats.clamp(max=0.7), nats.clamp(min=0.7)
    return torch.where(nats < 0.7, torch.log(-torch.expm1(-near)), torch.log1p(-torch.exp(-far)))


plugin = SpanLoss(span_likelihood, firsts=False, value="two outcomes a span: its text, or any other")
