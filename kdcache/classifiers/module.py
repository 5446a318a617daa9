"""`module`: any nn.Module or function by `module:attribute`; `module:attribute()` calls it first.

Called with the inputs by name, as tensors on its device: floats in the dtype of its weights, uint8 as it is, other
whole numbers as int64.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from kdcache.classifiers import Answer, Array, as_tensor
from kdcache.errors import ConfigError, TeacherError
from kdcache.taps import run
from kdcache.teachers import TeacherConfig, choose_device, upload
from kdcache.teachers.callable import find
from kdcache.teachers.transformers import state_digest


class ModuleClassifier:
    """See the module.

    Args:
        config: Its `model` names the module, unless one is given.
        module: The nn.Module or function itself.
    """

    def __init__(self, config: TeacherConfig, module: Callable[..., Any] | None = None) -> None:
        self._config = config
        self._device = choose_device(config.device)
        self._module: Any = module or find(config.model)
        self._floats: torch.dtype | None = None
        if isinstance(self._module, torch.nn.Module):
            self._module = self._module.to(self._device).eval().requires_grad_(False)
            if config.dtype != "auto":
                self._module = self._module.to(getattr(torch, config.dtype))
            dtypes = (one.dtype for one in self._module.parameters() if one.is_floating_point())
            self._floats = next(dtypes, None)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the weights."""
        own = isinstance(self._module, torch.nn.Module)
        name = type(self._module).__qualname__ if own else getattr(self._module, "__qualname__", "callable")
        return {"kind": "module", "name": name, "weights": state_digest(self._module) if own else None}

    @torch.inference_mode()
    def forward(self, inputs: Mapping[str, Array], taps: Sequence[str] = ()) -> Answer:
        """Return the answers for some samples."""
        tensors = {name: self._given(one) for name, one in inputs.items()}
        try:
            return Answer(*run(self._module, tensors, taps))
        except (torch.OutOfMemoryError, MemoryError, ConfigError, TeacherError):
            raise
        except Exception as error:
            raise TeacherError(
                f"The model failed: {type(error).__name__}: {error}.", where=self._config.model
            ) from error

    def _given(self, values: Array) -> torch.Tensor:
        tensor = upload(torch.from_numpy(as_tensor(values)), self._device)
        return tensor.to(self._floats) if self._floats is not None and tensor.is_floating_point() else tensor


plugin = ModuleClassifier
