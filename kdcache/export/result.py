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
    """How far the logits are from the student's in torch, in float32: on random ids, or on examples.

    Attributes:
        largest_difference: Of any logit at any real position.
        largest_logit: Of the student, in magnitude.
        tolerance: Largest difference that is accepted for each unit of max(1, largest logit); None where the difference
            is meant, as of a model in 8 bits.
        shapes: Of the first input of each batch, samples first.
    """

    largest_difference: float
    largest_logit: float
    tolerance: float | None
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one forward pass: the median of the runs, and what a tenth of them were below and above."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Latencies of one batch, on this machine's CPU.

    Attributes:
        input: Name of the first input.
        shape: Its shape, samples first.
        before: Of the student in torch.
        after: Of what was written.
    """

    input: str
    shape: tuple[int, ...]
    before: Latency
    after: Latency


@dataclass(frozen=True, slots=True)
class Quality:
    """Held-out measurements over the positions whose label counts.

    Attributes:
        positions: Counted.
        scores: Name to value, as `kdcache eval` names them. Language models: cross_entropy, perplexity, kl,
            top1_agreement, accuracy, and bits_per_byte of one with a tokenizer of its own. Classes: these without
            perplexity, F1 and calibration; of a store without labels kl and top1_agreement alone. Values: errors and
            correlation, and those against the teacher.
    """

    positions: int
    scores: dict[str, float]


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


LARGER = 1.1
"""Times the student's weights: a graph and a configuration are written beside them."""

HIGHER_IS_BETTER = ("accuracy", "top1_agreement", "pearson", "imitation_pearson")

WORSE = 0.005
"""Loss of such a score that is told of."""


def losses(result: ExportResult) -> list[str]:
    """Return in sentences what became worse: a smaller dtype need not be smaller, faster or as good."""
    told = []
    if result.model_bytes > LARGER * result.student_bytes:
        times = result.model_bytes / result.student_bytes
        told.append(f"The files are larger than the student's weights: {times:.2f}x.")
    for one in result.speeds:
        # further apart than other work on the machine makes them
        if one.after.low_ms > one.before.high_ms:
            ratio = one.after.median_ms / one.before.median_ms
            told.append(f"It is slower on {' x '.join(map(str, one.shape))} {one.input}: {ratio:.2f}x the time.")
    if result.quality_before is not None and result.quality_after is not None:
        before, after = result.quality_before.scores, result.quality_after.scores
        told += [
            f"It is worse: {name} {after[name]:.4f}, before {before[name]:.4f}."
            for name in HIGHER_IS_BETTER
            if name in before and after[name] < before[name] - WORSE
        ]
    return told
