"""What a training run reports: while it goes on, and when it has ended."""

from dataclasses import asdict, dataclass
from typing import Any

from kdcache.losses import RESPONSES
from kdcache.losses.spans import span_loss
from kdcache.losses.tails import POLICY_KIND
from kdcache.train.config import TrainConfig
from kdcache.train.schedule import extremes

RESULT = "train.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """How far a run is; loss in nats a position."""

    step: int
    steps: int
    epoch: int
    loss: float
    tokens_per_second: float
    data_wait_share: float
    eta_seconds: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: Optimiser steps done.
        epochs: Passes over the store begun.
        positions: Positions trained on, in all ranks.
        loss: Mean of the last tenth of the steps, nats a position.
        seconds: Of this process's steps.
        step_seconds: Median of a step, data wait included.
        tokens_per_second: Positions of this rank over `seconds`.
        data_wait_share: Share of `seconds` spent waiting for data.
        peak_memory_bytes: Of this process.
        accelerator_memory_bytes: Of its accelerator, 0 without one.
        student_parameters: Weights of the student.
        tail: The tail policy and what it makes of the divergence.
        validation: The last held-out measurements, or None.
        stopped_early: Patience ran out; the best student was saved.
        already_complete: Nothing had to be done.
        teacher_in_memory: Whether this process has imported a module that runs a teacher.
        store_digest: Of the store.
    """

    steps: int
    epochs: int
    positions: int
    loss: float
    seconds: float
    step_seconds: float
    tokens_per_second: float
    data_wait_share: float
    peak_memory_bytes: int
    accelerator_memory_bytes: int
    student_parameters: int
    tail: str
    validation: dict[str, Any] | None
    stopped_early: bool
    already_complete: bool
    teacher_in_memory: bool
    store_digest: str

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


def tail_of(config: TrainConfig) -> str:
    """Return what the loss sees of the teacher, and what that makes of its value."""
    if extremes(config.loss.alpha)[1] == 0:
        return "none: hard labels only"
    if config.loss.divergence in RESPONSES:
        return f"{config.loss.divergence} (exact where the store keeps every output)"
    if config.student.tokenizer is not None:
        return f"{config.loss.divergence} ({span_loss(config.loss.divergence).value})"
    kind = POLICY_KIND[config.loss.tail]
    if config.loss.divergence == "adaptive_kl" and kind == "bound":
        kind = "neither exact nor a bound"
    return f"{config.loss.tail} ({kind})"
