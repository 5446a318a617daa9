"""Losses between a teacher and a student whose tokenizers differ: one value a span.

Legend: `C` spans, `K` kept entries of the teacher, `V` the teacher's vocabulary, `U` the student's.

A span is a stretch of text that both tokenisations cut at its beginning and at its end, and neither cuts alike in
between; see `kdcache.spans`. The sides share no ids, so a span loss sees one of two things: the probability that each
side gives the span's own text, or the sizes of the probabilities with which each side predicts from its first byte.
Nothing here masks, averages or weighs terms: that is done once, by training.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kdcache import registry
from kdcache.targets.tensor import TensorTargets

SPAN_LOSSES = ("span_likelihood", "uld")
"""The span losses of this package; others come from entry points of the group `kdcache.losses.spans`."""


@dataclass(frozen=True, slots=True)
class Firsts:
    """Both sides where they predict the first token of C spans, from the same byte of the text.

    Attributes:
        targets: The teacher.
        logits: [C, min(K, U)], the student's largest raw logits, descending.
        rest: [C], the student's log-sum-exp of logit / temperature over its other ids; minus infinity without any.
        temperature: T, of both sides.
    """

    targets: TensorTargets
    logits: Tensor
    rest: Tensor
    temperature: float


@dataclass(frozen=True, slots=True)
class Sides:
    """Teacher and student at C spans.

    Attributes:
        log_p: [C], log-probability in nats that the teacher gives the span's text in its own tokens, given those
            before: the sum over its tokens.
        log_q: [C], the student's, in its own tokens.
        firsts: What both predict from the span's first byte; None where the loss does not ask for it.
    """

    log_p: Tensor
    log_q: Tensor
    firsts: Firsts | None = None


@dataclass(frozen=True, slots=True)
class SpanLoss:
    """A loss of spans, and what training has to know of it.

    Attributes:
        loss: Takes `Sides`, then keyword parameters; returns one value a span [C], differentiable in the student's
            side.
        firsts: Whether it looks at `Sides.firsts`.
        value: What the value is, in a few words, for the result of a run.
    """

    loss: Callable[..., Tensor]
    firsts: bool
    value: str


def span_loss(name: str, **parameters: Any) -> SpanLoss:
    """Return the span loss of that name with its parameters set, such as `span_loss("span_likelihood", tau=10.0)`.

    Raises:
        ConfigError: There is no such span loss, or it has no such parameter.
    """
    plugin: SpanLoss = registry.find(__name__, name)
    return replace(plugin, loss=registry.bound(plugin.loss, f"span loss {name}", 1, parameters))


def is_span_loss(name: str) -> bool:
    """Say whether a name is that of a span loss."""
    return name in registry.names(__name__)


__all__ = ["SPAN_LOSSES", "Firsts", "Sides", "SpanLoss", "is_span_loss", "span_loss"]
