"""Tokenizers: told apart by what they do, kept with a store, decoded without transformers."""

from pathlib import Path

import pytest

from kdcache.errors import AccessError
from kdcache.tokenizer import decoder, differences, load_tokenizer, tokenizer_files, tokenizer_fingerprint
from tests import tiny


def test_the_fingerprint_is_of_what_a_tokenizer_does(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path)
    ours = tokenizer_fingerprint(words)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == ours
    other = tiny.tokenizer(text="entirely other words for entirely other merges " * 9)
    assert tokenizer_fingerprint(other)["vocabulary"] != ours["vocabulary"]
    words.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(words)["chat_template"] != ours["chat_template"]


def test_padding_and_a_missing_template_are_the_students_own_affair_and_ids_are_not() -> None:
    ours = tokenizer_fingerprint(tiny.tokenizer())
    padded = tiny.tokenizer()
    padded.pad_token = padded.eos_token
    padded.chat_template = None
    assert differences(ours, tokenizer_fingerprint(padded)) == []
    assert differences(None, ours) == differences(ours, None) == []
    other = tiny.tokenizer()
    other.chat_template = "{{ messages }}"
    assert [line.split()[0] for line in differences(ours, tokenizer_fingerprint(other))] == ["chat_template"]
    ended = tiny.tokenizer()
    ended.eos_token = "<|end|>"
    assert any("eos" in line for line in differences(ours, tokenizer_fingerprint(ended)))
    longer = tokenizer_fingerprint(tiny.tokenizer(310))
    assert any("vocabulary_size" in line for line in differences(ours, longer))


def test_the_files_of_a_store_decode_as_the_tokenizer_does(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    files = tokenizer_files(words)
    ids = words(tiny.TEXT)["input_ids"]
    assert decoder(files)(ids) == words.decode(ids) == tiny.TEXT
    assert tokenizer_files(words) == files  # no time, no path in them
    assert str(tmp_path.anchor) + "tmp" not in files["tokenizer_config.json"].decode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(words)


def test_without_a_tokenizer_ids_are_shown_as_ids() -> None:
    assert decoder({})([5, 17]) == "<5> <17>"


def test_a_folder_without_one_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="cannot be loaded") as error:
        load_tokenizer(str(tmp_path))
    assert "tokenizer.json" in error.value.hint
