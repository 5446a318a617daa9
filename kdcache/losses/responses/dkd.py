"""Decoupled knowledge distillation: the label's probability apart from the relations among all others."""

import torch
from torch import Tensor

from kdcache.losses import Heads, Pair, Response
from kdcache.losses.divergences.forward_kl import forward_kl
from kdcache.targets import inverse

LEAST_SHARE = 1e-6
"""Of the tail, what is left at least when the label is taken out: the two are not summed alike, to the last bit."""


def dkd(heads: Heads, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """Return alpha * TCKD + beta * NCKD [N] in nats at T.

    TCKD is KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) of the label y; NCKD is KL(teacher || student) among the other
    ids, renormalised without the label. The tail counts as one outcome, less the label where that lies in it.
    So TCKD is exact as far as the teacher's log-partition is, and NCKD a lower bound, exact where K = V: merging
    outcomes never raises a KL. The label's own logit comes from the head where it is there, else from
    `targets.label_logit`; NaN where a teacher did not tell it. Source: Decoupled Knowledge Distillation, Zhao
    et al., 2022, equation 7.

    Args:
        heads: Both sides at N positions, with labels.
        alpha: Weight of the label's term.
        beta: Weight of the others'; the paper takes 1 to 8, larger for a surer teacher.

    Raises:
        MismatchError: The teacher's tail is known at T = 1 only, and this is another.
    """
    heads = heads.wide()
    targets, b = heads.targets, inverse(heads.temperature)
    hit = targets.ids == heads.labels[:, None]
    told = torch.where(hit.any(1), targets.logits.masked_fill(~hit, 0.0).sum(1), targets.label_logit)
    p_label, p_others = _split(targets.logits * b, targets.tail_log_partition(heads.temperature), told * b, hit)
    q_label, q_others = _split(heads.logits * b, heads.rest, heads.label_logit * b, hit)
    return alpha * forward_kl(Pair(p_label, q_label)) + beta * forward_kl(Pair(p_others, q_others))


def _split(head: Tensor, tail: Tensor, label: Tensor, hit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of label and not label [N, 2], and of all outcomes given not label [N, K + 1].

    Args:
        head: [N, K], logits times b.
        tail: [N], log-sum-exp of the others.
        label: [N], the label's logit times b.
        hit: bool [N, K], where in the head the label is; no True where it lies in the tail.
    """
    left = torch.log(-torch.expm1((label - tail).clamp(max=-LEAST_SHARE)))
    tail = torch.where(hit.any(1), tail, tail + left)
    others = torch.cat([head.masked_fill(hit, -torch.inf), tail[:, None]], 1)
    log_others = torch.logsumexp(others, 1)
    return torch.log_softmax(torch.stack([label, log_others], 1), 1), others - log_others[:, None]


plugin = Response(dkd, tempered=True, whole=False, labels=True)
