"""Which id a server means by a text: servers name tokens by what they decode to, each in its own manner.

Legend: `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.tokenizer import token_bytes

K = TypeVar("K", str, bytes)

BY_ID = "token_id:"
"""How vLLM names a token by its id, when asked to."""

BY_BYTES = "bytes:"
"""How OpenAI names a token whose bytes are no text: as `bytes:\\xe2\\x80`."""

UNKNOWN = "�"
"""What stands for bytes that are no text."""


class Spelling:
    """The texts of a vocabulary in one manner of writing them.

    Args:
        tokenizer: A transformers tokenizer.
        manner: decoded (as the tokenizer decodes one id), bytes (its bytes as text, left out where they are none) or
            piece (as it stands in the vocabulary).
    """

    def __init__(self, tokenizer: Any, manner: str) -> None:
        self.manner = manner
        self._bytes = token_bytes(tokenizer)
        self._special = {int(one) for one in tokenizer.all_special_ids}
        self._special |= {int(one) for one in getattr(tokenizer, "added_tokens_decoder", {})}
        spell: dict[str, Callable[[], Sequence[str]]] = {
            "decoded": lambda: tokenizer.batch_decode(
                [[one] for one in range(len(self._bytes))],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            ),
            "bytes": lambda: [one.decode("utf-8", errors="ignore") for one in self._bytes],
            "piece": lambda: [str(one) for one in tokenizer.convert_ids_to_tokens(list(range(len(self._bytes))))],
        }
        self._texts = spell[manner]()

    @cached_property
    def _ids(self) -> dict[str, int]:
        return _one_to_one(self._texts)

    @cached_property
    def _ids_by_bytes(self) -> dict[bytes, int]:
        return _one_to_one(self._bytes)

    def id_of(self, text: str) -> int:
        """Return the one id that a text names; -1 where it names none, or several."""
        if text.startswith(BY_ID):
            number = text.removeprefix(BY_ID)
            return int(number) if number.isdecimal() else -1
        if text.startswith(BY_BYTES) and (content := _unescaped(text.removeprefix(BY_BYTES))) in self._ids_by_bytes:
            return self._ids_by_bytes[content]
        return self._ids.get(text, -1)

    def agrees(self, texts: Sequence[str], ids: NDArray[np.int64]) -> bool:
        """Say whether texts may be those of ids, one by one: false only where a text is certainly another token's."""
        return len(texts) == len(ids) and all(
            self._may_be(text, int(one), first=place == 0)
            for place, (text, one) in enumerate(zip(texts, ids, strict=True))
        )

    def exact(self, texts: Sequence[str], ids: NDArray[np.int64]) -> int:
        """Return how many texts are exactly those of ids: of manners that agree, the one with most is the server's."""
        return sum(int(one) < len(self._texts) and text == self._texts[one] for text, one in zip(texts, ids))

    def _may_be(self, text: str, number: int, *, first: bool) -> bool:
        if text.startswith(BY_ID):
            return text == f"{BY_ID}{number}"
        if number >= len(self._texts):
            return False
        # a text's first space belongs to the tokenizer
        if text == self._texts[number] or (first and text == self._texts[number].lstrip()):
            return True
        # special tokens are often written as nothing, parts of a character as what they become with their neighbours
        return number in self._special or not is_text(self._bytes[number])


def _one_to_one(texts: Sequence[K]) -> dict[K, int]:
    found: dict[K, int] = {}
    for number, text in enumerate(texts):
        found[text] = -1 if text in found or not text else number
    return found


def _unescaped(text: str) -> bytes:
    r"""Return the bytes of `\xe2\x80`, in which printable ones may stand as they are."""
    try:
        return text.encode("latin-1").decode("unicode_escape").encode("latin-1")
    except UnicodeError:
        return b""


def is_text(content: bytes) -> bool:
    """Say whether bytes are whole characters."""
    try:
        return UNKNOWN not in content.decode()
    except UnicodeDecodeError:
        return False
