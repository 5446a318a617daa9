"""`student`: what `kdcache train` made from a classifier's store, as a teacher; `teacher.model` is the run's folder.

`teacher.checkpoint` takes a snapshot of the run in place of its end, as long as the run keeps it (the last two).
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kdcache.classifiers import Answer, Array
from kdcache.classifiers.module import ModuleClassifier
from kdcache.errors import AccessError, ConfigError
from kdcache.tasks import model_class
from kdcache.teachers import TeacherConfig
from kdcache.teachers.callable import find

RESULT = "train.json"
"""What a finished run leaves behind; that of `kdcache.train`, which may not be imported where a teacher runs."""

OF_STUDENT = "student."
"""Before the names of a checkpoint's weights that are the student's; others are of its projectors."""


class StudentClassifier:
    """See the module.

    Args:
        config: Its `model` is the `--out` folder of a finished run.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._folder = Path(config.model)

    @cached_property
    def _inner(self) -> ModuleClassifier:
        document = self._document()
        own: dict[str, Any] = document["config"]["student"]
        try:
            if own["factory"] is not None:
                model = find(own["factory"])(vocab_size=document["outputs"])
                if self._config.checkpoint is None:
                    from safetensors.torch import load_model

                    load_model(model, str(self._folder / "model.safetensors"))
            else:
                model = model_class(own["task"] or "sequence-classification").from_pretrained(
                    str(self._folder), use_safetensors=True, attn_implementation="eager"
                )
            if self._config.checkpoint is not None:
                self._load_snapshot(model, self._config.checkpoint)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise AccessError(
                f"The student does not load: {(str(error).splitlines() or [type(error).__name__])[0]}",
                where=str(self._folder),
                hint="Its code must be the one that it was trained with; else train it again.",
            ) from error
        return ModuleClassifier(self._config, model)

    def _document(self) -> dict[str, Any]:
        path = self._folder / RESULT
        if not path.is_file():
            raise AccessError(
                "There is no student of a finished run here.",
                where=str(self._folder),
                hint="Give the --out folder of a `kdcache train` that has ended.",
            )
        document: dict[str, Any] = json.loads(path.read_text())
        if document["config"]["data"]["examples"] is None:
            raise ConfigError(
                "This student was trained on text, and teachers of kind student answer for examples.",
                where=str(self._folder),
                hint="With `source`, give its folder to teacher.kind: transformers; one made by student.factory has "
                "no such folder, and is captured by a function of yours as teacher.kind: callable.",
            )
        return document

    def _load_snapshot(self, model: torch.nn.Module, step: int) -> None:
        from safetensors.torch import load_file

        folder = self._folder / "checkpoints"
        path = folder / f"step-{step:08d}" / "model.safetensors"
        if not path.is_file():
            kept = ", ".join(str(int(one.name.removeprefix("step-"))) for one in sorted(folder.glob("step-*")))
            raise ConfigError(
                f"The run keeps no checkpoint of step {step}.",
                where="teacher.checkpoint",
                hint=f"It keeps {kept or 'none'}.",
            )
        loaded = load_file(path)
        own = {name.removeprefix(OF_STUDENT): value for name, value in loaded.items() if name.startswith(OF_STUDENT)}
        # tied weights stand in a checkpoint once, under their first name
        missing, unknown = model.load_state_dict(own, strict=False)
        state = model.state_dict()
        given = {state[name].data_ptr() for name in own if name in state}
        if unknown or any(state[name].data_ptr() not in given for name in missing):
            raise AccessError("The checkpoint's weights are not the student's.", where=str(path))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the weights."""
        return {**self._inner.fingerprint, "kind": "student"}

    def forward(self, inputs: Mapping[str, Array], taps: Sequence[str] = ()) -> Answer:
        """Return the answers for some samples."""
        return self._inner.forward(inputs, taps)


plugin = StudentClassifier
