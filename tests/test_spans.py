"""Two tokenisations of one text: spans are where both cut, spell the same bytes, and special tokens spell nothing."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kdcache.spans import SUBSTITUTE, Aligner, Alignment, Speller
from tests import tiny

WORDS = "A naïve café sold 12 fish — the keeper's own — to nobody. "
TEXTS = [
    tiny.TEXT,
    WORDS * 3,
    "  two  spaces\n\tand a tab ",
    "東京 and 🙂🙂 and Ωmega",
    "x",
    "<s> is no token here </s>",
]


def sentencepiece(vocabulary: int = 400, *, dummy: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama: ▁ for spaces, one put before every text, bytes for what it does not know."""
    model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    before = [normalizers.Prepend("▁")] if dummy else []
    model.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    model.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] if dummy else []
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{one:02X}>" for one in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special[:3], show_progress=False)
    model.train_from_iterator([tiny.TEXT * 2, WORDS * 3], trainer)
    import json

    tree = json.loads(model.to_str())
    first = len(tree["model"]["vocab"])
    tree["model"]["vocab"] |= {piece: first + number for number, piece in enumerate(special[3:])}
    model = Tokenizer.from_str(json.dumps(tree))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def lower_case() -> PreTrainedTokenizerFast:
    """A tokenizer that keeps neither case nor spaces."""
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    model.train_from_iterator(
        [tiny.TEXT], trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")


def composing() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that composes characters first: an accent of its own is spelled otherwise."""
    words = tiny.tokenizer(300)
    words.backend_tokenizer.normalizer = normalizers.NFC()
    return words


@cache
def spellers() -> dict[str, Speller]:
    made: dict[str, Any] = {
        "small": tiny.tokenizer(280, text=WORDS * 9),
        "large": tiny.tokenizer(420),
        "llama": sentencepiece(),
        "gemma": sentencepiece(360, dummy=False),
        "composing": composing(),
    }
    return {name: Speller(one) for name, one in made.items()}


def check(aligned: Alignment, ids: Sequence[int], teacher: Speller, student: Speller) -> None:
    """Every span's tokens spell the same bytes, spans follow each other, and none could be cut once more."""
    last = (0, 0)
    for a, b, c, d, size in aligned.spans.tolist():
        assert a >= last[0]
        assert c >= last[1]
        assert b > a
        assert d > c
        last = (b, d)
        if size == 0:
            assert teacher.of(ids[a]) is None
            continue
        theirs = [teacher.of(one) or b"" for one in ids[a:b]]
        ours = [student.of(one) or b"" for one in aligned.tokens[c:d].tolist()]
        # a tokenizer's own space before a text spells nothing
        assert size in (len(b"".join(theirs)), len(b"".join(theirs)) - 1)
        assert b"".join(theirs).lstrip(b" ") == b"".join(ours).lstrip(b" ")
        inner = [set(np.cumsum([len(one) for one in reversed(side)])[:-1].tolist()) for side in (theirs, ours)]
        if all(side[0][:1] != b" " for side in (theirs, ours)):
            assert not inner[0] & inner[1]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("student", ["small", "llama", "gemma", "composing"])
@pytest.mark.parametrize("teacher", ["large", "llama", "gemma"])
def test_all_of_a_text_lies_in_spans_of_tokenizers_that_keep_it(teacher: str, student: str, text: str) -> None:
    theirs, ours = spellers()[teacher], spellers()[student]
    ids = [int(one) for one in theirs.tokenizer(text, add_special_tokens=False)["input_ids"]]
    aligned = Aligner(theirs, ours).align(ids)
    check(aligned, ids, theirs, ours)
    if text == TEXTS[-1]:
        return  # special tokens written out are read as such, and spell nothing
    assert aligned.spans[:, 4].sum() == len(text.encode())
    own = ours.begin + [int(one) for one in ours.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert aligned.tokens.tolist() == own


@given(
    text=st.text(alphabet="ab c.é東🙂\n", min_size=1, max_size=30),
    first=st.integers(0, 6),
    student=st.sampled_from(["small", "llama", "gemma"]),
)
def test_a_sample_that_begins_inside_a_character_is_aligned_from_the_next(text: str, first: int, student: str) -> None:
    theirs, ours = spellers()["small"], spellers()[student]
    ids = [int(one) for one in theirs.tokenizer(text)["input_ids"]][first:]
    if not ids:
        return
    spelled = b"".join(theirs.of(one) or b"" for one in ids)
    aligned = Aligner(theirs, ours).align(ids)
    check(aligned, ids, theirs, ours)
    whole = len(spelled.decode(errors="ignore").encode())
    assert aligned.spans[:, 4].sum() <= whole
    if whole == len(spelled):
        assert aligned.spans[:, 4].sum() == whole


def test_bytes_that_are_no_text_are_read_as_substitutes_and_never_counted() -> None:
    theirs, ours = spellers()["large"], spellers()["small"]
    ids = [int(one) for one in theirs.tokenizer("🙂 is a ship")["input_ids"]][2:]  # half of a character is left
    aligned = Aligner(theirs, ours).align(ids)
    assert ours.tokenizer.decode(aligned.tokens.tolist()) == 2 * SUBSTITUTE + " is a ship"
    assert aligned.spans[0, 0] == 2
    assert aligned.spans[:, 4].sum() == len(" is a ship")


def test_a_span_is_cut_wherever_both_cut() -> None:
    theirs, ours = spellers()["large"], spellers()["small"]
    ids = [int(one) for one in theirs.tokenizer(tiny.TEXT)["input_ids"]]
    own = [int(one) for one in ours.tokenizer(tiny.TEXT)["input_ids"]]
    ends = [
        set(np.cumsum([len(side.of(one) or b"") for one in some]).tolist())
        for side, some in ((theirs, ids), (ours, own))
    ]
    spans = Aligner(theirs, ours).align(ids).spans
    assert np.cumsum(spans[:, 4]).tolist() == sorted(ends[0] & ends[1])


def test_end_and_begin_tokens_are_spans_without_bytes_and_other_special_tokens_end_a_text() -> None:
    theirs, ours = spellers()["large"], spellers()["llama"]
    words = [int(one) for one in theirs.tokenizer("the ships")["input_ids"]]
    begin, end, user = theirs.ends["bos"], theirs.ends["eos"], theirs.tokenizer.convert_tokens_to_ids("<|user|>")
    ids = [begin, *words, end, *words, user, *words, 10**6]
    aligned = Aligner(theirs, ours).align(ids)
    check(aligned, ids, theirs, ours)
    own = [int(one) for one in ours.tokenizer("the ships", add_special_tokens=False)["input_ids"]]
    assert aligned.tokens.tolist() == [ours.ends["bos"], *own, ours.ends["eos"], *own, *own]
    empty = aligned.spans[aligned.spans[:, 4] == 0].tolist()
    place = 1 + len(words)
    assert empty == [[place, place + 1, 1 + len(own), 2 + len(own), 0]]
    assert aligned.spans[:, 4].sum() == 3 * len("the ships")


def test_a_tokenizer_that_changes_the_text_has_spans_only_where_it_does_not() -> None:
    theirs = spellers()["large"]
    ids = [int(one) for one in theirs.tokenizer("cafe\u0301 at dusk")["input_ids"]]
    aligned = Aligner(theirs, spellers()["composing"]).align(ids)
    check(aligned, ids, theirs, spellers()["composing"])
    assert 0 < aligned.spans[:, 4].sum() < len("cafe\u0301 at dusk".encode())
    lower = Speller(lower_case())
    ids = [int(one) for one in theirs.tokenizer("The Ships At Dusk")["input_ids"]]
    assert len(Aligner(theirs, lower).align(ids).spans) == 0


def test_a_sample_of_special_tokens_alone_has_no_span() -> None:
    theirs, ours = spellers()["large"], spellers()["small"]
    aligned = Aligner(theirs, ours).align([theirs.tokenizer.convert_tokens_to_ids("<|user|>")] * 3)
    assert len(aligned.tokens) == 0
    assert aligned.spans.shape == (0, 5)
