"""`served`: a model behind an OpenAI-compatible server: only the log-probabilities of its likeliest tokens are known.

Legend: `S` samples, `L` tokens of a sample, `V` vocabulary.

Servers differ in what they understand and in how they count. What one understands is found out by asking; that its
numbers mean what they should is tested before anything is written: asked twice it must say the same, and what it says
of a token that it echoes must be what it says when it generates at that place.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import AccessError, ConfigError, TeacherError
from kdcache.remotes import Patience
from kdcache.targets.tensor import OutputHead
from kdcache.teachers import Candidates, TeacherConfig, TeacherOutput
from kdcache.teachers._asking import Asking, Understanding
from kdcache.teachers._completions import PATIENCE, Completions, NotAnswered, unusable
from kdcache.teachers._echo import candidates_of
from kdcache.tokenizer import load_tokenizer


class ServedTeacher:
    """A black box: it tells candidates, and neither rows nor features.

    Args:
        config: Its `model` is the server's URL, its `tokenizer` the model's.
        patience: How long the server is waited for.

    Raises:
        ConfigError: There is no tokenizer, or no URL.
    """

    def __init__(self, config: TeacherConfig, patience: Patience = PATIENCE) -> None:
        if config.tokenizer is None:
            raise ConfigError(
                "A server does not give its model's tokenizer.",
                where="teacher.tokenizer",
                hint="Set teacher.tokenizer to the model's folder or hub name.",
            )
        self._config = config
        self._place = Completions(config.model, os.environ.get(config.key_env, "").strip(), patience)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(
            str(self._config.tokenizer),
            revision=self._config.revision,
            trust_remote_code=self._config.trust_remote_code,
        )

    @cached_property
    def _model(self) -> dict[str, Any]:
        """The server's entry of the model, which has at least an id."""
        listed, wanted = self._place.models(), self._config.served_name
        found = [one for one in listed if isinstance(one.get("id"), str) and wanted in (None, one["id"])]
        if found:
            return found[0]
        if wanted is None or listed:
            raise AccessError(
                "The server lists no model." if wanted is None else f"The server has no model {wanted!r}.",
                where=self._place.url,
                hint=f"Set teacher.served_name to one of {[one.get('id') for one in listed][:8]}."
                if listed
                else "See that the URL ends in /v1, and set teacher.served_name.",
            )
        return {"id": wanted}

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size or len(self._tokenizer)

    @property
    def max_length(self) -> int | None:
        limit = self._model.get("max_model_len")
        return limit - 1 if isinstance(limit, int) and limit > 2 else None  # one token is generated

    @property
    def fingerprint(self) -> dict[str, Any]:
        name = str(self._model["id"])
        return {
            "kind": "served",
            # some servers call a model by its file, of which the folder is nobody's business
            "name": PurePosixPath(name).name if name.startswith("/") else name,
            "url": self._place.url,
            "served_name": self._config.served_name,
            "weights": None,
            "top": self._config.top,
            "vocab_size": self.vocab_size,
            "context": self.max_length,
        }

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def tokenizer(self) -> Any:
        return self._tokenizer

    def hidden_width(self, layer: str) -> int:
        self._refuse("targets.hidden")

    def output_head(self) -> OutputHead | None:
        return None

    def forward(self, inputs: Sequence[NDArray[np.int64]], layers: Sequence[str] = ()) -> TeacherOutput:
        self._refuse("teacher")

    def _refuse(self, where: str) -> NoReturn:
        raise ConfigError(
            "A served model tells log-probabilities of a few tokens; it gives no rows and no features.",
            where=where,
            hint="Use a teacher with weights: a folder or a hub name.",
        )

    def tell(self, samples: Sequence[NDArray[np.int64]]) -> list[Candidates]:
        known = self._known
        with ThreadPoolExecutor(self._config.requests, thread_name_prefix="kdcache-ask") as pool:
            return list(pool.map(lambda ids: self._told(ids, known), samples))

    @cached_property
    def _asking(self) -> Asking:
        return Asking(self._place, str(self._model["id"]), self._tokenizer, self._top)

    @cached_property
    def _known(self) -> Understanding:
        return self._asking.understand()

    @property
    def _top(self) -> int:
        return min(self._config.top, self.vocab_size)

    def _told(self, ids: NDArray[np.int64], known: Understanding) -> Candidates:
        try:
            echo = self._asking.echoed(ids, known.dialect)
        except NotAnswered as error:
            raise TeacherError(
                f"The server refuses a sample of {len(ids)} tokens: {error}.",
                where=self._place.url,
                hint="If it is too long for the server, lower samples.max_length.",
            ) from None
        except ValueError as error:
            raise unusable(self._place.url, str(error)) from error
        entries = self._asking.matched(echo, ids, known.dialect, known.spelling)
        if entries is None and known.dialect.ids:
            raise unusable(self._place.url, "its tokens are not those that it was sent")
        if entries is None:
            return _nothing(len(ids), "positions whose text the server cuts into other tokens")
        told = candidates_of(entries, self._top, known.spelling.id_of, early=known.early)
        if (largest := int(told.ids.max(initial=0))) >= self.vocab_size:
            raise TeacherError(
                f"The server names the token {largest}, beyond the vocabulary of {self.vocab_size}.",
                where=self._place.url,
                hint="Set teacher.vocab_size to the length of the model's row, which may exceed its tokenizer's.",
            )
        return told


def _nothing(length: int, why: str) -> Candidates:
    """Return what is known of a sample's tokens where the server has spoken of others."""
    rows = length - 1
    empty = np.full((rows, 1), -np.inf, dtype=np.float32)
    return Candidates(np.zeros((rows, 1), dtype=np.int64), empty, np.full(rows, np.nan, np.float32), {why: rows})


plugin = ServedTeacher
