"""In which way a server can be asked, how it names tokens, and whether its numbers mean what they should.

Legend: `L` tokens of a sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError
from kdcache.teachers._completions import Completions, NotAnswered, unusable
from kdcache.teachers._echo import Echo, Entry, candidates_of, distance, echo_of
from kdcache.teachers._spelling import Spelling

PLAIN = "The quick brown fox jumps over the lazy dog, and then it runs away from the"
PROBE = f"Says naïve Zoë 𓀀, 東 🙂: {PLAIN}"
"""The first question: it has spaces, accents and characters of several tokens, in which manners of writing differ."""

SAME, NEAR = 1e-3, 0.25
"""Nats by which two answers to one question may differ, and an echo from what is generated: another computation."""

PLACES = 8
"""Of the probe's end at which the server may be asked to generate."""

SURPLUS = 0.02
"""By how much the candidates' probabilities may exceed 1 together."""

RAW = "It must give log-probabilities as the model has them, of no temperature: of vLLM, --logprobs-mode raw_logprobs."

MANNERS = ("decoded", "bytes", "piece")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server is asked.

    Attributes:
        ids: The prompt is token ids, not text.
        new: Tokens to generate after it: some servers refuse to generate none, others take 0 for no limit.
        marked: Candidates are to be named by their ids, which vLLM does when asked.
    """

    ids: bool
    new: int
    marked: bool


DIALECTS = (
    Dialect(ids=True, new=1, marked=True),
    Dialect(ids=True, new=1, marked=False),
    Dialect(ids=True, new=0, marked=True),
    Dialect(ids=True, new=0, marked=False),
    Dialect(ids=False, new=1, marked=False),
    Dialect(ids=False, new=0, marked=False),
)


@dataclass(frozen=True, slots=True)
class Understanding:
    """What was found out of a server.

    Attributes:
        dialect: How it is asked.
        spelling: How it names tokens.
        early: It tells of each token what it expects after it, as llama-cpp-python does without a begin token.
    """

    dialect: Dialect
    spelling: Spelling
    early: bool


class Asking:
    """Asks one model of a server about samples.

    Args:
        place: The server.
        name: Of the model there.
        tokenizer: The model's.
        top: Candidates to ask for.
    """

    def __init__(self, place: Completions, name: str, tokenizer: Any, top: int) -> None:
        self._place = place
        self._name = name
        self._tokenizer = tokenizer
        self._top = top

    def echoed(self, ids: NDArray[np.int64], dialect: Dialect, *, trial: bool = False) -> Echo:
        """Return what the server says of a sample.

        Raises:
            NotAnswered: It does not answer such a request.
            ValueError: Its answer is of another form.
        """
        request = {**self._request(ids, dialect), "echo": True, "max_tokens": dialect.new}
        return echo_of(self._place.complete(request, trial=trial), [int(one) for one in ids])

    def matched(self, echo: Echo, ids: NDArray[np.int64], known: Dialect, spelling: Spelling) -> list[Entry] | None:
        """Return what is said of each of the L tokens; None where the server's tokens are others."""
        if echo.prompt_tokens not in (None, len(ids)):
            return None
        if echo.texts is None or spelling.agrees(echo.texts[: len(ids)], ids):
            return list(echo.entries[: len(ids)])
        # a begin token that the server put there by itself may be left out of the echo
        if not known.ids and echo.prompt_tokens and spelling.agrees(echo.texts[: len(ids) - 1], ids[1:]):
            return [Entry(), *echo.entries[: len(ids) - 1]]
        return None

    def understand(self) -> Understanding:
        """Find out how to ask, and test what the server says.

        Raises:
            TeacherError: It cannot be asked in any way that is known here, or its numbers are not what they should be.
            ConfigError: It gives fewer candidates than it is asked for.
        """
        ids = np.asarray(self._tokenizer(PROBE)["input_ids"], dtype=np.int64)
        if self._tokenizer.unk_token_id in ids.tolist():
            ids = np.asarray(self._tokenizer(PLAIN)["input_ids"], dtype=np.int64)
        spellings = [Spelling(self._tokenizer, manner) for manner in MANNERS]
        reasons = list[str]()
        for dialect in DIALECTS:
            try:
                echo = self.echoed(ids, dialect, trial=True)
            except (NotAnswered, ValueError) as error:
                reasons.append(str(error))
                continue
            misses = [-one.exact(echo.texts or (), ids) for one in spellings]
            for spelling in (spellings[place] for place in sorted(range(len(spellings)), key=misses.__getitem__)):
                if (entries := self.matched(echo, ids, dialect, spelling)) is not None:
                    return self._tested(ids, entries, dialect, spelling)
            few = echo.texts is not None and len(echo.texts) < len(ids) - 1
            reasons.append("it says nothing of a prompt" if few else "its tokens are not those of teacher.tokenizer")
        raise unusable(self._place.url, "; ".join(dict.fromkeys(reasons)))

    def _tested(
        self, ids: NDArray[np.int64], entries: Sequence[Entry], dialect: Dialect, spelling: Spelling
    ) -> Understanding:
        try:
            again = self.matched(self.echoed(ids, dialect), ids, dialect, spelling)
            early = self._early(ids, entries, dialect, spelling)
        except (NotAnswered, ValueError) as error:
            raise unusable(self._place.url, f"it answers one question and not the next: {error}") from None
        if again is None or any(
            one.named and distance(one.named, other.named) > SAME for one, other in zip(entries, again, strict=True)
        ):
            raise unusable(
                self._place.url,
                "the same question has two answers",
                "Ask while nobody else does, or make its numbers independent of what it computes together.",
            )
        for entry in entries:
            whole = float(np.exp(np.asarray(list(entry.named.values()), dtype=np.float64)).sum())
            if not whole <= 1 + SURPLUS:
                raise unusable(self._place.url, f"the candidates' probabilities add up to {whole:.3g}", RAW)
        told = candidates_of(entries, self._top, spelling.id_of, early=early)
        most = int(np.isfinite(told.log_probabilities).sum(1).max())
        if most < self._top:
            raise ConfigError(
                f"The server gives {most} log-probabilities a token, and {self._top} are asked for.",
                where="teacher.top",
                hint=f"Set teacher.top={most}." if most else "It names tokens by texts that mean several ids each.",
            )
        return Understanding(dialect, spelling, early)

    def _early(self, ids: NDArray[np.int64], entries: Sequence[Entry], dialect: Dialect, spelling: Spelling) -> bool:
        """Say whether the echo tells of each token what is expected after it, by what the server generates there.

        Raises:
            TeacherError: It tells something else.
            NotAnswered, ValueError: It generates nothing, or in another form.
        """
        for place in range(len(ids) - 1, max(2, len(ids) - PLACES), -1):
            # the last tokens of the probe are generated anew: what is expected there is then beyond doubt
            request = {**self._request(ids[:place], dialect), "max_tokens": 1}
            made = echo_of(self._place.complete(request), ())
            if made.prompt_tokens not in (None, place) or not made.entries:
                continue  # another cut of the text
            late, early = (
                _unlike(_keyed(made.entries[0], spelling), _keyed(entries[at], spelling)) for at in (place, place - 1)
            )
            if min(late, early) <= NEAR:
                return early < late
        raise unusable(self._place.url, "it says something else of an echoed token than when it generates there", RAW)

    def _request(self, ids: NDArray[np.int64], dialect: Dialect) -> dict[str, Any]:
        begin = self._tokenizer.bos_token_id
        # a server that is sent text puts the begin token before it by itself
        own = not dialect.ids and begin is not None and int(ids[0]) == begin
        shown = [int(one) for one in ids[int(own) :]]
        return {
            "model": self._name,
            "prompt": shown if dialect.ids else self._tokenizer.decode(shown, clean_up_tokenization_spaces=False),
            "logprobs": self._top,
            "temperature": 1.0,
            "top_p": 1.0,
            **({"return_tokens_as_token_ids": True} if dialect.marked else {}),
        }


def _keyed(entry: Entry, spelling: Spelling) -> dict[int | str, float]:
    """Return what is said of a token by id, or by name where a name means no single one."""
    numbered = ((spelling.id_of(name), name, value) for name, value in entry.named.items())
    return {name if number < 0 else number: value for number, name, value in numbered}


def _unlike(one: dict[int | str, float], other: dict[int | str, float]) -> float:
    """Return by how much two answers differ where both speak of a token, which they must of half of them."""
    shared = one.keys() & other.keys()
    if 2 * len(shared) < max(1, min(len(one), len(other))):
        return math.inf
    return max(abs(one[key] - other[key]) for key in shared)
