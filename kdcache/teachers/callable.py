"""`callable`: any function or nn.Module from token ids to logits.

Legend: `S` samples, `T` padded length, `N` positions, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache import registry
from kdcache.errors import ConfigError, TeacherError
from kdcache.targets.tensor import OutputHead
from kdcache.teachers import TeacherConfig, TeacherOutput, choose_device, padded
from kdcache.teachers.transformers import state_digest
from kdcache.tokenizer import load_tokenizer


class CallableTeacher:
    """Runs `function(input_ids [S, T], attention_mask [S, T]) -> logits [S, T, V]` (or an object with `.logits`).

    An object with `.hidden` (a mapping of layer name to [S, T, D]) also gives features.

    Args:
        config: Its `model` names the function, unless one is given.
        function: The function or module itself.
    """

    def __init__(self, config: TeacherConfig, function: Callable[..., Any] | None = None) -> None:
        self._config = config
        self._device = choose_device(config.device)
        self._function = function or find(config.model)
        if isinstance(self._function, torch.nn.Module):
            self._function = self._function.to(self._device).eval().requires_grad_(False)
            if config.dtype != "auto":
                self._function = self._function.to(getattr(torch, config.dtype))

    @cached_property
    def _probe(self) -> TeacherOutput:
        return self._run([np.zeros(1, dtype=np.int64)], ())

    @property
    def vocab_size(self) -> int:
        return self._probe.rows.shape[1]

    @property
    def max_length(self) -> int | None:
        limit = getattr(self._function, "max_length", None)
        return None if limit is None else int(limit)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        module = isinstance(self._function, torch.nn.Module)
        name = type(self._function).__qualname__ if module else getattr(self._function, "__qualname__", "callable")
        return {
            "kind": "callable",
            "name": name,
            "weights": state_digest(self._function) if isinstance(self._function, torch.nn.Module) else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": self.vocab_size,
            "context": self.max_length,
        }

    @property
    def dtype(self) -> torch.dtype:
        return self._probe.rows.dtype

    def tokenizer(self) -> Any:
        if self._config.tokenizer is None:
            return None
        return load_tokenizer(self._config.tokenizer, trust_remote_code=self._config.trust_remote_code)

    def hidden_width(self, layer: str) -> int:
        _, hidden = self._call([np.zeros(1, dtype=np.int64)])
        if layer not in hidden:
            raise ConfigError(
                f"The teacher gives no layer {layer!r}.", where="targets.hidden", hint=f"It gives {sorted(hidden)}."
            )
        return hidden[layer].shape[-1]

    def output_head(self) -> OutputHead | None:
        return None

    def forward(self, inputs: Sequence[NDArray[np.int64]], layers: Sequence[str] = ()) -> TeacherOutput:
        return self._run(inputs, layers)

    def _run(self, inputs: Sequence[NDArray[np.int64]], layers: Sequence[str]) -> TeacherOutput:
        logits, hidden = self._call(inputs)
        ids, _, places = padded(inputs, self._device)
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise TeacherError(
                f"The teacher gave logits of shape {tuple(logits.shape)} for inputs of {tuple(ids.shape)}.",
                where=self._config.model,
                hint="It must return [samples, tokens, vocabulary].",
            )
        return TeacherOutput(
            logits.flatten(0, 1)[places], None, {layer: hidden[layer].flatten(0, 1)[places] for layer in layers}
        )

    @torch.inference_mode()
    def _call(self, inputs: Sequence[NDArray[np.int64]]) -> tuple[Tensor, dict[str, Tensor]]:
        ids, mask, _ = padded(inputs, self._device)
        try:
            out = self._function(ids, mask)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError):
            raise  # the capture halves the batch on out-of-memory
        except Exception as error:
            raise TeacherError(
                f"The teacher failed: {type(error).__name__}: {error}.", where=self._config.model
            ) from error
        logits = out if isinstance(out, Tensor) else out.logits
        return logits, dict(getattr(out, "hidden", None) or {})


def find(path: str) -> Callable[..., Any]:
    """Return what `module:attribute` names; `module:attribute()` returns what calling it gives.

    Raises:
        ConfigError: There is no such module or attribute, or it cannot be called.
    """
    call = path.endswith("()")
    try:
        found = registry.attribute(path.removesuffix("()"))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"There is no {path!r}: {error}.", where="teacher.model", hint="Write it as module:attribute."
        ) from error
    found = found() if call else found
    if not callable(found):
        raise ConfigError(f"{path!r} cannot be called.", where="teacher.model")
    return found  # type: ignore[no-any-return]


plugin = CallableTeacher
