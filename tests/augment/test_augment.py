"""Views of tokens and copies: what is drawn, what is changed, and what is refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kdcache.augment import CopyViews, ImageViews, TokenViews, draw, kind_of, view, views_of
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError, MismatchError

FIRST, LAST, HIDDEN = 101, 102, 103
COUNT, LENGTH = 40, 24

RATES: dict[str, Any] = {"kind": "tokens", "mask_field": "attention_mask", "keep": [FIRST, LAST], "mask_id": HIDDEN}
FULL = {**RATES, "views": 4, "token_swap": 0.2, "token_mask": 0.2, "token_drop": 0.2}

Array = np.ndarray[Any, Any]


@pytest.fixture
def fields() -> dict[str, Array]:
    random = np.random.default_rng(0)
    lengths = random.integers(3, LENGTH + 1, COUNT)
    ids, mask = np.zeros((COUNT, LENGTH), np.int32), np.zeros((COUNT, LENGTH), np.int8)
    for row, length in enumerate(lengths):
        ids[row, :length] = [FIRST, *random.integers(1000, 2000, length - 2), LAST]
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def changed(config: TokenViews, fields: dict[str, Array], places: Sequence[int]) -> list[dict[str, Array]]:
    at = np.asarray(places)
    drawn = draw(config, [f"s{place}" for place in places], at, COUNT)
    return [
        view(config, numbers, at, lambda some, names: {name: fields[name][some] for name in names})
        for numbers in np.moveaxis(drawn, 1, 0)
    ]


def real(ids: Array, mask: Array) -> list[int]:
    return [int(one) for one in ids[mask != 0]]


def test_a_view_depends_on_the_sample_and_its_number_alone(fields: dict[str, Array]) -> None:
    config = TokenViews(**FULL)
    whole = changed(config, fields, range(COUNT))
    some = changed(config, fields, [9, 3])
    for alone, together in zip(some, whole, strict=True):
        for name, values in alone.items():
            assert np.array_equal(values, together[name][[9, 3]])
    again = changed(TokenViews(**{**FULL, "seed": 1}), fields, range(COUNT))
    assert not np.array_equal(whole[1]["input_ids"], again[1]["input_ids"])
    assert not np.array_equal(whole[1]["input_ids"], whole[2]["input_ids"])


def test_numbers_of_a_view_are_exact_in_float32(fields: dict[str, Array]) -> None:
    drawn = draw(TokenViews(**FULL), [f"s{n}" for n in range(COUNT)], np.arange(COUNT), COUNT)
    keys = drawn[:, 1:, 0].astype(np.float64)
    assert (keys == np.floor(keys)).all()
    assert 2**20 < keys.max() < 2**24
    assert drawn[:, :, 1].tolist() == [[0, 1, 2, 3]] * COUNT


def test_view_0_is_the_sample_as_it_is(fields: dict[str, Array]) -> None:
    first = changed(TokenViews(**FULL), fields, range(COUNT))[0]
    assert all(np.array_equal(values, fields[name]) for name, values in first.items())
    other = changed(TokenViews(**{**FULL, "plain_first": False}), fields, range(COUNT))[0]
    assert not np.array_equal(other["input_ids"], fields["input_ids"])


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_tokens_give_way_to_the_mask_as_often_as_told(share: float, fields: dict[str, Array]) -> None:
    config = TokenViews(**{**RATES, "views": 40, "plain_first": False, "token_mask": share})
    free = (fields["attention_mask"] != 0) & ~np.isin(fields["input_ids"], [FIRST, LAST])
    hidden = 0
    for one in changed(config, fields, range(COUNT)):
        ids = one["input_ids"]
        assert ids.dtype == np.int32
        assert np.array_equal(ids[~free], fields["input_ids"][~free])
        assert ((ids == fields["input_ids"]) | (ids == HIDDEN)).all()
        hidden += int((ids == HIDDEN).sum())
    assert hidden / (40 * free.sum()) == pytest.approx(share, abs=0.01)


def test_what_goes_leaves_no_gap(fields: dict[str, Array]) -> None:
    config = TokenViews(**{**RATES, "views": 40, "plain_first": False, "token_drop": 0.3})
    gone = free = 0
    for one in changed(config, fields, range(COUNT)):
        for row in range(COUNT):
            before = real(fields["input_ids"][row], fields["attention_mask"][row])
            after = real(one["input_ids"][row], one["attention_mask"][row])
            assert one["attention_mask"][row].tolist() == [1] * len(after) + [0] * (LENGTH - len(after))
            assert not one["input_ids"][row, len(after) :].any()
            assert (after[0], after[-1]) == (FIRST, LAST)
            left = iter(before)
            assert all(token in left for token in after)  # in their order
            gone, free = gone + len(before) - len(after), free + len(before) - 2
    assert gone / free == pytest.approx(0.3, abs=0.01)


def test_neighbours_change_places_once(fields: dict[str, Array]) -> None:
    config = TokenViews(**{**RATES, "views": 10, "plain_first": False, "token_swap": 0.3})
    moved = 0
    for one in changed(config, fields, range(COUNT)):
        assert np.array_equal(one["attention_mask"], fields["attention_mask"])
        for before, after in zip(fields["input_ids"], one["input_ids"], strict=True):
            at = 0
            while at < LENGTH:
                if before[at] == after[at]:
                    at += 1
                else:
                    assert before[at : at + 2].tolist() == after[at : at + 2][::-1].tolist()
                    moved, at = moved + 1, at + 2
    assert moved > 100


def test_a_sample_keeps_a_token(fields: dict[str, Array]) -> None:
    config = TokenViews(**{**RATES, "keep": [], "views": 2, "plain_first": False, "token_drop": 1.0})
    for one in changed(config, fields, range(COUNT)):
        assert np.array_equal(one["input_ids"], fields["input_ids"])
        assert one["attention_mask"].any(1).all()


def test_padding_before_the_tokens_stays_padding(fields: dict[str, Array]) -> None:
    left = {name: values[:, ::-1].copy() for name, values in fields.items()}
    config = TokenViews(**{**RATES, "views": 3, "token_drop": 0.3})
    for one in changed(config, left, range(COUNT)):
        assert ((one["input_ids"] != 0) == (one["attention_mask"] != 0)).all()


def test_views_of_tokens_are_the_same_as_ever() -> None:
    # a change of these is a change of tokens.VERSION
    ids = np.asarray([[FIRST, *range(1000, 1010), LAST]], dtype=np.int32)
    fields = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    config = TokenViews(**{**FULL, "plain_first": False, "token_drop": 0.15})
    found = [real(one["input_ids"][0], one["attention_mask"][0]) for one in changed(config, fields, [0])]
    assert found == EVER


EVER = [
    [101, 1000, 1003, 103, 1005, 1007, 1008, 102],
    [101, 1001, 1000, 1002, 1003, 1004, 1005, 1006, 1008, 1007, 103, 102],
    [101, 1000, 103, 103, 1005, 1006, 1007, 1008, 1009, 102],
    [101, 1000, 1001, 1002, 103, 103, 1007, 1006, 1008, 1009, 102],
]


def test_copies_are_views() -> None:
    takes = np.arange(5 * 3 * 2).reshape(5, 3, 2)
    config = CopyViews(kind="copies", fields=("takes",), views=3)
    drawn = draw(config, ["a", "b"], np.asarray([4, 1]), 5)
    for number, numbers in enumerate(np.moveaxis(drawn, 1, 0)):
        one = view(config, numbers, np.asarray([4, 1]), lambda some, names: dict.fromkeys(names, takes[some]))
        assert np.array_equal(one["takes"], takes[[4, 1], number])
    few = CopyViews(kind="copies", fields=("takes",), views=2)
    with pytest.raises(ConfigError, match="not 2 copies"):
        view(few, drawn[:, 0], np.asarray([4, 1]), lambda some, names: dict.fromkeys(names, takes[some]))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"input_ids": np.zeros((2, 3), np.float32)}, "not token ids"),
        ({"input_ids": np.zeros((2, 3, 4), np.int32)}, "not token ids"),
        ({"attention_mask": np.ones((2, 4), np.int8)}, "The mask has the shape"),
        ({"input_ids": np.zeros((2, 3), np.uint8)}, "too small for mask_id"),
    ],
)
def test_fields_that_hold_no_tokens_are_refused(fields: dict[str, Array], match: str) -> None:
    whole = {"input_ids": np.zeros((2, 3), np.int32), "attention_mask": np.ones((2, 3), np.int8), **fields}
    with pytest.raises(ConfigError, match=match):
        changed(TokenViews(**{**FULL, "mask_id": 30000}), whole, [0, 1])


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"kind": "tokens", "token_mask": 0.1}, "needs mask_id"),
        ({"kind": "tokens", "token_drop": 0.1}, "needs mask_field"),
        ({"kind": "tokens", "token_drip": 0.1}, "unknown key.*token_drip"),
        ({"kind": "tokens", "token_mask": 1.5, "mask_id": 1}, "less than or equal to 1"),
        ({"kind": "copies", "views": 2}, "fields"),
        ({"kind": "sound"}, "'image', 'tokens', 'copies'"),
        ({"token_mask": 0.1}, "unknown key"),
    ],
)
def test_settings_that_make_no_views(tree: dict[str, Any], match: str) -> None:
    whole = {"examples": {"path": "x", "augment": tree}, "teacher": {"model": "a:b"}}
    with pytest.raises(ConfigError, match=match):
        parse_config(CaptureConfig, whole)


def test_a_misspelt_key_of_tokens_is_named() -> None:
    tree = {"path": "x", "augment": {"kind": "tokens", "token_drap": 0.1}}
    with pytest.raises(ConfigError) as caught:
        parse_config(CaptureConfig, {"examples": tree, "teacher": {"model": "a:b"}})
    assert "'examples.augment.token_drap'" in str(caught.value)
    assert "token_drop" in str(caught.value.hint)


def test_a_store_of_the_first_kind_says_no_kind() -> None:
    config = ImageViews(views=2, crop=1)
    dumped = config.model_dump(mode="json")
    assert "kind" not in dumped
    assert views_of(dumped, 1) == config
    tokens = TokenViews(**FULL)
    assert views_of(tokens.model_dump(mode="json"), kind_of(tokens).VERSION) == tokens


def test_views_that_this_release_does_not_make_are_refused() -> None:
    with pytest.raises(MismatchError, match="version 2"):
        views_of(TokenViews(**FULL).model_dump(mode="json"), 2)
    for tree in ({"kind": "sound"}, {"kind": "tokens", "token_echo": 0.5}):
        with pytest.raises(MismatchError, match="does not know"):
            views_of(tree, 1)
