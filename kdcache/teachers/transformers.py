"""`transformers`: any causal language model of the transformers library: a folder, a hub name or a GGUF file.

Legend: `S` samples, `T` padded length, `N` positions, `D` hidden width, `V` vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.errors import AccessError, ConfigError, TeacherError
from kdcache.fingerprint import digest_file, digest_json, digest_parts
from kdcache.taps import MAP, attend_openly, of_layer, read
from kdcache.targets.tensor import OutputHead
from kdcache.teachers import TeacherConfig, TeacherOutput, choose_device, padded
from kdcache.teachers.gguf import convert, find_gguf
from kdcache.tokenizer import load_tokenizer

PROBE = (5, 1, 4, 2, 3, 6, 0, 7)
"""Ids of the input on which the output layer is compared with the model's own logits."""


class TransformersTeacher:
    """A causal language model run to its last hidden state; the output layer is applied tile by tile later."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._device = choose_device(config.device)
        file = find_gguf(config.model, config.gguf_file)
        self._name = Path(config.model).name if Path(config.model).exists() else config.model
        self._folder = str(convert(file)) if file else config.model
        self._settings = self._load_settings()
        self._widths: dict[str, int] = {}

    @property
    def vocab_size(self) -> int:
        return int(self._text.vocab_size)

    @property
    def max_length(self) -> int | None:
        limit = getattr(self._text, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
        kept = {key: value for key, value in self._settings.to_dict().items() if key not in left_out}
        return {
            "kind": "transformers",
            "name": self._name,
            "architecture": (self._settings.architectures or [self._settings.model_type])[0],
            "revision": getattr(self._settings, "_commit_hash", None),
            "weights": self._weights_digest(),
            "config": digest_json(kept),
            "dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": self.vocab_size,
            "context": self.max_length,
        }

    @property
    def dtype(self) -> torch.dtype:
        if self._config.dtype != "auto":
            return getattr(torch, self._config.dtype)  # type: ignore[no-any-return]
        found = getattr(self._settings, "dtype", None)
        return found if isinstance(found, torch.dtype) else getattr(torch, str(found or "float32"))

    def tokenizer(self) -> Any:
        return load_tokenizer(
            self._config.tokenizer or self._folder,
            revision=None if self._config.tokenizer else self._config.revision,
            trust_remote_code=self._config.trust_remote_code,
        )

    def hidden_width(self, layer: str) -> int:
        layers = int(self._text.num_hidden_layers)
        if layer in ("final", "embedding") or (layer.isdigit() and 1 <= int(layer) <= layers):
            return int(self._text.hidden_size)
        try:
            if "." not in layer:
                raise ConfigError(f"The teacher has no layer {layer!r}.")
            if layer not in self._widths:
                probe = np.asarray(PROBE) % self.vocab_size
                self._widths[layer] = int(self.forward([probe], [layer]).hidden[layer].shape[1])
        except ConfigError as error:
            raise ConfigError(
                error.what,
                where="targets.hidden",
                hint=f"It has final, embedding, 1 to {layers}, {MAP}0 to {layers - 1}, and submodules by their paths, "
                f"such as {self._example}.",
            ) from error
        return self._widths[layer]

    def output_head(self) -> OutputHead | None:
        return self._head

    @cached_property
    def model(self) -> Any:
        """The model on its device, loaded when first asked for; without gradients, keeping no keys and values.

        Raises:
            AccessError: It does not load.
        """
        from transformers import AutoModelForCausalLM

        try:
            # first used inside inference mode, whose tensors a student's autograd could not read later
            with torch.inference_mode(False):
                model = AutoModelForCausalLM.from_pretrained(
                    self._folder,
                    dtype=self.dtype,
                    revision=self._config.revision,
                    trust_remote_code=self._config.trust_remote_code,
                    use_safetensors=True,
                )
                model = model.to(self._device).eval().requires_grad_(False)
                model.config.get_text_config().use_cache = False  # nothing is generated: keys and values are not kept
        except Exception as error:
            raise AccessError(
                f"The teacher does not load: {str(error).splitlines()[0]}",
                where=self._config.model,
                hint="It must be a causal language model with safetensors weights.",
            ) from error
        return model

    @torch.inference_mode()
    def forward(self, inputs: Sequence[NDArray[np.int64]], layers: Sequence[str] = ()) -> TeacherOutput:
        ids, mask, places = padded(inputs, self._device)
        taps = {layer: of_layer(layer) for layer in layers if layer != "final" or self._head is None}
        if any(layer.startswith(MAP) for layer in layers):
            attend_openly(self.model)
        body = self.model.base_model
        try:
            if self._head is None:
                given = {"input_ids": ids, "attention_mask": mask.long()}
                out, found = read(self.model, given, list(taps.values()), inside=body)
                rows = out.logits.flatten(0, 1)[places]
            else:
                # right padding cannot reach earlier positions of a causal model: no attention mask is needed
                # what is compiled has no submodules to look into
                listed = all(tap.startswith("hidden_states.") for tap in taps.values())
                out, found = read(self._body if listed else body, {"input_ids": ids}, list(taps.values()))
                rows = out.last_hidden_state.flatten(0, 1)[places]
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise TeacherError(f"The teacher failed: {error}.", where=self._name) from error
        hidden = {layer: self._flat(layer, found[tap], ids, places) for layer, tap in taps.items()}
        return TeacherOutput(rows, self._head, {layer: hidden.get(layer, rows) for layer in layers})

    def _flat(self, layer: str, values: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        if values.ndim != 3 or values.shape[:2] != ids.shape:
            raise ConfigError(
                f"{layer!r} gives {list(values.shape)}, not one row for each of {list(ids.shape)} tokens."
            )
        return values.flatten(0, 1)[places]

    @property
    def _example(self) -> str:
        """A submodule that gives something of every token."""
        linear = [name for name, one in self.model.base_model.named_modules() if isinstance(one, torch.nn.Linear)]
        return linear[len(linear) // 2] if linear else "layers.0"

    @property
    def _text(self) -> Any:
        """The language part of a configuration that may hold several."""
        return self._settings.get_text_config()

    def _load_settings(self) -> Any:
        try:
            from transformers import AutoConfig
        except ImportError as error:
            raise ConfigError(
                "This teacher needs the package transformers.", hint="Run: pip install 'kdcache[teacher]'"
            ) from error
        try:
            return AutoConfig.from_pretrained(
                self._folder, revision=self._config.revision, trust_remote_code=self._config.trust_remote_code
            )
        except Exception as error:
            raise AccessError(
                f"The teacher cannot be found: {str(error).splitlines()[0]}",
                where=self._config.model,
                hint="Give a folder with config.json and safetensors, a hub name, or a GGUF file.",
            ) from error

    @cached_property
    def _body(self) -> Any:
        body = self.model.base_model
        return torch.compile(body) if self._config.compile else body

    @cached_property
    @torch.inference_mode()
    def _head(self) -> OutputHead | None:
        layer = self.model.get_output_embeddings()
        if layer is None or not isinstance(layer, torch.nn.Linear):
            return None
        scaling = getattr(self._text, "logits_scaling", None)
        scale = getattr(self._text, "logit_scale", None) or (1 / scaling if scaling else 1.0)
        head = OutputHead(layer.weight, layer.bias, float(scale), getattr(self._text, "final_logit_softcapping", None))
        ids = torch.tensor([PROBE], device=self._device) % self.vocab_size
        own = self.model(input_ids=ids).logits.float()
        ours = head.logits(self.model.base_model(input_ids=ids).last_hidden_state).float()
        # a model that does more than scale and cap its logits is run to its own logits instead
        close = own.shape == ours.shape and bool((own - ours).abs().max() <= 0.02 * own.abs().max().clamp(min=1))
        return head if close else None

    def _weights_digest(self) -> str:
        folder = Path(self._folder)
        if folder.is_dir():
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                raise AccessError(
                    "The teacher's folder has no safetensors file.",
                    where=str(folder),
                    hint="Save the model with save_pretrained; pickled weights are not read.",
                )
            return digest_json([digest_file(file) for file in files])
        return state_digest(self.model)


def state_digest(model: torch.nn.Module) -> str:
    """Return the identity of a model's weights: names, dtypes, shapes and bytes, in order of names."""
    return digest_parts(
        part
        for name, tensor in sorted(model.state_dict().items())
        for part in (
            f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(),
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    )


plugin = TransformersTeacher
