"""The recipe of a student with a tokenizer of its own: its variants are configs, its tokenizer keeps every byte."""

import json
from pathlib import Path

from kdcache.config import parse_config
from kdcache.tokenizer import load_tokenizer
from kdcache.train.config import TrainConfig
from pipelines.smollm2_tokenizer.recipe import STUDENT, VARIANTS, tokenizer
from tests import tiny


def test_every_variant_is_a_config() -> None:
    for changed in VARIANTS.values():
        parse_config(TrainConfig, {"student": {"config": STUDENT, "tokenizer": "a"}, **changed})
    assert VARIANTS["hard labels"] == {"loss": {"alpha": 0.0}}


def test_the_tokenizer_is_of_the_articles_and_keeps_every_byte(tmp_path: Path) -> None:
    articles = tmp_path / "train.jsonl"
    articles.write_text("\n".join(json.dumps({"id": str(one), "text": tiny.TEXT}) for one in range(3)) + "\n")
    words = load_tokenizer(str(tokenizer(articles, tmp_path / "words", 300)))
    assert len(words) == 300
    assert words.decode(words("Any text 🙂")["input_ids"]) == "Any text 🙂"
    made = (tmp_path / "words" / "tokenizer.json").read_bytes()
    tokenizer(articles, tmp_path / "again", 300)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == made
