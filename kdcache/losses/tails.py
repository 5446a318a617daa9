"""What a loss does about the ids outside the head: four policies, each with what it promises.

Legend: `N` positions, `K` kept entries, `M` tail draws, `O` outcomes, `b = 1/T`.

    exact         exact      all V outcomes, from the teacher's last hidden state; `kdcache.losses.exact`
    sampled       unbiased   the head, and the tail by importance-weighted draws
    bucket        bound      the head, and the whole tail as one outcome: never above the exact divergence
    renormalise   biased     the head alone, both sides rescaled to sum to one

`bucket` is a bound because merging outcomes never raises an f-divergence (data processing), and every
divergence here but `adaptive_kl` is an f-divergence. With K = V all four agree.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kdcache.errors import ConfigError, MismatchError
from kdcache.losses import Pair
from kdcache.losses.output_layer import log_partition
from kdcache.targets import NODES, inverse
from kdcache.targets.log_partition import LIMIT
from kdcache.targets.tensor import TensorTargets

POLICY_KIND = {"exact": "exact", "sampled": "unbiased", "bucket": "bound", "renormalise": "biased"}
"""Of each tail policy, what its value is of the divergence over the whole vocabulary."""

Policy = Callable[..., Pair]

_log = logging.getLogger(__name__)


def bucket(targets: TensorTargets, head_logits: Tensor, rest: Tensor, temperature: float) -> Pair:
    """Return K + 1 outcomes, the last of them the whole tail: a lower bound of any f-divergence.

    The teacher's tail mass comes from its log-partition at this temperature, the student's from `rest`.

    Args:
        targets: The teacher at N positions.
        head_logits: [N, K], the student's raw logits of `targets.ids`.
        rest: [N], the student's log-sum-exp of logit / T over the other ids.
        temperature: T.
    """
    b = inverse(temperature)
    tail = (targets.tail_log_partition(temperature) - targets.log_partition(temperature))[:, None]
    log_p = torch.cat([_teacher_head(targets, temperature), tail], dim=1)
    log_z = log_partition(head_logits, rest, b)[:, None]
    return Pair(log_p, torch.cat([head_logits * b, rest[:, None]], dim=1) - log_z)


def sampled(
    targets: TensorTargets,
    head_logits: Tensor,
    rest: Tensor,
    temperature: float,
    draw_logits: Tensor,
) -> Pair:
    """Return the head, each id once, and M tail draws with weight 1 / (M * proposal): unbiased.

    Probabilities of both sides are those of the whole vocabulary, so the weighted sum estimates the sum over
    all ids of any function of p and q, at any temperature; its gradient is unbiased too. Both sides must
    have one vocabulary: cut a larger student head with `first_ids`, or its padding's mass is left out.

    Where the tail is empty or lies more than 32 nats below the head (masked ids), its draws say nothing and
    count nothing; the tail counts as one outcome instead. So there are K + 1 + M outcomes.

    Args:
        targets: The teacher at N positions, with tail draws.
        head_logits: [N, K], the student's raw logits of `targets.ids`.
        rest: [N], the student's log-sum-exp of logit / T over the other ids.
        temperature: T.
        draw_logits: [N, M], the student's raw logits of `targets.draw_ids`.

    Raises:
        MismatchError: The targets hold no draws.
    """
    if targets.draw_logits is None:
        raise MismatchError(
            "The tail policy is sampled, but the targets hold no tail draws.",
            hint="Capture with tail draws, or train with the tail policy bucket.",
        )
    b = inverse(temperature)
    merged = bucket(targets, head_logits, rest, temperature)
    drawn_p = targets.draw_logits * b - targets.log_partition(temperature)[:, None]
    drawn_q = draw_logits * b - log_partition(head_logits, rest, b)[:, None]
    # a stored log-partition at its limit is not the one that the draws were drawn with
    unknown = targets.tail[:, NODES.index(1.0), None] <= -LIMIT
    proposal = targets.draw_log_proposal().masked_fill(unknown, torch.inf)
    once = torch.ones_like(targets.logits)
    weight = torch.cat([once, unknown.to(once.dtype), torch.exp(-proposal) / proposal.shape[1]], dim=1)
    return Pair(torch.cat([merged.log_p, drawn_p], dim=1), torch.cat([merged.log_q, drawn_q], dim=1), weight)


def renormalise(targets: TensorTargets, head_logits: Tensor, rest: Tensor, temperature: float) -> Pair:
    """Return the K kept outcomes, both sides rescaled to sum to one over them: biased.

    For comparison with caches that keep nothing of the tail: `rest` is not used, so what the student puts
    outside the head is free of charge, and a flat teacher looks peaked. Logs a warning once a process.

    Args:
        targets: The teacher at N positions.
        head_logits: [N, K], the student's raw logits of `targets.ids`.
        rest: [N], ignored.
        temperature: T.
    """
    if targets.k < targets.vocab_size:
        _warn_of_bias()
    b = inverse(temperature)
    return Pair(torch.log_softmax(targets.logits * b, dim=1), torch.log_softmax(head_logits * b, dim=1))


def policy(name: str) -> Policy:
    """Return the function that makes a `Pair` under a tail policy.

    All take (targets, head_logits, rest, temperature); `sampled` also takes draw_logits.

    Raises:
        ConfigError: There is no such policy, or it is `exact`, which needs hidden states instead.
    """
    policies: dict[str, Policy] = {"bucket": bucket, "sampled": sampled, "renormalise": renormalise}
    if name not in policies:
        raise ConfigError(
            f"There is no tail policy named {name!r} that works from the head.",
            hint=f"Choose one of: {', '.join(policies)}; exact works from hidden states.",
        )
    return policies[name]


def _teacher_head(targets: TensorTargets, temperature: float) -> Tensor:
    return targets.logits * inverse(temperature) - targets.log_partition(temperature)[:, None]


@cache
def _warn_of_bias() -> None:
    _log.warning("tail policy renormalise ignores the tail and is biased; bucket, sampled and exact are not")
