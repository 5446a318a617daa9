"""Universal logit distillation: both sides' probabilities by rank, whatever ids they belong to."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdcache.losses import FLOOR
from kdcache.losses.output_layer import log_partition
from kdcache.losses.spans import Sides, SpanLoss
from kdcache.targets import inverse


def uld(sides: Sides) -> Tensor:
    """Return the L1 distance [C] of the probabilities in descending order, from 0 to 2, where spans begin.

    The whole loss is sum_i |p_(i) - q_(i)| over the ranks i, the shorter vocabulary filled up with zeros. Here the
    teacher's K largest are compared with the student's K largest, and all that either side has left is one outcome:

        sum_{i <= K} |p_(i) - q_(i)|  +  |sum_{i > K} p_(i) - sum_{i > K} q_(i)|

    By the triangle inequality that is a lower bound. It is exact with K = V, and where the student has no more than K
    ids. It compares how probability is shared out, not what it is given to: two sides that are sure of opposite things
    agree. So it is a help beside hard labels, and no loss to train with alone.

    Source: Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs, Boizard et al., 2024,
    the closed form of its Wasserstein distance. The paper pairs the i-th tokens of both sides; here positions that
    predict from the same byte are paired.

    Args:
        sides: Both sides, with `firsts`.

    Raises:
        ValueError: There are no `firsts`.
        MismatchError: The teacher's tail is known at T = 1 only, and this is another.
    """
    if sides.firsts is None:
        raise ValueError("the loss compares what both sides predict where spans begin")
    firsts, b = sides.firsts, inverse(sides.firsts.temperature)
    whole_p = firsts.targets.log_partition(firsts.temperature)[:, None]
    whole_q = log_partition(firsts.logits, firsts.rest, b)[:, None]
    tail = firsts.targets.tail_log_partition(firsts.temperature)[:, None]
    # an empty rest has no gradient of its own, and the exponential of minus infinity would make one of NaN
    rest = firsts.rest[:, None].masked_fill(torch.isneginf(firsts.rest)[:, None], FLOOR)
    p = torch.exp(torch.cat([firsts.targets.logits * b, tail], 1) - whole_p)
    ranked = pad(torch.exp(firsts.logits * b - whole_q), (0, firsts.targets.k - firsts.logits.shape[1]))
    return (p - torch.cat([ranked, torch.exp(rest - whole_q)], 1)).abs().sum(1)


plugin = SpanLoss(uld, firsts=True, value="probabilities by rank: a lower bound, exact with k = V")
