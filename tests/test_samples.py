"""Documents become samples without losing, doubling or shifting a prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import ConfigError, SampleError, SourceError
from kdcache.samples import SamplesConfig, SampleSet, prepare
from kdcache.sources import Document
from tests import tiny

VOCABULARY = 300


class Documents:
    """Documents in memory as a source."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"documents": [str(document) for document in self.documents]}

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]


def made(folder: Path, documents: Sequence[Document], *, context: int | None = 64, **keys: Any) -> SampleSet:
    return prepare(
        Documents(documents),
        tiny.tokenizer(VOCABULARY),
        SamplesConfig(**keys),
        limits=(context, VOCABULARY),
        identity={},
        folder=folder,
    )


def ids(*lengths: int) -> list[Document]:
    random = np.random.default_rng(0)
    return [Document(f"d{n}", input_ids=random.integers(5, 300, length).tolist()) for n, length in enumerate(lengths)]


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=6), length=st.integers(2, 20))
def test_every_token_but_the_first_is_predicted_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    documents = ids(*lengths)
    samples = made(tmp_path_factory.mktemp("s"), documents, max_length=length)
    predicted: dict[str, list[int]] = {}
    for sample in (samples[n] for n in range(len(samples))):
        assert 2 <= len(sample.tokens) <= length
        assert len(sample.loss_mask) == len(sample.tokens) - 1
        predicted.setdefault(sample.id.split("#")[0], []).extend(sample.tokens[1:].tolist())
    assert predicted == {one.id: (one.input_ids or [])[1:] for one in documents}
    assert samples.num_positions == sum(lengths) - len(lengths)


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), length=st.integers(2, 20))
def test_packing_loses_no_token_and_masks_the_borders(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    documents = ids(*lengths)
    samples = made(tmp_path_factory.mktemp("s"), documents, max_length=length, packing="concat")
    stream: list[int] = []
    for sample in (samples[n] for n in range(len(samples))):
        stream += sample.tokens.tolist() if not stream else sample.tokens[1:].tolist()
    end = tiny.tokenizer(VOCABULARY).eos_token_id
    joined = [token for one in documents for token in [*(one.input_ids or []), end]]
    assert stream == joined
    counted = np.concatenate([samples[n].loss_mask for n in range(len(samples))])
    starts = np.cumsum([0] + [len(one.input_ids or []) + 1 for one in documents])[1:-1]
    expected = np.ones(len(joined) - 1, dtype=bool)
    expected[starts - 1] = False
    assert np.array_equal(counted, expected)
    assert all(len(samples[n].tokens) == length for n in range(len(samples) - 1))


def test_only_the_assistants_words_count(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "count the ships"},
        {"role": "assistant", "content": "one two"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "three"},
    ]
    sample = made(tmp_path, [Document("c", messages=chat)])[0]
    words = tiny.tokenizer(VOCABULARY)
    counted = words.decode(sample.tokens[1:][sample.loss_mask])
    assert counted == "one two<|end|>three<|end|>"
    everything = made(tmp_path, [Document("c", messages=chat)], train_on="all")[0]
    assert everything.loss_mask.all()


def test_prompts_do_not_count(tmp_path: Path) -> None:
    sample = made(tmp_path, [Document("p", prompt="the ships at ", completion="dusk and fog")], add_eos=True)[0]
    words = tiny.tokenizer(VOCABULARY)
    assert words.decode(sample.tokens[1:][sample.loss_mask]) == "dusk and fog</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused_or_skipped(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rewriting = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(SampleError, match="answer has no place"):
        made(tmp_path, [Document("c", messages=chat)], chat_template=rewriting)
    kept = made(tmp_path, [Document("c", messages=chat), *ids(5)], chat_template=rewriting, on_bad="skip")
    assert (len(kept), kept.counts["skipped: chat template"]) == (1, 1)


@pytest.mark.parametrize(("long", "lengths"), [("truncate", [10, 5]), ("skip", [5]), ("split", [10, 10, 10, 6, 5])])
def test_long_documents_become_what_the_config_says(tmp_path: Path, long: Any, lengths: list[int]) -> None:
    samples = made(tmp_path, ids(33, 5), max_length=10, long=long)
    assert samples.lengths.tolist() == lengths


def test_a_document_over_the_limit_is_an_error_where_asked(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="33 tokens, over the limit of 10") as caught:
        made(tmp_path, ids(33), max_length=10, long="error")
    assert "d0" in str(caught.value)


def test_a_limit_beyond_the_teachers_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beyond the teacher's context of 64"):
        made(tmp_path, ids(5), max_length=65)
    assert made(tmp_path, ids(200)).lengths.max() == 64


@pytest.mark.parametrize("bad", [[3, VOCABULARY], [3, -1], [3], []])
def test_unusable_documents_are_errors_or_counted(tmp_path: Path, bad: list[int]) -> None:
    documents = [*ids(5), Document("bad", input_ids=bad)]
    with pytest.raises(SampleError) as caught:
        made(tmp_path, documents)
    assert "bad" in caught.value.where
    kept = made(tmp_path, documents, on_bad="skip")
    assert len(kept) == 1
    assert sum(count for name, count in kept.counts.items() if name.startswith("skipped")) == 1


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No sample of at least 2 tokens"):
        made(tmp_path, [Document("a", input_ids=[3])], on_bad="skip")


def test_two_documents_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="have the id 'd0'"):
        made(tmp_path, [*ids(5), *ids(6)])


def test_begin_and_end_tokens_are_added_where_asked(tmp_path: Path) -> None:
    words = tiny.tokenizer(VOCABULARY)
    text = [Document("t", text="the fog came")]
    plain = made(tmp_path, text)[0].tokens.tolist()
    framed = made(tmp_path, text, add_bos=True, add_eos=True)[0].tokens.tolist()
    assert framed == [words.bos_token_id, *plain, words.eos_token_id]


def test_samples_are_made_once_and_found_again(tmp_path: Path) -> None:
    first = made(tmp_path / "w", ids(20, 30))
    stamp = (tmp_path / "w" / "tokens.bin").stat().st_mtime_ns
    again = made(tmp_path / "w", ids(20, 30))
    assert (tmp_path / "w" / "tokens.bin").stat().st_mtime_ns == stamp
    assert again.digest == first.digest
    assert made(tmp_path / "w", ids(20, 31)).digest != first.digest
