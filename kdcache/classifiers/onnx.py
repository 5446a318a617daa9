"""`onnx`: a model file run by onnxruntime; its first output is the logits, others are features by their names."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.classifiers import Answer, Array
from kdcache.errors import AccessError, ConfigError, TeacherError
from kdcache.fingerprint import digest_file
from kdcache.teachers import TeacherConfig

KINDS: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
KINDS |= {"tensor(int32)": np.int32, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_}


class OnnxClassifier:
    """See the module. Inputs are cast to the types that the file asks for."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._path = Path(config.model)

    @cached_property
    def _session(self) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError("This teacher needs onnxruntime.", hint="pip install 'kdcache[onnx]'") from error
        onnxruntime.set_default_logger_severity(3)
        try:
            return onnxruntime.InferenceSession(str(self._path), providers=onnxruntime.get_available_providers())
        except Exception as error:
            raise AccessError(
                f"The model does not load: {str(error).splitlines()[0]}",
                where=str(self._path),
                hint="Give an .onnx file.",
            ) from error

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the file."""
        if not self._path.is_file():
            raise AccessError("There is no such file.", where=str(self._path))
        return {"kind": "onnx", "name": self._path.name, "weights": digest_file(self._path)}

    def forward(self, inputs: Mapping[str, Array], taps: Sequence[str] = ()) -> Answer:
        """Return the answers for some samples."""
        wanted = {one.name: KINDS.get(one.type) for one in self._session.get_inputs()}
        names = [one.name for one in self._session.get_outputs()]
        if set(wanted) - set(inputs):
            raise ConfigError(
                f"The model wants {sorted(wanted)}, and the examples give {sorted(inputs)}.",
                where="examples.fields",
                hint="Write examples.fields: {MODEL_INPUT: FIELD}.",
            )
        if unknown := [tap for tap in taps if tap not in names]:
            raise ConfigError(f"The model has no output {unknown[0]!r}.", where="targets", hint=f"It has {names}.")
        feed = {name: inputs[name].astype(kind or inputs[name].dtype) for name, kind in wanted.items()}
        try:
            found = dict(zip(names, self._session.run(None, feed), strict=True))
        except Exception as error:
            raise TeacherError(f"The model failed: {str(error).splitlines()[0]}", where=str(self._path)) from error
        return Answer(torch.from_numpy(found[names[0]]), {tap: torch.from_numpy(found[tap]) for tap in taps})


plugin = OnnxClassifier
