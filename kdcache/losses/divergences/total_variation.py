"""Total variation distance: the largest difference of the two probabilities of any event."""

from torch import Tensor

from kdcache.losses import Pair


def total_variation(pair: Pair) -> Tensor:
    """Return half the sum of |p - q| [N], between 0 and 1 (a probability, not nats).

    An f-divergence: exact over all outcomes, a lower bound where the tail is one bucket, unbiased over weighted
    draws. Its gradient does not shrink towards p = q, where it has a kink (the gradient at exact agreement is
    0), so over draws the gradient stays noisy once the student agrees. Source: f-Divergence Minimization for
    Sequence-Level Knowledge Distillation, Wen et al., 2023.
    """
    pair = pair.finite()
    return pair.total((pair.log_p.exp() - pair.log_q.exp()).abs()) / 2


plugin = total_variation
