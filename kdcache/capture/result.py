"""What a capture says of itself, on the way and at its end."""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from kdcache.capture.price import CapturePlan
from kdcache.process import peak_memory_bytes
from kdcache.store import Store


@dataclass(frozen=True, slots=True)
class CaptureProgress:
    """How far a capture is; times in seconds.

    Attributes:
        stage: "capture".
    """

    stage: ClassVar[str] = "capture"
    positions_done: int
    positions_total: int
    positions_per_second: float
    bytes_written: int
    eta_seconds: float
    shard: int
    shards: int


@dataclass(frozen=True, slots=True)
class SamplesProgress:
    """How far the making of samples is, before the teacher begins.

    Attributes:
        stage: "samples".
    """

    stage: ClassVar[str] = "samples"
    documents_done: int
    documents_total: int


@dataclass(frozen=True, slots=True)
class CaptureResult:
    """How a capture ended.

    Attributes:
        digest: Of the store.
        samples: In the store.
        positions: In the store.
        bytes: Of all objects.
        bytes_per_position: Of columns and sample table.
        k: Logits kept a position.
        already_complete: Nothing had to be done.
        seconds: Of this run's capture, samples and model loading not counted.
        positions_per_second: Of this run, or of the one that finished the store.
        peak_memory_bytes: Of that run's process.
        accelerator_memory_bytes: Of this process's accelerator, 0 without one.
        memory_retries: Batches that were halved for want of memory.
        positions_wasted: Of those that this run made, how many another process had committed first.
        skipped: Documents and samples left out, and rows masked, by reason.
        plan: What was said before the teacher ran; None where nothing had to be done.
    """

    digest: str
    samples: int
    positions: int
    bytes: int
    bytes_per_position: float
    k: int
    already_complete: bool = False
    seconds: float = 0.0
    positions_per_second: float = 0.0
    peak_memory_bytes: int = 0
    accelerator_memory_bytes: int = 0
    memory_retries: int = 0
    positions_wasted: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    plan: CapturePlan | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


def result_of(
    store: Store,
    *,
    already_complete: bool = False,
    seconds: float = 0.0,
    made: int = 0,
    retries: int = 0,
    wasted: int = 0,
) -> CaptureResult:
    """Return the result of a finished capture: of this run what it made, otherwise what the store recorded."""
    recorded = store.manifest.part("provenance") or {}
    counts = _skipped(store.manifest.part("skipped") or {})
    if invalid := sum(shard.invalid_rows for shard in store.shards):
        counts["rows with NaN or infinite logits"] = invalid
    return CaptureResult(
        digest=store.digest,
        samples=len(store),
        positions=store.num_positions,
        bytes=store.nbytes,
        bytes_per_position=round(store.bytes_per_position, 3),
        k=store.k,
        already_complete=already_complete,
        seconds=round(seconds, 3),
        positions_per_second=round(made / seconds, 1) if made else recorded.get("positions_per_second", 0.0),
        peak_memory_bytes=peak_memory_bytes() if made else recorded.get("peak_memory_bytes", 0),
        accelerator_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        memory_retries=retries,
        positions_wasted=wasted,
        skipped=counts,
    )


def _skipped(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name.startswith(("skipped", "truncated"))}
