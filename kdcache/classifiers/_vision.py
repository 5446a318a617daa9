"""Models of vision libraries: built by name, with weights out of a safetensors file and from nowhere else.

Legend: `S` samples, `C` channels, `H` height, `W` width.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from kdcache.classifiers import Answer, Array
from kdcache.classifiers.module import ModuleClassifier
from kdcache.errors import AccessError, ConfigError, TeacherError
from kdcache.teachers import TeacherConfig

REFUSED = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "weights",
    "weights_backbone",
)
"""Arguments of constructors that fetch weights, or read them as pickles."""

FILE = "model.safetensors"
"""Weights in a folder."""


@dataclass(frozen=True, slots=True)
class Built:
    """A model with its weights.

    Attributes:
        model: Called with one array of images [S, C, H, W], or of clips.
        name: Of the architecture.
        wants: A sentence about the images that it was made for.
        facts: Further members of its fingerprint.
    """

    model: nn.Module
    name: str
    wants: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class ImageClassifier:
    """A library's model, given the one field that there is, whatever its parameter is called.

    Images are given as they lie in the examples: nothing is scaled here.

    Args:
        config: Names the model.
        kind: Of the classifier.
        build: Makes the model of a config.
    """

    def __init__(self, config: TeacherConfig, kind: str, build: Callable[[TeacherConfig], Built]) -> None:
        self._config, self._kind, self._build = config, kind, build
        if refused := sorted(set(config.options) & set(REFUSED)):
            raise ConfigError(
                f"The model may not be made with {refused[0]!r}: its weights come from a safetensors file.",
                where="teacher.options",
                hint="Name the file in teacher.weights.",
            )

    @cached_property
    def _built(self) -> Built:
        return self._build(self._config)

    @cached_property
    def _inner(self) -> ModuleClassifier:
        return ModuleClassifier(self._config, self._built.model)

    @cached_property
    def _parameter(self) -> str:
        return next(iter(inspect.signature(self._built.model.forward).parameters))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the weights, and of what the architecture was made with."""
        return {
            "kind": self._kind,
            "name": self._built.name,
            "options": self._config.options,
            **self._built.facts,
            "weights": self._inner.fingerprint["weights"],
        }

    def forward(self, inputs: Mapping[str, Array], taps: Sequence[str] = ()) -> Answer:
        """Return the answers for some samples."""
        if len(inputs) != 1:
            raise ConfigError(
                f"A model of {self._kind} is given one field, and the examples give {sorted(inputs)}.",
                where="examples.fields",
                hint="Choose one: examples.fields: {x: FIELD}.",
            )
        try:
            return self._inner.forward({self._parameter: next(iter(inputs.values()))}, taps)
        except TeacherError as error:
            raise TeacherError(error.what, where=self._built.name, hint=self._built.wants) from error


def library(name: str) -> Any:
    """Return a package.

    Raises:
        ConfigError: It is not installed, or does not import.
    """
    hint = "pip install 'kdcache[vision]'"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name or name).split(".")[0]
        raise ConfigError(f"This teacher needs the package {missing}.", hint=hint) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # torchvision holds compiled code, which loads only beside the build of torch that it was made for
        raise ConfigError(
            f"The package {name} does not import: {first_line(error)}",
            where="teacher.kind",
            hint=f"torchvision must be of the same build as torch, CPU or CUDA: {hint} installs both from one index.",
        ) from error


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Return a model with all of its weights taken from a safetensors file, or from that of a folder.

    Raises:
        AccessError: There is none, or it holds other weights than the model has.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / FILE if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise AccessError(
            "There is no safetensors file of weights.",
            where=str(file),
            hint="Write one by safetensors.torch.save_file(model.state_dict(), FILE); pickled weights are not read.",
        )
    try:
        model.load_state_dict(load_file(file))
    except (SafetensorError, OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise AccessError(
            f"The weights are not the model's: {lines[min(1, len(lines) - 1)].strip()[:200]}",
            where=str(file),
            hint="Set teacher.options to what the model was made with, such as {num_classes: 10}.",
        ) from error
    return model


def made(what: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Return what a constructor makes.

    Raises:
        ConfigError: It refuses its arguments.
    """
    try:
        return make()
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ConfigError(
            f"The model {what} is not made: {first_line(error)}",
            where="teacher.options",
            hint="They are the arguments of the library's constructor.",
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
