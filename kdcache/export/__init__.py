"""A finished student in a form that others run, measured before and after: size, speed and quality.

    safetensors  the folder that transformers loads
    onnx         one graph, compared with torch in onnxruntime
    int8         the same graph in 8 bits

What is known of inputs and of quality is in a student's trial (`trial.py`): formats ask for no kind of student.
Projectors are no part of a student: they are what its features are compared through in training.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from kdcache import registry
from kdcache.errors import ConfigError, MismatchError
from kdcache.export.finished import Finished, load_finished
from kdcache.export.measure import latencies
from kdcache.export.result import ExportResult, File, Quality, losses
from kdcache.export.written import Format, Written
from kdcache.fingerprint import digest_file
from kdcache.store import Store, open_store
from kdcache.store.disk import storage_errors

FORMATS = ("int8", "onnx", "safetensors")
"""The formats of this package; others come from entry points of the group `kdcache.export`."""

RECORD = "export.json"

Progress = Callable[[int, int], None]


def export(
    student: Path | str,
    out: Path | str,
    name: str,
    *,
    store: Store | Path | str | None = None,
    examples: Path | str | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a student in a format, beside its tokenizer's files, and return what it is worth there.

    The folder appears as a whole, once what is in it has been read back and compared; the same call does nothing again.

    Args:
        student: The run's --out folder, or any folder with a transformers causal language model.
        out: Folder of what is written.
        name: Of the format.
        store: A held-out store to measure quality on, before and after; default: of a student of examples the run's,
            else none.
        examples: Folder of the inputs of a classifier's store; default: the run's.
        batch_size: Samples a batch of that.
        progress: Called with samples measured and all.

    Raises:
        ConfigError: There is no such format, a package is missing, or nothing says what a student of examples is given.
        SourceError: There is no such student, or there are no such examples.
        MismatchError: What was written does not say what the student says, the store is of another vocabulary or
            tokenizer, the examples are others, or the folder holds something else.
        UnsupportedError: The format cannot hold the student.
        AccessError: The student does not load, or the folder cannot be written.
    """
    form = find(name)
    opened = store if isinstance(store, Store) or store is None else open_store(store)
    root = Path(out)
    finished = load_finished(Path(student), opened, examples=examples, batch_size=batch_size)
    identity = {
        "format": name,
        "student": finished.digest,
        "store": None if finished.store is None else finished.store.digest,
    }
    if (recorded := _recorded(root, identity)) is not None:
        return recorded
    stage = root.with_name(f".{root.name}.partial")
    with storage_errors(root):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    try:
        with storage_errors(root):
            written = form(finished, stage)
        model_bytes = sum(path.stat().st_size for path in _files(stage))
        for path in finished.tokenizer_files:
            shutil.copyfile(path, stage / path.name)
        result = _measured(finished, written, stage, (name, model_bytes), progress)
        with storage_errors(root):
            document = {"identity": identity, "result": result.as_dict()}
            (stage / RECORD).write_text(json.dumps(document, indent=2))
            if root.exists():
                root.rmdir()
            stage.replace(root)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return result


def find(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ConfigError: There is none.
    """
    known = sorted({*FORMATS, *(point.name for point in entry_points(group=__name__))})
    if name not in known:
        raise ConfigError(f"There is no format {name!r}.", where="--to", hint=f"Choose one of: {', '.join(known)}.")
    found: Format = registry.find(__name__, name)
    return found


def _measured(
    student: Finished, written: Written, stage: Path, model: tuple[str, int], progress: Progress | None
) -> ExportResult:
    trial, held_out = student.trial, student.store
    qualities: list[Quality | None] = [None, None]
    if trial.quality is not None and held_out is not None:
        count = len(held_out)
        for side, run in enumerate((student.run, written.run)):

            def show(done: int, before: int = side * count) -> None:
                if progress is not None:
                    progress(before + done, 2 * count)

            qualities[side] = trial.quality(run, show)
    result = ExportResult(
        format=model[0],
        made_by=written.made_by,
        files=[File(path.name, path.stat().st_size, digest_file(path)) for path in _files(stage)],
        model_bytes=model[1],
        student_bytes=sum(path.stat().st_size for path in student.weights),
        parameters=sum(one.numel() for one in student.model.parameters()),
        parity=written.parity,
        speeds=[latencies(student.run, written.run, inputs) for inputs in trial.timed],
        threads=torch.get_num_threads(),
        quality_before=qualities[0],
        quality_after=qualities[1],
        store_digest=None if held_out is None else held_out.digest,
        notes=list(written.notes),
    )
    return replace(result, notes=[*result.notes, *losses(result)])


def _recorded(root: Path, identity: dict[str, Any]) -> ExportResult | None:
    """Return the result of the same export that the folder holds; None where there is nothing yet."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    if not (root / RECORD).is_file():
        raise MismatchError("This is not an empty folder.", where=str(root), hint="Choose another --out.")
    document = json.loads((root / RECORD).read_text())
    if wrong := [key for key, value in identity.items() if document["identity"].get(key) != value]:
        raise MismatchError(
            f"The folder holds another export: its {', '.join(wrong)} differs.",
            where=str(root),
            hint="Choose another --out, or remove the folder.",
        )
    told = {**document["result"], "already_complete": True}
    return TypeAdapter(ExportResult).validate_python(told)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


__all__ = ["FORMATS", "ExportResult", "Format", "Written", "export", "find"]
