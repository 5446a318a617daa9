"""`vllm`: a model run by vLLM in this process, for its log-probabilities alone: fast, and only the likeliest are known.

Legend: `L` tokens of a sample, `V` vocabulary.
"""

import importlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import ConfigError, TeacherError
from kdcache.targets.tensor import OutputHead
from kdcache.teachers import Candidates, TeacherConfig, TeacherOutput
from kdcache.teachers._echo import Entry, candidates_of
from kdcache.teachers._spelling import BY_ID
from kdcache.teachers.gguf import convert, find_gguf
from kdcache.teachers.transformers import TransformersTeacher


class VllmTeacher:
    """A black box: it tells candidates, and neither rows nor features. Its fingerprint has the model's own digests.

    Args:
        config: As of a transformers teacher; `top` is how many log-probabilities are asked for.

    Raises:
        ConfigError: vllm is not installed.
        AccessError: The model is not there.
    """

    def __init__(self, config: TeacherConfig) -> None:
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigError(
                "This teacher needs the package vllm.",
                where="teacher.kind",
                hint="Run: pip install vllm (it needs an accelerator), or serve the model and give its URL.",
            ) from error
        file = find_gguf(config.model, config.gguf_file)
        self._folder = str(convert(file)) if file else config.model
        self._config = config
        # its configuration and tokenizer; it never loads weights that vLLM loads, but for a hub model's digest
        self._described = TransformersTeacher(config.model_copy(update={"device": "cpu"}))

    @property
    def vocab_size(self) -> int:
        return self._described.vocab_size

    @property
    def max_length(self) -> int | None:
        limit = self._described.max_length
        return None if limit is None else limit - 1  # vLLM always generates one token

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        local = Path(self._folder).is_dir()
        named = {"name": self._config.model, "weights": None, "revision": self._config.revision}
        known = self._described.fingerprint if local else named
        return {**known, "kind": "vllm", "top": self._config.top, "vocab_size": self.vocab_size}

    @property
    def dtype(self) -> torch.dtype:
        return self._described.dtype

    def tokenizer(self) -> Any:
        return self._described.tokenizer()

    def hidden_width(self, layer: str) -> int:
        self._refuse("targets.hidden")

    def output_head(self) -> OutputHead | None:
        return None

    def forward(self, inputs: Sequence[NDArray[np.int64]], layers: Sequence[str] = ()) -> TeacherOutput:
        self._refuse("teacher")

    def _refuse(self, where: str) -> NoReturn:
        raise ConfigError(
            "vLLM gives log-probabilities of a few tokens; it gives no rows and no features.",
            where=where,
            hint="Use teacher.kind=transformers.",
        )

    @cached_property
    def _engine(self) -> Any:
        config = self._config
        try:
            return self._vllm.LLM(
                model=self._folder,
                tokenizer=config.tokenizer or self._folder,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=config.dtype,
                max_logprobs=config.top,
                # before any processing: what a temperature or a penalty would make of them is not asked for
                logprobs_mode="raw_logprobs",
            )
        except Exception as error:
            raise TeacherError(
                f"vLLM does not load the model: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
                where=config.model,
                hint="Its own log says more.",
            ) from error

    def tell(self, samples: Sequence[NDArray[np.int64]]) -> list[Candidates]:
        top = min(self._config.top, self.vocab_size)
        asked = self._vllm.SamplingParams(max_tokens=1, prompt_logprobs=top, temperature=1.0, detokenize=False)
        prompts = [{"prompt_token_ids": [int(one) for one in ids]} for ids in samples]
        engine = self._engine
        try:
            answers = engine.generate(prompts, asked, use_tqdm=False)
        except Exception as error:
            raise TeacherError(f"vLLM failed: {type(error).__name__}: {error}.", where=self._config.model) from error
        told = [answer.prompt_logprobs for answer in answers]
        for ids, rows in zip(samples, told, strict=True):
            # the label is always among what is told of its place: an answer without it is about other tokens
            if (
                not rows
                or len(rows) != len(ids)
                or any(int(token) not in (row or {}) for token, row in zip(ids[1:], rows[1:], strict=True))
            ):
                raise TeacherError(
                    "vLLM's log-probabilities are not those of the sample's tokens.",
                    where=self._config.model,
                    hint="Use a release of vLLM that has SamplingParams.prompt_logprobs.",
                )
        return [
            candidates_of(
                [_entry(row, int(token)) for row, token in zip(rows, ids, strict=True)], top, _id, early=False
            )
            for rows, ids in zip(told, samples, strict=True)
        ]


def _entry(row: Any, token: int) -> Entry:
    if row is None:  # nothing stands before the first token
        return Entry()
    numbers = {int(number): float(one.logprob) for number, one in row.items()}
    return Entry(numbers[token], {f"{BY_ID}{number}": value for number, value in numbers.items()})


def _id(name: str) -> int:
    return int(name.removeprefix(BY_ID))


plugin = VllmTeacher
