"""Measure a trained student on a held-out store, with no teacher in memory."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache import metrics
from kdcache.errors import ConfigError, MismatchError, SourceError
from kdcache.process import peak_memory_bytes
from kdcache.store import Store, open_store
from kdcache.stream import Loader, StreamConfig, output_head_of
from kdcache.tokenizer import differences, load_tokenizer, tokenizer_fingerprint
from kdcache.train import RESULT, held_out
from kdcache.train.config import DataConfig
from kdcache.train.feed import held_out_feed
from kdcache.train.spans import held_out_by_text
from kdcache.train.student import load_student, run_student


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
        scores: Of a classifier's store. Classes: macro_f1, micro_f1, expected_calibration_error and brier of the
            student (see kdcache/metrics.py), teacher_accuracy, teacher_macro_f1, and with every output in the store
            teacher_expected_calibration_error and teacher_brier. Values: mean_absolute_error, root_mean_squared_error,
            r_squared and pearson over all outputs, and with every output in the store the same with teacher_ and those
            of student against teacher as imitation_; where a student was trained with a sigmoid, of the probabilities.
            Empty for language models and without labels; of a student with a tokenizer of its own bits_per_byte and
            teacher_bits_per_byte, and the measurements above are then by the text (kdcache/train/spans.py).
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
    scores: dict[str, float] = field(default_factory=dict)

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
    speaks = load_tokenizer(str(folder)) if own.get("tokenizer") else None
    model = load_student(folder, own.get("factory"), opened.vocab_size if speaks is None else len(speaks), task)
    data = DataConfig(**config["data"]) if "data" in config else None
    if examples is not None:
        data = (data or DataConfig()).model_copy(update={"examples": str(examples), "validation_examples": None})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if speaks is None:
        require_same_tokenizer(folder, opened.manifest.part("tokenizer"))
        head = output_head_of(opened).to(device) if opened.manifest.part("output_head") else None
        measure = partial(held_out, head=head, data=data)
    else:
        measure = partial(held_out_by_text, tokenizer=speaks)
    found = measure(model.to(device), opened, batch_size=batch_size, device=device, progress=progress)
    told = {name: getattr(found, name) for name in BY_TEXT if speaks is not None}
    if task is not None:
        told = scores(
            model, opened, data or DataConfig(), batch_size=batch_size, device=device, yes_no=says_yes_or_no(config)
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
        scores=told,
    )


BY_TEXT = ("bits_per_byte", "teacher_bits_per_byte")
F1 = {"macro_f1": metrics.macro_f1, "micro_f1": metrics.micro_f1}
CLASSES = {"expected_calibration_error": metrics.expected_calibration_error, "brier": metrics.brier}
VALUES = {
    "mean_absolute_error": metrics.mean_absolute_error,
    "root_mean_squared_error": metrics.root_mean_squared_error,
    "r_squared": metrics.r_squared,
    "pearson": metrics.pearson,
}
OF_SPREAD = {"r_squared": 1, "pearson": 0}
"""Scores that are left out where the values (from 1), or either side (from 0), are a constant."""


def says_yes_or_no(config: dict[str, Any]) -> bool:
    """Say whether the outputs of a run's student are logits of so many yes-or-no questions.

    Args:
        config: Of the run.
    """
    loss = config.get("loss") or {}
    return "sigmoid" in (loss.get("hard"), loss.get("divergence"))


@torch.no_grad()
def scores(
    model: torch.nn.Module,
    store: Store,
    data: DataConfig,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    yes_no: bool = False,
) -> dict[str, float]:
    """Return what needs all answers of a classifier's store at once, by the names of `Metrics.scores`.

    Args:
        model: The student, on `device`.
        store: A held-out store of the kind `classifier`.
        data: Names its examples.
        batch_size: Samples a batch.
        device: Where the student is.
        yes_no: Values are probabilities, and both sides' outputs their logits.

    Returns:
        Empty where the store has no labels; without the teacher where it does not keep every output.
    """
    feed = held_out_feed(store, data)
    if not feed.labelled:
        return {}
    config = StreamConfig(batch_size=batch_size, shuffle=False, pool_shards=1, extra=feed.extra)
    parts: dict[str, list[np.ndarray[Any, Any]]] = {"ours": [], "theirs": [], "labels": [], "values": []}
    model.eval()
    for read in Loader(store, config):
        batch = feed.fill(read, 0).to(device)
        rows, targets = batch.mask.nonzero()[:, 0], batch.targets
        output = run_student(model, batch, (), fused=False)
        assert output.logits is not None  # a student of examples gives logits
        assert targets is not None  # the loader was asked for them
        ours, told = output.logits[rows].float(), targets[rows]
        theirs = torch.full_like(ours, -torch.inf).scatter(1, told.ids.long(), told.logits)
        values = batch.extra.get("label_values", batch.labels[:, None])[rows]
        for name, part in {"ours": ours, "theirs": theirs, "labels": batch.labels[rows], "values": values}.items():
            parts[name].append(part.cpu().numpy())
    whole = store.k == store.vocab_size
    if "label_values" in store.columns:
        flat = {name: np.concatenate(some).reshape(-1) for name, some in parts.items() if name != "labels"}
        if yes_no:
            flat |= {name: 0.5 + 0.5 * np.tanh(0.5 * flat[name]) for name in ("ours", "theirs")}
        sides = {"": ("ours", "values")}
        if whole:
            sides |= {"teacher_": ("theirs", "values"), "imitation_": ("ours", "theirs")}
        return {
            f"{side}{name}": score(flat[one], flat[other])
            for side, (one, other) in sides.items()
            for name, score in VALUES.items()
            if all(np.ptp(flat[side_of]) > 0 for side_of in (one, other)[OF_SPREAD.get(name, 2) :])
        }
    student, teacher, labels = (np.concatenate(parts[name]) for name in ("ours", "theirs", "labels"))
    best = {"": student.argmax(1), "teacher_": teacher.argmax(1)}
    found = {f"{side}{name}": score(own, labels) for side, own in best.items() for name, score in F1.items()}
    found["teacher_accuracy"] = metrics.accuracy(best["teacher_"], labels)
    for side, table in {"": student, **({"teacher_": teacher} if whole else {})}.items():
        found |= {f"{side}{name}": score(_softmax(table), labels) for name, score in CLASSES.items()}
    return found


def _softmax(logits: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    found: np.ndarray[Any, Any] = powers / powers.sum(1, keepdims=True)
    return found


def require_same_tokenizer(folder: Path, recorded: dict[str, Any] | None) -> None:
    """Refuse a student whose folder holds another tokenizer than a store's.

    Raises:
        MismatchError: They differ; either missing is no difference.
    """
    if recorded is None or not (folder / "tokenizer.json").is_file():
        return
    if lines := differences(recorded, tokenizer_fingerprint(load_tokenizer(str(folder)))):
        raise MismatchError(
            f"The student's tokenizer is not the store's: {'; '.join(lines)}.",
            where=str(folder),
            hint="Measure it on a store captured with the same tokenizer.",
        )
