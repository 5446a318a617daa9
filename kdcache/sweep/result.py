"""What a search reports: its trials, how far it is, and what it found."""

from dataclasses import asdict, dataclass
from typing import Any

from kdcache.train import TrainProgress


@dataclass(frozen=True, slots=True)
class Trial:
    """A finished trial.

    Attributes:
        number: From 0.
        point: Key to value.
        value: The metric on the held-out store, nats a position; None of a trial whose training failed.
        error: Why it failed, or None.
        steps: Optimiser steps done.
        positions: That the student saw, masked ones included.
        teacher_positions: Those of them at which alpha was above 0: a live teacher would have run on these.
        seconds: Of its optimiser steps; building the student and measuring it not counted.
    """

    number: int
    point: dict[str, Any]
    value: float | None
    error: str | None
    steps: int
    positions: int
    teacher_positions: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """How far a search is: which trial of how many, the lowest metric so far, and the trial's own progress."""

    trial: int
    trials: int
    best: float | None
    train: TrainProgress


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a search found.

    Attributes:
        metric: What was minimised: cross_entropy or kl, on the held-out store, nats a position.
        best: The trial with the lowest; of equals the first.
        overrides: `key=value` of its point, as `kdcache train --set` takes them.
        student: Folder of its student.
        trials: All of them, in order.
        seconds: Of all optimiser steps.
        positions: That the students saw.
        teacher_seconds_per_position: Of a live teacher, of several together, or None where it is not known.
        teacher_basis: Where that number is from.
        live_seconds: Estimate of what the same steps would have taken with the teacher in each, or None.
        notes: What is otherwise than asked for, in sentences.
        store_digest: Of the store that was trained from.
    """

    metric: str
    best: Trial
    overrides: list[str]
    student: str
    trials: list[Trial]
    seconds: float
    positions: int
    teacher_seconds_per_position: float | None
    teacher_basis: str
    live_seconds: float | None
    notes: list[str]
    store_digest: str

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)
