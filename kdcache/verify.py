"""Check a store: against its manifest, and against the live teacher it was captured from."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import ConfigError, MismatchError
from kdcache.store import Problem, Store, check, open_store


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        problems: Every fault; empty for a sound store.
        objects: Objects checked.
        bytes: Of them.
        quick: Whether only presence and sizes were checked.
        rows_compared: Positions compared with the live teacher.
        top1_agreement: Share of them where store and teacher put the same id first.
        max_logit_difference: Largest difference of a kept logit, in nats.
        mean_logit_difference: Mean of the same.
    """

    problems: tuple[Problem, ...]
    objects: int
    bytes: int
    quick: bool
    rows_compared: int = 0
    top1_agreement: float | None = None
    max_logit_difference: float | None = None
    mean_logit_difference: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {**asdict(self), "ok": not self.problems}


def verify(
    path: Path | str,
    *,
    quick: bool = False,
    teacher: Any = None,
    rows: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Return what is wrong with a store; reads everything unless quick.

    Args:
        path: Its folder.
        quick: Presence and sizes only.
        teacher: A model name or a `kdcache.teachers.Teacher` to run again over some samples; None for none.
        rows: Positions to compare with it, at least.
        seed: Chooses the samples.
        progress: Called with objects done and all.

    Raises:
        ConfigError: A teacher is given for a classifier's store.
        MismatchError: The teacher is not the one that was captured.
        IncompleteStoreError, CorruptObjectError, UnsupportedError: There is no manifest to check against.
    """
    store = open_store(path)
    problems = tuple(check(store, quick=quick, progress=progress))
    report = Report(problems, len(store.manifest.objects), store.nbytes, quick)
    if teacher is None or problems:
        return report
    if store.manifest.kind != "causal_lm":
        raise ConfigError("Rows of a classifier are not compared with a live one.", hint="Leave out --teacher.")
    return _compared(report, store, teacher, rows, seed)


def _compared(report: Report, store: Store, teacher: Any, rows: int, seed: int) -> Report:
    import torch

    from kdcache.targets.measure import measure_rows
    from kdcache.teachers import TeacherConfig, load_teacher

    recorded = store.manifest.part("teacher")
    if isinstance(teacher, str):
        dtype = recorded.get("dtype", "auto")
        teacher = load_teacher(TeacherConfig(model=teacher, dtype=dtype))
    different = [
        key for key in ("weights", "config", "vocab_size") if teacher.fingerprint.get(key) != recorded.get(key)
    ]
    if different:
        raise MismatchError(
            f"This is not the teacher that was captured: {', '.join(different)} differ.",
            where=str(store.path),
            hint=f"The store was captured from {recorded.get('name')}, weights {str(recorded.get('weights'))[:12]}.",
        )
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(store))
    compared, same, largest, total = 0, 0, 0.0, 0.0
    for number in order:
        sample = store[int(number)]
        output = teacher.forward([sample.input_ids[:-1]])
        labels = torch.from_numpy(sample.labels).to(output.rows.device)
        with torch.inference_mode():
            live = measure_rows(output.rows, labels, k=store.k, head=output.head).numpy()
        # the same ids may change places where logits are close: compare rank by rank
        difference = np.abs(live.logits - sample.targets.logits)
        same += int((live.ids[:, 0] == sample.targets.ids[:, 0]).sum())
        largest = max(largest, float(difference.max()))
        total += float(difference.mean()) * len(difference)
        compared += len(difference)
        if compared >= rows:
            break
    problems = report.problems
    if same / compared < 0.9 or total / compared > 0.25:
        what = f"the live teacher says something else: same first candidate at {same / compared:.3f} of the positions"
        problems = (Problem("columns/head_logits", what),)
    return Report(
        problems,
        report.objects,
        report.bytes,
        report.quick,
        rows_compared=compared,
        top1_agreement=same / compared,
        max_logit_difference=largest,
        mean_logit_difference=total / compared,
    )
