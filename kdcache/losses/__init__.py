"""Losses between teacher and student: pure functions, one value a position.

Legend: `N` positions, `O` outcomes, `K` kept entries, `M` tail draws, `V` vocabulary, `D` width.

    hidden states --output_layer--> head and extra logits, rest --tails--> Pair --divergence--> nats [N]
                                                                +-------> Heads --response--> values [N]

A tail policy (`kdcache.losses.tails`, or `kdcache.losses.exact` over the whole vocabulary) decides what the
outcomes are; a divergence (`kdcache.losses.divergences`) knows nothing of heads, tails or temperatures. A
response loss (`kdcache.losses.responses`) is one that log-probabilities are not enough for: it sees raw logits
and labels. Nothing here masks, averages, weighs terms or multiplies by T**2: that is done once, by training.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kdcache import registry
from kdcache.errors import MismatchError
from kdcache.targets.tensor import TensorTargets

DIVERGENCES = (
    "adaptive_kl",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
)
"""The divergences of this package; others come from entry points of the group `kdcache.losses.divergences`."""

RESPONSES = ("dist", "dkd", "logit_mse", "ranking", "regression", "sigmoid", "standardised_kl")
"""The response losses of this package; others come from entry points of the group `kdcache.losses.responses`."""

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


@dataclass(frozen=True, slots=True)
class Heads:
    """Teacher and student at N positions: the teacher's head, and the student's raw logits of the same ids.

    Attributes:
        targets: The teacher.
        logits: [N, K], the student's raw logits of `targets.ids`.
        rest: [N], the student's log-sum-exp of logit / temperature over the other ids; minus infinity where K = V.
        labels: int64 [N], ids; any where the loss needs none.
        label_logit: [N], the student's raw logit of the label.
        temperature: T, of both sides.
    """

    targets: TensorTargets
    logits: Tensor
    rest: Tensor
    labels: Tensor
    label_logit: Tensor
    temperature: float

    def wide(self) -> "Heads":
        """Return the same with all values in one dtype: the wider of both sides', float32 at least."""
        both = torch.promote_types(self.targets.logits.dtype, self.logits.dtype)
        dtype = torch.promote_types(both, torch.float32)
        return replace(
            self,
            targets=self.targets.each(lambda values: values.to(dtype) if values.is_floating_point() else values),
            logits=self.logits.to(dtype),
            rest=self.rest.to(dtype),
            label_logit=self.label_logit.to(dtype),
        )

    def require_whole(self) -> None:
        """Refuse targets that keep a part of the teacher's row.

        Raises:
            MismatchError: K < V.
        """
        if self.targets.k < self.targets.vocab_size:
            raise MismatchError(
                f"The loss needs whole rows of the teacher, and the targets keep {self.targets.k} "
                f"of {self.targets.vocab_size} outputs.",
                hint="Capture every output, or take a loss that works from a head.",
            )


@dataclass(frozen=True, slots=True)
class Response:
    """A loss of raw logits and labels, and what training has to know of it.

    Attributes:
        loss: Takes `Heads`, then keyword parameters; returns one value a position [N], differentiable in the
            student's side.
        tempered: Whether the loss softens both sides by T, so that training multiplies it by T**2.
        whole: Whether it needs K = V; it raises `MismatchError` otherwise.
        labels: Whether every position needs a label.
    """

    loss: Callable[..., Tensor]
    tempered: bool
    whole: bool
    labels: bool


class LogitLoss(Protocol):
    """What `divergence` returns."""

    def __call__(self, pair: Pair, /) -> Tensor:
        """Return the divergence [N] in nats of every position, differentiable in the student's side."""


def divergence(name: str, **parameters: Any) -> LogitLoss:
    """Return the divergence of that name with its parameters set, such as `divergence("jsd", beta=0.1)`.

    Raises:
        ConfigError: There is no such divergence, or it has no such parameter.
    """
    return registry.bound(registry.find(f"{__name__}.divergences", name), f"divergence {name}", 1, parameters)


def response(name: str, **parameters: Any) -> Response:
    """Return the response loss of that name with its parameters set, such as `response("dkd", beta=2.0)`.

    Raises:
        ConfigError: There is no such response loss, or it has no such parameter.
    """
    plugin: Response = registry.find(f"{__name__}.responses", name)
    return replace(plugin, loss=registry.bound(plugin.loss, f"response {name}", 1, parameters))


__all__ = [
    "DIVERGENCES",
    "FLOOR",
    "RESPONSES",
    "Heads",
    "LogitLoss",
    "Pair",
    "Response",
    "divergence",
    "response",
]
