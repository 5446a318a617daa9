"""DIST: correlation instead of divergence, so that a much stronger teacher asks for relations only."""

import torch
from torch import Tensor

from kdcache.losses import Heads, Response
from kdcache.targets import inverse


def dist(heads: Heads, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Return beta * inter + gamma * intra [N], both between 0 and 2 and without unit.

    inter is 1 - the Pearson correlation of a position's two softmaxes at T. intra is the same over the N
    positions for each class, averaged over the classes: one number, added to each position so that the mean
    over N is right. It relates the positions of one call: micro-batches do not add up to one large batch, and
    a single position has none. Exact (K = V). A correlation of which neither side varies counts as agreement,
    0; of which one does not, 1/2. Source: Knowledge Distillation from A Stronger Teacher, Huang et al., 2022,
    section 4.

    Args:
        heads: Both sides at N positions.
        beta: Weight of the relations between classes, a position each.
        gamma: Weight of the relations between positions, a class each.

    Raises:
        MismatchError: K < V.
    """
    heads.require_whole()
    heads = heads.wide()
    b = inverse(heads.temperature)
    p, q = torch.softmax(heads.targets.logits * b, 1), torch.softmax(heads.logits * b, 1)
    ids = heads.targets.ids.long()
    inter = beta * _uncorrelated(p, q, 1)
    if gamma == 0 or len(p) < 2:
        return inter
    p, q = (torch.zeros_like(side).scatter(1, ids, side) for side in (p, q))
    return inter + gamma * _uncorrelated(p, q, 0).mean()


def _uncorrelated(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return 1 - Pearson correlation along a dimension: half the squared distance, which is exact near 0."""
    return (_standardise(x, dim) - _standardise(y, dim)).square().sum(dim) / 2


def _standardise(x: Tensor, dim: int) -> Tensor:
    """Return x less its mean, at length 1 along a dimension; about 0 where x varies by rounding alone."""
    centred = x - x.mean(dim, keepdim=True)
    # tiny probabilities would underflow when squared
    largest = centred.detach().abs().amax(dim, keepdim=True)
    varies = largest > 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim, keepdim=True)
    centred = centred / largest.where(varies, torch.ones_like(largest))
    # the length of what varies is above 1 now
    return centred / centred.square().sum(dim, keepdim=True).clamp(min=0.5).sqrt()


plugin = Response(dist, tempered=True, whole=True, labels=False)
