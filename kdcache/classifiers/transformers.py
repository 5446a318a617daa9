"""`transformers`: encoders, vision and audio models of the transformers library, by task.

`teacher.task` chooses the head: sequence-classification, token-classification, masked-lm, image-classification,
audio-classification, or encoder (no head: the pooled output stands in for logits, for its features).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kdcache.classifiers import Answer, Array
from kdcache.classifiers.module import ModuleClassifier
from kdcache.errors import AccessError
from kdcache.tasks import model_class
from kdcache.teachers import TeacherConfig
from kdcache.teachers.transformers import state_digest


class TransformersClassifier:
    """See the module."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._class = model_class(config.task)

    @cached_property
    def _inner(self) -> ModuleClassifier:
        try:
            model = self._class.from_pretrained(
                self._config.model,
                revision=self._config.revision,
                trust_remote_code=self._config.trust_remote_code,
                use_safetensors=True,
                attn_implementation="eager",  # the only one that gives attention maps
            )
        except Exception as error:
            raise AccessError(
                f"The model does not load: {str(error).splitlines()[0]}",
                where=self._config.model,
                hint="Give a folder or hub name with config.json and safetensors, and its task.",
            ) from error
        if self._config.task == "encoder":
            model = _Pooled(model)
        return ModuleClassifier(self._config, model)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the weights and the task."""
        model: Any = self._inner._module
        name = Path(self._config.model).name
        return {"kind": "transformers", "name": name, "task": self._config.task, "weights": state_digest(model)}

    def forward(self, inputs: Mapping[str, Array], taps: Sequence[str] = ()) -> Answer:
        """Return the answers for some samples."""
        return self._inner.forward(inputs, taps)


class _Pooled(torch.nn.Module):
    """An encoder whose pooled output, or first token, takes the place of logits."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Any) -> Any:
        out = self.encoder(**inputs)
        pooled = getattr(out, "pooler_output", None)
        out["logits"] = out.last_hidden_state[:, 0] if pooled is None else pooled
        return out


plugin = TransformersClassifier
