"""`transformers`: encoders, vision and audio models of the transformers library, by task.

`teacher.task` chooses the head: sequence-classification, token-classification, masked-lm, image-classification,
audio-classification, ctc (speech, an answer a frame), or encoder (no head: the pooled output stands in for logits, for
its features).
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

OF_TRAINING = "masked_spec_embed"
"""Ends the name of a weight that only training uses, and that checkpoints of sound models often lack."""


class TransformersClassifier:
    """See the module."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._class = model_class(config.task)

    @cached_property
    def _inner(self) -> ModuleClassifier:
        try:
            model, loaded = self._class.from_pretrained(
                self._config.model,
                revision=self._config.revision,
                trust_remote_code=self._config.trust_remote_code,
                use_safetensors=True,
                attn_implementation="eager",  # the only one that gives attention maps
                output_loading_info=True,
            )
        except Exception as error:
            raise AccessError(
                f"The model does not load: {str(error).splitlines()[0]}",
                where=self._config.model,
                hint="Give a folder or hub name with config.json and safetensors, and its task.",
            ) from error
        self._require_whole(model, set(loaded["missing_keys"]))
        if self._config.task == "encoder":
            model = _Pooled(model)
        return ModuleClassifier(self._config, model)

    def _require_whole(self, model: Any, missing: set[str]) -> None:
        """Refuse weights that were drawn at random, and set those that no answer depends on."""
        for name in [one for one in missing if one.endswith(OF_TRAINING)]:
            model.get_parameter(name).data.zero_()
            missing.remove(name)
        if self._config.task == "encoder" and missing and all("pooler" in one.split(".") for one in missing):
            model.pooler = None  # the first token stands in for it
            missing.clear()
        if missing:
            raise AccessError(
                f"The checkpoint has no weights for {', '.join(sorted(missing)[:4])}: they would be random.",
                where=self._config.model,
                hint="Set teacher.task to what the checkpoint was trained for.",
            )

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
