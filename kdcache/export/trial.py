"""What a student is tried on: all that a format or a measurement has to know about what goes into a student.

There is one trial for language models (`text`) and one for students of examples (`examples`); nothing else asks which
of them a student is.

Legend: `S` samples, `T` tokens, `C` outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.export.result import Quality
from kdcache.taps import logits_of

Inputs = Mapping[str, NDArray[Any]]
"""What a student is given, by name; the first axis is the samples."""

Run = Callable[[Inputs], NDArray[np.float32]]
"""From inputs to logits [S, C] or [S, T, C]."""

Done = Callable[[int], None]
"""Told how many samples are done."""


@dataclass(frozen=True)
class Trial:
    """What a student is tried on.

    Attributes:
        call: How the student is called with its inputs.
        traced: What an exporter records a pass of; at least two samples.
        axes: Input to its free axes, number to name: another batch may have another size there.
        compared: Batches on which what was written is compared with the student.
        timed: Batches whose forward pass is timed.
        quality: Measures a forward pass on held-out samples; None without a store.
    """

    call: Callable[[nn.Module, Mapping[str, Tensor]], Any]
    traced: Inputs
    axes: Mapping[str, Mapping[int, str]]
    compared: tuple[Inputs, ...]
    timed: tuple[Inputs, ...]
    quality: Callable[[Run, Done], Quality] | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs, in the order in which they are traced."""
        return tuple(self.traced)


class Plain(nn.Module):
    """A student as a function of tensors that gives one: what is traced, and what exports are compared with.

    Args:
        student: In evaluation mode from then on.
        trial: Of its kind.
    """

    def __init__(self, student: nn.Module, trial: Trial) -> None:
        super().__init__()
        self.student = student
        self._call, self._names = trial.call, trial.names
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the logits [S, C] or [S, T, C] of inputs in the order of their names."""
        return logits_of(self._call(self.student, dict(zip(self._names, inputs, strict=True))))

    def run(self, inputs: Inputs) -> NDArray[np.float32]:
        """Return the logits, float32, of inputs by name."""
        with torch.inference_mode():
            out: Tensor = self(*(torch.from_numpy(inputs[name]) for name in self._names))
        return out.float().numpy()


class Answering(nn.Module):
    """A forward pass on numpy arrays in the place of a student: what measures students measures it.

    Args:
        run: The forward pass.
        names: Of its inputs, for who gives them by their order.
        config: Of a transformers student, which says how long its inputs may be.
    """

    def __init__(self, run: Run, names: tuple[str, ...], config: Any = None) -> None:
        super().__init__()
        self._run, self._names = run, names
        self.config = config

    def forward(self, *ordered: Tensor, **named: Tensor) -> Tensor:
        """Return the logits [S, C] or [S, T, C]."""
        given = {**dict(zip(self._names, ordered, strict=False)), **named}
        return torch.from_numpy(self._run({name: given[name].numpy() for name in self._names}))
