"""The student of a finished run, loaded to be exported.

Legend: `S` samples, `T` tokens, `V` outputs of the student.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.errors import ConfigError, MismatchError, SourceError, UnsupportedError
from kdcache.evaluate import require_same_tokenizer
from kdcache.fingerprint import digest_file, digest_json
from kdcache.store import Store, open_store
from kdcache.train import RESULT
from kdcache.train.student import load_student

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab*",
    "merges.txt",
)

LENGTHS = (128, 64, 32, 16, 8, 4, 2)
"""Tokens that a student made by a factory is tried with, to learn how long its inputs may be."""

Logits = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""From input ids [S, T] and attention mask [S, T] to logits [S, T, V]."""


class Plain(nn.Module):
    """A student as a function of two tensors that gives one: what is traced, and what exports are compared with."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        # of transformers models only: their cache would be further outputs
        self._options: dict[str, Any] = {"use_cache": False} if hasattr(student, "save_pretrained") else {}
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits [S, T, V] of ids [S, T] under a mask [S, T]."""
        out = self.student(input_ids, attention_mask, **self._options)
        return out if isinstance(out, Tensor) else out.logits


@dataclass(frozen=True)
class Finished:
    """A finished run's student.

    Attributes:
        folder: Of the run.
        model: In the dtype it was saved in, on the CPU, in evaluation mode.
        vocab_size: Ids that may be put in.
    """

    folder: Path
    model: nn.Module
    vocab_size: int

    @cached_property
    def plain(self) -> Plain:
        """The student in float32: the CPU computes little else, and ONNX runtimes no bfloat16."""
        wide = all(one.dtype == torch.float32 for one in self.model.parameters())
        return Plain(self.model if wide else deepcopy(self.model).float())

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest input, at most 128 of a student made by a factory."""
        if hasattr(self.model, "save_pretrained"):
            config: Any = self.model.config
            return int(getattr(config.get_text_config(), "max_position_embeddings", LENGTHS[0]))
        for length in LENGTHS:
            ids = np.zeros((1, length), dtype=np.int64)
            try:
                self.logits(ids, np.ones_like(ids))
            except (IndexError, RuntimeError):
                continue
            return length
        raise UnsupportedError("The student takes no input of 2 to 128 tokens.", where=str(self.folder))

    @property
    def weights(self) -> list[Path]:
        """Files of its weights, in the order of their names."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def digest(self) -> str:
        """Identity of its weights."""
        return digest_json({path.name: digest_file(path) for path in self.weights})

    @property
    def tokenizer_files(self) -> list[Path]:
        """What reloads its tokenizer, if the run folder has it."""
        return sorted({path for name in TOKENIZER_FILES for path in self.folder.glob(name) if path.is_file()})

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits float32 [S, T, V] of ids [S, T] under a mask [S, T], by torch on the CPU."""
        return torch_logits(self.plain)(input_ids, attention_mask)


def torch_logits(model: nn.Module) -> Logits:
    """Return a model's forward pass on numpy arrays."""

    def run(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            out: Tensor = model(torch.from_numpy(input_ids), torch.from_numpy(attention_mask))
        return out.float().numpy()

    return run


def load_finished(folder: Path, store: Store | None) -> Finished:
    """Return the student of a run's --out folder, or of any folder with a transformers causal language model.

    Args:
        folder: Of the run.
        store: A held-out store, or None.

    Raises:
        SourceError: There is no such folder.
        ConfigError: A factory made it, and nothing says for which vocabulary.
        MismatchError: Its vocabulary is smaller than the store's, or its tokenizer another.
        UnsupportedError: It takes something else than token ids.
        AccessError: It does not load.
    """
    if not folder.is_dir():
        raise SourceError("There is no such folder.", where=str(folder), hint="Give the --out of `kdcache train`.")
    record = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {"config": {}}
    config: dict[str, Any] = record["config"]
    student = config.get("student") or {}
    _require_language_model(folder, student, store)
    factory = student.get("factory")
    vocab_size = 0 if factory is None else _told(store, config, folder)
    model = load_student(folder, factory, vocab_size).eval()
    if factory is None:
        vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if store is not None:
        if vocab_size < store.vocab_size:
            raise MismatchError(
                f"The student knows {vocab_size} ids, and the store's vocabulary is {store.vocab_size}.",
                where=store.location,
                hint="Measure it on a store of its own teacher.",
            )
        require_same_tokenizer(folder, store.manifest.part("tokenizer"))
    return Finished(folder, model, vocab_size)


def _require_language_model(folder: Path, student: dict[str, Any], store: Store | None) -> None:
    """Refuse a classifier: read as a causal language model, its body would load and its head would be random."""
    path = folder / "config.json"
    names = (json.loads(path.read_text()).get("architectures") or []) if path.is_file() else []
    causal = all(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if student.get("task") or not causal or (store is not None and store.manifest.kind != "causal_lm"):
        raise UnsupportedError(
            "This is a classifier's student or store, and only causal language models are exported.",
            where=str(folder),
            hint="Its folder is what transformers or its factory loads.",
        )


def _told(store: Store | None, config: dict[str, Any], folder: Path) -> int:
    """Return the vocabulary that a factory is called with: the run did not write it down, its stores know it."""
    if store is not None:
        return store.vocab_size
    validation = (config.get("data") or {}).get("validation")
    if validation is None:
        raise ConfigError(
            "The student was made by a factory, and nothing says for which vocabulary.",
            where=str(folder),
            hint="Give a store of its teacher with --store.",
        )
    return open_store(validation).vocab_size
