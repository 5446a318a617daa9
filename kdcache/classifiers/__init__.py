"""Frozen models of examples: one file is one way to run one.

Legend: `S` samples, `T` tokens of a sample, `C` outputs (classes, or values of a regression).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache import registry
from kdcache.teachers import TeacherConfig

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a classifier gives for some samples, on its device.

    Attributes:
        logits: Raw, [S, C], or [S, T, C] for one answer a token.
        features: Tap to [S, ...].
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


class Classifier(Protocol):
    """A frozen model of examples; loads its weights on first use."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of weights, configuration and dtype; holds no absolute path."""

    def forward(self, inputs: Mapping[str, Array], taps: Sequence[str] = ()) -> Answer:
        """Return the answers for some samples.

        Args:
            inputs: By the name of the model's parameter, [S, ...].
            taps: Features wanted; see `kdcache.taps`.

        Raises:
            TeacherError: The model failed.
            ConfigError: It has no such tap.
        """


def load_classifier(config: TeacherConfig) -> Classifier:
    """Return the classifier that a config names: `module` for `module:attribute`, `onnx` for a file, else transformers.

    Other kinds are named by `teacher.kind`.

    Raises:
        ConfigError: No such kind or device.
        AccessError: The model is not there or does not load.
    """
    kind = config.kind
    if kind == "auto":
        colon = ":" in config.model and "/" not in config.model.split(":")[0]
        kind = "module" if colon else "onnx" if config.model.endswith(".onnx") else "transformers"
    found: Classifier = registry.find(__name__, kind)(config)
    return found


def as_tensor(values: Array) -> "np.ndarray[Any, Any]":
    """Return an array as a model wants it: contiguous, whole numbers as int64."""
    wide = values.astype(np.int64) if values.dtype.kind in "iu" and values.dtype != np.uint8 else values
    return np.ascontiguousarray(wide)
