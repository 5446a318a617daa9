"""Divergences between teacher and student: pure functions of two lists of log-probabilities.

Legend: `N` positions, `O` outcomes, `K` kept entries, `M` tail draws, `V` vocabulary, `D` width.

    hidden states --output_layer--> head and extra logits, rest --tails--> Pair --divergence--> nats [N]

A tail policy (`kdcache.losses.tails`, or `kdcache.losses.exact` over the whole vocabulary) decides what the
outcomes are; a divergence knows nothing of heads, tails or temperatures. Nothing here masks, averages,
weighs terms or multiplies by T**2: that is done once, by training.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor

from kdcache import registry
from kdcache.errors import ConfigError

DIVERGENCES = ("forward_kl", "jsd", "reverse_kl")
"""The divergences of this package; others come from entry points of the group `kdcache.losses`."""

FLOOR = -1e4
"""Log-probability, in nats, that stands in for minus infinity, so that no divergence is infinite."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Teacher and student on one list of outcomes a position.

    Without weights both sides sum to one over the outcomes, and a divergence is the sum of a term per
    outcome. With weights the weighted sum estimates the sum over outcomes that are not all listed.

    Attributes:
        log_p: [N, O], the teacher's log-probabilities in nats; minus infinity is an impossible outcome.
        log_q: [N, O], the student's.
        weight: [N, O], what each outcome's term counts; None where every outcome counts once.
    """

    log_p: Tensor
    log_q: Tensor
    weight: Tensor | None = None

    def finite(self) -> "Pair":
        """Return the pair with impossible outcomes at `FLOOR`, where their probability is still exactly 0.

        The teacher's log-probabilities below it are raised to it (masked ids often have the lowest float as
        their logit). The student's finite ones stay as they are, because raising them would stop their
        gradient.
        """
        log_q = self.log_q.masked_fill(torch.isneginf(self.log_q), FLOOR)
        return Pair(self.log_p.clamp(min=FLOOR), log_q, self.weight)

    def total(self, terms: Tensor) -> Tensor:
        """Return the weighted sum [N] of one term per outcome [N, O]."""
        return (terms if self.weight is None else terms * self.weight).sum(-1)


class LogitLoss(Protocol):
    """What `divergence` returns."""

    def __call__(self, pair: Pair, /) -> Tensor:
        """Return the divergence [N] in nats of every position, differentiable in the student's side."""


def divergence(name: str, **parameters: Any) -> LogitLoss:
    """Return the divergence of that name with its parameters set, such as `divergence("jsd", beta=0.1)`.

    Raises:
        ConfigError: There is no such divergence, or it has no such parameter.
    """
    known = sorted({*DIVERGENCES, *(point.name for point in entry_points(group=__name__))})
    if name not in known:
        raise ConfigError(f"There is no divergence named {name!r}.", hint=f"Choose one of: {', '.join(known)}.")
    plugin = registry.find(__name__, name)
    accepted = list(inspect.signature(plugin).parameters)[1:]
    unknown = sorted(set(parameters) - set(accepted))
    if unknown:
        raise ConfigError(
            f"The divergence {name} has no parameter {', '.join(map(repr, unknown))}.",
            hint=f"Its parameters are: {', '.join(accepted) or 'none'}.",
        )
    return partial(plugin, **parameters)


__all__ = ["DIVERGENCES", "FLOOR", "LogitLoss", "Pair", "divergence"]
