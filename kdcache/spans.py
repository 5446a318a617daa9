"""One text in two tokenisations, and the spans that both of them cut.

Legend: `L` teacher tokens of a sample, `M` student tokens, `C` spans, `n` bytes of a stretch of text.

A store keeps the teacher's token ids. What they spell is put together byte by byte and given to the student's
tokenizer; tokens of both sides then have places in the same bytes. Special tokens spell nothing: they end a stretch of
text, and where the student has a token of the same role (end or begin), it stands there too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.tokenizer import token_bytes

SUBSTITUTE = "\x1a"
"""What the student reads in place of a byte that is no text, such as a part of a character where a sample begins."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """A sample in both tokenisations.

    Attributes:
        tokens: int32 [M], the student's.
        spans: int32 [C, 5], a row (a, b, c, d, bytes) a span: teacher tokens a to b and student tokens c to d, ends
            left out, spell the same bytes. A pair of end or begin tokens is a span of 0 bytes. In the text's order;
            what no span holds is spelled by one side only.
    """

    tokens: NDArray[np.int32]
    spans: NDArray[np.int32]


class Speller:
    """What the ids of one tokenizer spell.

    Args:
        tokenizer: A transformers tokenizer.

    Attributes:
        tokenizer: The same.
        size: Ids that it knows.
        ends: Special id of a role: `eos` and `bos`, where it has them.
        begin: The ids with which it begins any text of itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {int(one) for one in tokenizer.all_special_ids}
        special |= {int(number) for number, one in added.items() if getattr(one, "special", True)}
        spelled = enumerate(token_bytes(tokenizer))
        self._bytes = [None if number in special else one or None for number, one in spelled]
        roles = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos")}
        self.ends = {name: int(number) for name, number in roles.items() if number is not None}
        self._drops = self._drops_a_space()
        with_begin, without = (list(tokenizer("a", add_special_tokens=one)["input_ids"]) for one in (True, False))
        places = [one for one in range(len(with_begin)) if with_begin[one : one + len(without)] == without]
        self.begin: list[int] = [int(one) for one in with_begin[: places[0]]] if places else []

    def of(self, number: int) -> bytes | None:
        """Return the bytes of an id; None where it spells nothing."""
        return self._bytes[number] if 0 <= number < len(self._bytes) else None

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of the tokens of a stretch; without the space that the tokenizer puts before every text."""
        found = [self.of(one) or b"" for one in ids]
        if self._drops and found:
            found[0] = found[0].removeprefix(b" ")
        return found

    def ids(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Return the ids of a text, and each token's first and last place in characters where the tokenizer tells."""
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        return [int(one) for one in found["input_ids"]], found["offset_mapping"] if fast else None

    def _drops_a_space(self) -> bool:
        for number, one in enumerate(self._bytes):
            if one is not None and len(one) > 1 and one[:1] == b" " and one[1:].isalpha():
                text = self.tokenizer.decode([number], clean_up_tokenization_spaces=False)
                return not str(text).startswith(" ")
        return False


class Aligner:
    """Puts the samples of one tokenizer into the tokens of another. Deterministic, and safe to share between threads.

    Args:
        teacher: The tokenizer that the samples are in.
        student: The other.
    """

    def __init__(self, teacher: Speller, student: Speller) -> None:
        self._teacher, self._student = teacher, student
        # eos first: where one id has both roles, ending a text is what it does inside a sample
        roles = [role for role in ("bos", "eos") if role in teacher.ends and role in student.ends]
        self._counterparts = {teacher.ends[role]: student.ends[role] for role in roles}

    def align(self, ids: Sequence[int]) -> Alignment:
        """Return a sample in both tokenisations.

        Args:
            ids: The teacher's tokens [L].
        """
        tokens = list(self._student.begin)
        spans: list[NDArray[np.int32]] = []
        place = 0
        if tokens and ids and ids[0] == self._teacher.ends.get("bos"):
            place = 1  # the student has begun already
        while place < len(ids):
            if self._teacher.of(ids[place]) is None:
                if (own := self._counterparts.get(ids[place])) is not None:
                    spans.append(np.array([[place, place + 1, len(tokens), len(tokens) + 1, 0]], dtype=np.int32))
                    tokens.append(own)
                place += 1
                continue
            stop = place
            while stop < len(ids) and self._teacher.of(ids[stop]) is not None:
                stop += 1
            own_ids, found = self._stretch(ids[place:stop])
            spans.append(found + np.array([place, place, len(tokens), len(tokens), 0], dtype=np.int32))
            tokens += own_ids
            place = stop
        joined = np.concatenate(spans) if spans else np.zeros((0, 5), dtype=np.int32)
        return Alignment(np.array(tokens, dtype=np.int32), joined)

    def _stretch(self, ids: Sequence[int]) -> tuple[list[int], NDArray[np.int32]]:
        """Return the student's tokens of a stretch without special tokens, and its spans."""
        pieces = self._teacher.pieces(ids)
        spelled = b"".join(pieces)
        text, sound = _text(spelled)
        own, places = self._student.ids(text)
        own_pieces = self._student.pieces(own)
        theirs = np.cumsum([len(one) for one in pieces])
        if b"".join(own_pieces) == text.encode():
            ours = np.cumsum([len(one) for one in own_pieces], dtype=np.int64)
        elif places is not None:
            ours = _ends(text, places)
        else:
            return own, np.zeros((0, 5), dtype=np.int32)
        cuts = _common_cuts(theirs, ours, len(spelled))
        bad = np.concatenate([[0], np.cumsum(~sound)])
        spans = [
            (a, b, c, d, end - begin)
            for (begin, a, c), (end, b, d) in pairwise(cuts)
            if bad[end] == bad[begin] and b"".join(own_pieces[c:d]) == spelled[begin:end]
        ]
        return own, np.array(spans, dtype=np.int32).reshape(-1, 5)


def _text(spelled: bytes) -> tuple[str, NDArray[np.bool_]]:
    """Return bytes as a text of as many bytes, and which of them [n] are characters: the others are substituted."""
    try:
        return spelled.decode(), np.ones(len(spelled), dtype=np.bool_)
    except UnicodeDecodeError:
        characters = spelled.decode(errors="surrogateescape")
    sound = [ok for one in characters for ok in [not _escaped(one)] * (len(one.encode()) if not _escaped(one) else 1)]
    return "".join(SUBSTITUTE if _escaped(one) else one for one in characters), np.array(sound, dtype=np.bool_)


def _escaped(character: str) -> bool:
    return "\udc80" <= character <= "\udcff"


def _ends(text: str, places: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the byte at which each token ends; -1 where the next one begins before that, inside the same character."""
    at = np.concatenate([[0], np.cumsum([len(one.encode()) for one in text])]).astype(np.int64)
    ends, starts = np.array([stop for _, stop in places]), np.array([start for start, _ in places])
    apart = np.append(starts[1:] >= ends[:-1], True) & (ends > 0)
    return np.where(apart, at[ends], -1)


def _common_cuts(theirs: NDArray[np.int64], ours: NDArray[np.int64], size: int) -> list[tuple[int, int, int]]:
    """Return (byte, teacher tokens before it, student tokens before it) of every cut that both have.

    A token of no bytes goes with the token after it, at the end with the one before.
    """
    sides = [np.unique(ends, return_index=True) for ends in (theirs, ours)]
    cuts, left, right = np.intersect1d(sides[0][0], sides[1][0], assume_unique=True, return_indices=True)
    inner = (cuts > 0) & (cuts < size)
    before = [sides[0][1][left[inner]] + 1, sides[1][1][right[inner]] + 1]
    middle = zip(cuts[inner].tolist(), before[0].tolist(), before[1].tolist(), strict=True)
    return [(0, 0, 0), *middle, (size, len(theirs), len(ours))]
