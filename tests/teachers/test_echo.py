"""What can be relied on of what a server says of a token, and which id it means by a text."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from kdcache.teachers._echo import HIDDEN, NAMELESS, Entry, distance, echo_of, usable
from kdcache.teachers._spelling import Spelling
from tests import tiny


def test_below_a_name_without_an_id_the_order_is_not_known() -> None:
    ids = {"a": 1, "b": 2, "c": 3, "?": -1}

    def told(own: float | None, **named: float) -> tuple[dict[int, float], dict[str, int]]:
        lost: Counter[str] = Counter()
        entry = Entry(own, {name.replace("x", "?"): value for name, value in named.items()})
        return usable(entry, 3, lambda name: ids[name], lost), dict(+lost)

    assert told(-1.0, a=-1.0, b=-2.0, c=-3.0) == ({1: -1.0, 2: -2.0, 3: -3.0}, {})
    assert told(-5.0, a=-1.0, b=-2.0, x=-3.0, c=-5.0) == ({1: -1.0, 2: -2.0}, {NAMELESS: 1})
    # three names of three, but the last may be the token's own, and the nameless one have hidden a likelier one
    assert told(-3.0, a=-1.0, x=-2.0, c=-3.0) == ({}, {NAMELESS: 1, HIDDEN: 1})
    assert told(-1.0, a=-1.0, x=-2.0) == ({}, {NAMELESS: 1, HIDDEN: 1})
    # fewer than were asked for: whether the last is one of the likeliest is not known
    assert told(-4.0, a=-1.0, c=-4.0) == ({1: -1.0}, {})
    assert told(None, a=-1.0, b=-9999.0) == ({1: -1.0}, {})
    assert distance({"a": -1.0, "b": -3.0}, {"a": -1.5, "c": -3.25}) == 0.5
    assert distance({}, {"a": 0.0}) == np.inf


def test_names_of_tokens() -> None:
    words = tiny.tokenizer()
    decoded, plain, pieces = (Spelling(words, manner) for manner in ("decoded", "bytes", "piece"))
    the = words.convert_tokens_to_ids("Ġthe")
    part = words.convert_tokens_to_ids("Ã")
    assert [decoded.id_of(" the"), plain.id_of(" the"), pieces.id_of("Ġthe")] == [the] * 3
    assert decoded.id_of(f"token_id:{the}") == the
    assert decoded.id_of("bytes:\\xc3") == part
    assert [decoded.id_of(one) for one in ("�", "nowhere", "token_id:x", "bytes:\\x")] == [-1] * 4
    assert pieces.id_of("Ã") == part
    assert decoded.agrees([" the", "anything"], np.array([the, part]))
    assert not decoded.agrees([" the"], np.array([the, part]))
    assert not decoded.agrees(["token_id:3"], np.array([the]))
    assert not decoded.agrees(["x"], np.array([900]))
    assert decoded.exact([" the", "�", "x"], np.array([the, part, the])) == 2


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"content": []}}]},
        {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [], "top_logprobs": []}}]},
    ],
)
def test_answers_of_another_form(answer: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"it has no|tokens have"):
        echo_of(answer, [1])
