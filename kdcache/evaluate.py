"""Measure a trained student on a held-out store, with no teacher in memory."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache.errors import ConfigError, MismatchError, SourceError
from kdcache.process import peak_memory_bytes
from kdcache.store import open_store
from kdcache.stream import output_head_of
from kdcache.tokenizer import differences, load_tokenizer, tokenizer_fingerprint
from kdcache.train import RESULT, held_out
from kdcache.train.config import DataConfig
from kdcache.train.student import load_student


@dataclass(frozen=True, slots=True)
class Metrics:
    """Held-out measurements of a student.

    Attributes:
        perplexity: exp of its cross-entropy.
        cross_entropy: In nats a position.
        kl: KL(teacher || student) at T = 1, nats a position.
        kl_kind: "exact", or "a lower bound" where the store keeps no last hidden state.
        top1_agreement: Share of positions where both put the same id first.
        accuracy: Share of positions where the student puts the label first.
        teacher_perplexity: The teacher's, from the store; None where it did not tell every label's probability.
        positions: Counted.
        tokens_per_second: Of this evaluation.
        parameters: Weights of the student.
        peak_memory_bytes: Of this process.
        store_digest: Of the held-out store.
    """

    perplexity: float
    cross_entropy: float
    kl: float
    kl_kind: str
    top1_agreement: float
    accuracy: float
    teacher_perplexity: float | None
    positions: int
    tokens_per_second: float
    parameters: int
    peak_memory_bytes: int
    store_digest: str

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


def evaluate(
    student: Path | str,
    store: Path | str | None = None,
    *,
    batch_size: int = 8,
    examples: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Return the measurements of a finished run's student.

    Args:
        student: The run's --out folder, or any folder with a transformers causal language model.
        store: A held-out store; default: the run's `data.validation`.
        batch_size: Samples a batch.
        examples: Folder of the inputs of a classifier's store; default: the run's.
        progress: Called with samples done and all.

    Raises:
        SourceError: There is no such folder, or no store to measure on.
        MismatchError: The student's vocabulary is smaller than the store's.
        AccessError: The student does not load.
    """
    folder = Path(student)
    if not folder.is_dir():
        raise SourceError("There is no such folder.", where=str(folder), hint="Give the --out of `kdcache train`.")
    record = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {"config": {}}
    config: dict[str, Any] = record["config"]
    path = store or config.get("data", {}).get("validation")
    if path is None:
        raise ConfigError(
            "There is no held-out store to measure on.",
            where=str(folder),
            hint="Give one with --store, or train with data.validation.",
        )
    opened = open_store(path)
    own = config.get("student", {})
    task = None if opened.manifest.kind == "causal_lm" else own.get("task") or "sequence-classification"
    model = load_student(folder, own.get("factory"), opened.vocab_size, task)
    data = DataConfig(**config["data"]) if "data" in config else None
    if examples is not None:
        data = (data or DataConfig()).model_copy(update={"examples": str(examples), "validation_examples": None})
    _require_same_tokenizer(folder, opened.manifest.part("tokenizer"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = output_head_of(opened).to(device) if opened.manifest.part("output_head") else None
    found = held_out(
        model.to(device), opened, batch_size=batch_size, device=device, head=head, data=data, progress=progress
    )
    return Metrics(
        perplexity=found.perplexity,
        cross_entropy=found.cross_entropy,
        kl=found.kl,
        kl_kind=found.kl_kind,
        top1_agreement=found.top1_agreement,
        accuracy=found.accuracy,
        teacher_perplexity=found.teacher_perplexity,
        positions=found.positions,
        tokens_per_second=round(found.positions / found.seconds, 1),
        parameters=sum(one.numel() for one in model.parameters()),
        peak_memory_bytes=peak_memory_bytes(),
        store_digest=opened.digest,
    )


def _require_same_tokenizer(folder: Path, recorded: dict[str, Any] | None) -> None:
    if recorded is None or not (folder / "tokenizer.json").is_file():
        return
    if lines := differences(recorded, tokenizer_fingerprint(load_tokenizer(str(folder)))):
        raise MismatchError(
            f"The student's tokenizer is not the store's: {'; '.join(lines)}.",
            where=str(folder),
            hint="Measure it on a store captured with the same tokenizer.",
        )
