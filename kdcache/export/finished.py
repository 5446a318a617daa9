"""The student of a finished run, loaded to be exported."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdcache.errors import ConfigError, MismatchError, SourceError, UnsupportedError
from kdcache.evaluate import require_same_tokenizer, says_yes_or_no
from kdcache.export.examples import examples_trial
from kdcache.export.text import Measure, text_trial
from kdcache.export.trial import Inputs, Plain, Trial
from kdcache.fingerprint import digest_file, digest_json
from kdcache.store import Store, open_store
from kdcache.tokenizer import load_tokenizer
from kdcache.train import RESULT, held_out
from kdcache.train.config import DataConfig
from kdcache.train.spans import held_out_by_text
from kdcache.train.student import load_student

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab*",
    "merges.txt",
)


@dataclass(frozen=True)
class Finished:
    """A finished run's student.

    Attributes:
        folder: Of the run.
        model: In the dtype it was saved in, on the CPU, in evaluation mode.
        trial: What it is tried on.
        store: The held-out store of that, or None.
        reload: Loads what was saved of it in another folder.
    """

    folder: Path
    model: nn.Module
    trial: Trial
    store: Store | None
    reload: Callable[[Path], nn.Module]

    @cached_property
    def plain(self) -> Plain:
        """The student in float32: the CPU computes little else, and ONNX runtimes no bfloat16."""
        wide = all(one.dtype == torch.float32 for one in self.model.parameters())
        return Plain(self.model if wide else deepcopy(self.model).float(), self.trial)

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

    def run(self, inputs: Inputs) -> NDArray[np.float32]:
        """Return the logits float32 [S, C] or [S, T, C] of inputs by name, by torch on the CPU."""
        return self.plain.run(inputs)


def load_finished(
    folder: Path, store: Store | None, *, examples: Path | str | None = None, batch_size: int = 8
) -> Finished:
    """Return the student of a run's --out folder, or of any folder with a transformers causal language model.

    Args:
        folder: Of the run.
        store: A held-out store, or None: for a student of examples that of the run.
        examples: Folder of that store's inputs, where they are examples; default: the run's.
        batch_size: Samples of it a batch.

    Raises:
        SourceError: There is no such folder, or no such examples.
        ConfigError: A factory made it, and nothing says for how many outputs; of examples, no store or folder is known.
        MismatchError: Its outputs are not the store's, or its tokenizer is another.
        UnsupportedError: It is no student that this knows how to try.
        AccessError: It does not load.
    """
    if not folder.is_dir():
        raise SourceError("There is no such folder.", where=str(folder), hint="Give the --out of `kdcache train`.")
    record = json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {}
    config: dict[str, Any] = record.get("config") or {}
    if (config.get("data") or {}).get("examples") is not None:
        return _of_examples(folder, record, store, examples, batch_size)
    _require_language_model(folder, store, examples)
    factory = (config.get("student") or {}).get("factory")
    vocab_size = record.get("outputs") or (0 if store is None else store.vocab_size)
    if factory is not None and vocab_size == 0:
        raise ConfigError(
            "The student was made by a factory, and nothing says for which vocabulary.",
            where=str(folder),
            hint="Give a store of its teacher with --store.",
        )
    load = partial(load_student, factory=factory, vocab_size=vocab_size)
    model = load(folder).eval()
    if factory is None:
        vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    measure: Measure | None = None
    if store is not None and (config.get("student") or {}).get("tokenizer"):
        tokenizer = load_tokenizer(str(folder))
        measure = partial(held_out_by_text, store=store, tokenizer=tokenizer, batch_size=batch_size)
    elif store is not None:
        _require_same_vocabulary(folder, vocab_size, store)
        measure = partial(held_out, store=store, batch_size=batch_size)
    return Finished(folder, model, text_trial(model, vocab_size, measure), store, load)


def _require_same_vocabulary(folder: Path, vocab_size: int, store: Store) -> None:
    if vocab_size < store.vocab_size:
        raise MismatchError(
            f"The student knows {vocab_size} ids, and the store's vocabulary is {store.vocab_size}.",
            where=store.location,
            hint="Measure it on a store of its own teacher.",
        )
    require_same_tokenizer(folder, store.manifest.part("tokenizer"))


def _of_examples(
    folder: Path, record: dict[str, Any], store: Store | None, examples: Path | str | None, batch_size: int
) -> Finished:
    data = DataConfig(**record["config"]["data"])
    if examples is not None:
        data = data.model_copy(update={"examples": str(examples), "validation_examples": None})
    if store is None:
        if data.validation is None:
            raise ConfigError(
                "The student was trained on examples, and nothing says which it is to be tried on.",
                where=str(folder),
                hint="Give a held-out store with --store and its inputs with --examples.",
            )
        store = open_store(data.validation)
    outputs = record.get("outputs", store.vocab_size)
    if store.manifest.kind != "classifier" or store.vocab_size != outputs:
        raise MismatchError(
            f"The student gives {outputs} outputs to each example; the store is of kind {store.manifest.kind}, with "
            f"{store.vocab_size}.",
            where=store.location,
            hint="Measure it on a store of its own teacher.",
        )
    student = record["config"]["student"]
    load = partial(
        load_student,
        factory=student["factory"],
        vocab_size=outputs,
        task=student["task"] or "sequence-classification",
    )
    model = load(folder).eval()
    trial = examples_trial(model, store, data, batch_size=batch_size, yes_no=says_yes_or_no(record["config"]))
    return Finished(folder, model, trial, store, load)


def _require_language_model(folder: Path, store: Store | None, examples: Path | str | None) -> None:
    """Refuse any other: read as a causal language model, its body would load and its head would be random."""
    path = folder / "config.json"
    names = (json.loads(path.read_text()).get("architectures") or []) if path.is_file() else []
    causal = all(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if not causal or examples is not None or (store is not None and store.manifest.kind != "causal_lm"):
        raise UnsupportedError(
            "This is neither a causal language model nor the run of a student of examples.",
            where=str(folder),
            hint="Of other models give the --out of a finished `kdcache train`: its record says what goes into them.",
        )
