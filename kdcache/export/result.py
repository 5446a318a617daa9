"""What an export reports: files, difference from torch, speed and quality, each beside what it was before."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class File:
    """A file that was written."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the logits are from the student's in torch, in float32, on random inputs.

    Attributes:
        largest_difference: Of any logit at any real position.
        largest_logit: Of the student, in magnitude.
        tolerance: Largest difference that is accepted for each unit of max(1, largest logit); None where the difference
            is meant, as of a model in 8 bits.
        shapes: Samples and tokens of the inputs.
    """

    largest_difference: float
    largest_logit: float
    tolerance: float | None
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one forward pass: the median of the runs, and what a tenth of them were below and above."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Latencies on inputs of one shape, on this machine's CPU."""

    samples: int
    tokens: int
    before: Latency
    after: Latency


@dataclass(frozen=True, slots=True)
class Quality:
    """Held-out measurements over the positions whose label counts.

    Attributes:
        cross_entropy: In nats a position.
        perplexity: exp of it.
        top1_agreement: Share of positions where the teacher's first id is first.
        positions: Counted.
    """

    cross_entropy: float
    perplexity: float
    top1_agreement: float
    positions: int


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export has written, beside the student it was made of; before is torch in float32 on the CPU.

    Attributes:
        format: Its name.
        made_by: What wrote it.
        files: All of them.
        model_bytes: Of the model's files.
        student_bytes: Of the student's weights in the run folder.
        parameters: Weights of the student.
        parity: How far from torch.
        speeds: One a shape.
        threads: Of both sides' forward passes.
        quality_before: Of the student on the held-out store, or None without one.
        quality_after: Of what was written.
        store_digest: Of the held-out store, or None.
        notes: What a user has to know, in sentences.
        already_complete: Nothing had to be done.
    """

    format: str
    made_by: str
    files: list[File]
    model_bytes: int
    student_bytes: int
    parameters: int
    parity: Parity
    speeds: list[Speed]
    threads: int
    quality_before: Quality | None
    quality_after: Quality | None
    store_digest: str | None
    notes: list[str]
    already_complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)
