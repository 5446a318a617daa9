"""The student as one ONNX graph: its inputs by name, and the output logits float32 [S, T, C] or [S, C].

S is free, and so is T of sequences. torch's exporter of whole programs is tried first; where a model's code is beyond
it, the older one that records one forward pass, whose graph is only trusted because it is then compared on other
shapes.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kdcache.errors import MismatchError, UnsupportedError
from kdcache.export.finished import Finished
from kdcache.export.measure import compare
from kdcache.export.session import load_onnxruntime, open_session
from kdcache.export.written import Written

GRAPH = "model.onnx"

TOLERANCE = 1e-4
"""Of logits, for each unit of their magnitude: float32 sums in another order differ by about 1e-6."""

LARGE = 1_800_000_000
"""Bytes of weights above which they go to a file beside the graph: protobuf ends at 2 GiB."""

TRACED_OPSET = 17
"""The newest with all that transformers use that the older exporter writes without gaps."""


def plugin(student: Finished, folder: Path) -> Written:
    """Write model.onnx; see the module.

    Raises:
        ConfigError: onnx or onnxruntime is not installed.
        MismatchError: The graph does not say what the student says.
        UnsupportedError: No exporter can write the student.
    """
    load_onnxruntime()
    refusals: list[Exception] = []
    for name, write in WAYS.items():
        path = folder / GRAPH
        try:
            with quietly():
                write(student, path)
            run = open_session(path)
            parity = compare(student, run, tolerance=TOLERANCE)
        except OSError:
            raise
        except Exception as error:
            # what exporters raise has no common base, and a partly written model is not to stay
            refusals.append(error)
            for left in folder.glob("*"):
                left.unlink()
            continue
        notes = () if student.model is student.plain.student else ("The weights were widened to float32.",)
        return Written(name, run, parity, notes)
    for refusal in refusals:
        if isinstance(refusal, MismatchError):
            raise refusal
    lines = [f"{name}: {_first_line(one)}" for name, one in zip(WAYS, refusals, strict=True)]
    raise UnsupportedError(
        f"No exporter can write the student. {'; '.join(lines)}",
        where=str(student.folder),
        hint="Export as safetensors, or write its forward pass without branches on values.",
    )


def _whole_program(student: Finished, path: Path) -> None:
    torch.onnx.export(
        student.plain,
        _example(student),
        str(path),
        input_names=list(student.trial.names),
        output_names=["logits"],
        # one entry, of all that the forward pass takes by position
        dynamic_shapes=(tuple(dict(student.trial.axes[name]) for name in student.trial.names),),
        external_data=is_large(student),
        dynamo=True,
        verbose=False,
    )


def _one_pass(student: Finished, path: Path) -> None:
    trial = student.trial
    answers = student.run(trial.traced).ndim
    free = {number: name for axes in trial.axes.values() for number, name in axes.items() if number < answers - 1}
    torch.onnx.export(
        student.plain,
        _example(student),
        str(path),
        input_names=list(trial.names),
        output_names=["logits"],
        dynamic_axes={**{name: dict(axes) for name, axes in trial.axes.items()}, "logits": free},
        opset_version=TRACED_OPSET,
        dynamo=False,
    )


WAYS: dict[str, Callable[[Finished, Path], None]] = {
    "torch.onnx, torch.export": _whole_program,
    "torch.onnx, TorchScript": _one_pass,
}


def _example(student: Finished) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(one) for one in student.trial.traced.values())


def is_large(student: Finished) -> bool:
    """Say whether the weights need a file beside the graph."""
    return sum(one.numel() * one.element_size() for one in student.plain.parameters()) > LARGE


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep exporters from telling of their progress: standard output is the result's alone."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    # exporters wrap what went wrong in advice about themselves
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
