"""What a server says of the tokens of a prompt that it echoes, and the candidates that can be relied on.

Legend: `L` tokens of a sample, `C` candidates of a position.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdcache.teachers import Candidates

FLOOR = -9999.0
"""What servers write for minus infinity, which JSON does not have."""

NAMELESS = "candidates that a text names no id for"
HIDDEN = "positions whose candidates share a text"
UNTOLD = "positions of which the server says nothing"


@dataclass(frozen=True, slots=True)
class Entry:
    """What is said of one token.

    Attributes:
        own: Its log-probability, or None.
        named: That of each candidate, by the name that the server gives it.
    """

    own: float | None = None
    named: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Echo:
    """An answer, token by token: the prompt's, then what was generated.

    Attributes:
        texts: Of the tokens, as the server writes them; None where it names candidates by id alone.
        entries: As many.
        prompt_tokens: How many the server says that the prompt has, or None.
    """

    texts: Sequence[str] | None
    entries: Sequence[Entry]
    prompt_tokens: int | None


def echo_of(answer: Mapping[str, Any], own: Sequence[int]) -> Echo:
    """Return what an answer says.

    Args:
        answer: Of `/completions`.
        own: Ids of the prompt, for answers that name candidates by id.

    Raises:
        ValueError: It is not of the OpenAI form, or has no log-probabilities.
    """
    choices, usage = answer.get("choices"), answer.get("usage")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("it has no choices")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    prompt_tokens = counted if isinstance(counted, int) else None
    by_id = choices[0].get("prompt_logprobs")
    if isinstance(by_id, list) and len(by_id) == len(own):
        return Echo(None, [_by_id(one, str(token)) for one, token in zip(by_id, own, strict=True)], prompt_tokens)
    said = choices[0].get("logprobs")
    if not isinstance(said, dict):
        raise ValueError("it has no log-probabilities")
    texts, owns, tops = (said.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not (isinstance(texts, list) and isinstance(owns, list) and isinstance(tops, list)):
        raise ValueError("it has no lists of tokens, token_logprobs and top_logprobs")
    if not len(texts) == len(owns) == len(tops):
        raise ValueError(f"{len(texts)} tokens have {len(owns)} and {len(tops)} log-probabilities")
    entries = [
        Entry(_number(one), _numbers(top) if isinstance(top, dict) else {}) for one, top in zip(owns, tops, strict=True)
    ]
    return Echo([str(one) for one in texts], entries, prompt_tokens)


def candidates_of(entries: Sequence[Entry], top: int, id_of: Callable[[str], int], *, early: bool) -> Candidates:
    """Return what can be relied on of the entries of a sample's L tokens.

    Args:
        entries: L of them, each about its token; where `early`, about the one after it.
        top: Candidates that were asked for.
        id_of: The one id that a name means, or -1.
        early: The server tells of each token what it expects after it.
    """
    about = entries[:-1] if early else entries[1:]
    lost: Counter[str] = Counter()
    rows = [usable(one, top, id_of, lost) for one in about]
    ids = np.zeros((len(rows), top), dtype=np.int64)
    values = np.full((len(rows), top), -np.inf, dtype=np.float32)
    for row, found in enumerate(rows):
        for place, (number, value) in enumerate(found.items()):
            ids[row, place], values[row, place] = number, value
    # where early, an entry's own number is of a token that is not the label
    own = [math.nan if early or one.own is None or one.own <= FLOOR else one.own for one in about]
    return Candidates(ids, values, np.asarray(own, dtype=np.float32), dict(+lost))


def usable(entry: Entry, top: int, id_of: Callable[[str], int], lost: Counter[str]) -> dict[int, float]:
    """Return the likeliest ids with nothing left out between them, at most `top`.

    Servers add the token itself to its candidates, whatever its rank, and name several tokens by one text, which then
    stands there once: below a name that means no single id, the order is not known.

    Args:
        entry: Of one token.
        top: Candidates that were asked for.
        id_of: The one id that a name means, or -1.
        lost: What could not be used is counted there.
    """
    ranked = sorted(
        ((value, id_of(name)) for name, value in entry.named.items() if value > FLOOR), key=lambda one: -one[0]
    )
    if not ranked:
        lost[UNTOLD] += 1
        return {}
    nameless = sum(number < 0 for _, number in ranked)
    lost[NAMELESS] += nameless
    last_is_own = entry.own is not None and abs(ranked[-1][0] - entry.own) <= 1e-6
    if last_is_own and (len(ranked) != top or nameless):
        ranked.pop()
    if nameless and len(ranked) < top:
        lost[HIDDEN] += 1  # one of them may be likelier than all that are told
        return {}
    found: dict[int, float] = {}
    for value, number in ranked[:top]:
        if number < 0 or number in found:
            break
        found[number] = value
    return found


def distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return by how much two lists of candidates differ, in nats: at a name of one alone, from the other's smallest."""
    if not one or not other:
        return math.inf
    least = {id(one): min(one.values()), id(other): min(other.values())}
    return max(abs(one.get(number, least[id(one)]) - other.get(number, least[id(other)])) for number in {*one, *other})


def _by_id(said: Any, token: str) -> Entry:
    if not isinstance(said, dict):
        return Entry()
    numbers = _numbers({name: one.get("logprob") for name, one in said.items() if isinstance(one, dict)})
    return Entry(numbers.get(token), {f"token_id:{name}": value for name, value in numbers.items()})


def _numbers(said: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): value for name, one in said.items() if (value := _number(one)) is not None}


def _number(said: Any) -> float | None:
    number = float(said) if isinstance(said, int | float) and not isinstance(said, bool) else math.nan
    return None if math.isnan(number) or number == math.inf else number
