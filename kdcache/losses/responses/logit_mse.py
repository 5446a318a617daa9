"""Mean squared error of logits."""

from torch import Tensor

from kdcache.losses import Heads, Response


def logit_mse(heads: Heads, center: bool = True) -> Tensor:
    """Return the squared difference of raw logits [N] averaged over the K kept ids, in squared nats.

    The temperature plays no part. Exact where K = V; else it is over the head alone, neither a bound nor an
    estimate of the mean over all ids. The teacher's logits are finite: a masked id costs infinity. Source:
    Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation, Kim et al.,
    2021, which sums instead of averaging and does not centre.

    Args:
        heads: Both sides at N positions.
        center: Subtract from both sides their mean over the kept ids: a softmax ignores a constant added to a
            row's logits, and the student need not imitate the teacher's.
    """
    heads = heads.wide()
    gap = heads.logits - heads.targets.logits
    if center:
        gap = gap - gap.mean(1, keepdim=True)
    return gap.square().mean(1)


plugin = Response(logit_mse, tempered=False, whole=False, labels=False)
