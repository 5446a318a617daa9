"""What is asked, how tokens are drawn, and which answers are dropped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.errors import ConfigError, SourceError
from kdcache.generate import FilterConfig, generate
from kdcache.generate.ask import Answer
from kdcache.generate.draw import KeyedDraw, uniform
from kdcache.generate.keep import reason, repeated
from kdcache.generate.prompts import prompts_of
from kdcache.sources import Document
from tests import tiny
from tests.generate.asking import config, lines_of


def test_draws_follow_the_distribution_cut_at_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]
    ids = [f"s{n}" for n in range(4000)]

    def shares(temperature: float, top_p: float) -> list[float]:
        draw = KeyedDraw(ids, 5, temperature, top_p, seed=0)
        picked = draw(torch.zeros(len(ids), 7, dtype=torch.long), logits.expand(len(ids), -1)).argmax(-1)
        return [float((picked == n).float().mean()) for n in (1, 3, 0, 2)]

    np.testing.assert_allclose(shares(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.75), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(0.5, 1.0), [0.6849, 0.2466, 0.0616, 0.0068], atol=0.03)
    assert shares(1.0, 0.1) == [1, 0, 0, 0]
    assert 0 <= uniform(0, "a", 1) < 1
    assert uniform(0, "a", 1) != uniform(0, "a", 2)


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({"id": "p0", "prompt": "again"}, {}, "Two prompts have the id"),
        ({"id": "x", "input_ids": [1, 2]}, {}, "no prompt"),
        ({"id": "x", "messages": [{"role": "user", "content": "?"}]}, {}, "no prompt"),
        ({"id": "x", "text": "a text"}, {}, "none of the fields"),
    ],
)
def test_sources_without_prompts(
    tmp_path: Path, teacher: Path, row: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    made = config(tmp_path, teacher, **keys)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(SourceError, match=message):
        generate(made, tmp_path / "a.jsonl")


def test_text_is_a_prompt_too(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "t.txt").write_text("The fog\nThe bell\n")
    made = config(
        tmp_path, teacher, source={"path": str(tmp_path / "t.txt"), "documents": "line"}, templates=["{prompt}"]
    )
    assert generate(made, tmp_path / "a.jsonl").prompts == 2
    (tmp_path / "q.jsonl").write_text('{"question": "The fog", "prompt": "no"}\n')
    made = config(tmp_path, teacher, source={"path": str(tmp_path / "q.jsonl"), "text_field": "question"})
    generate(made, tmp_path / "b.jsonl")
    assert [one["prompt"] for one in lines_of(tmp_path / "b.jsonl")] == ["The fog", "He wrote: The fog"]


def test_a_chat_is_written_by_the_template(tmp_path: Path, teacher: Path) -> None:
    generate(config(tmp_path, teacher, chat=True), tmp_path / "a.jsonl")
    line = lines_of(tmp_path / "a.jsonl")[0]
    assert line["prompt"] == f"<|user|>{tiny.TEXT[:3]}<|end|><|assistant|>"


def test_prompts_too_long_for_the_context_are_counted(tmp_path: Path, teacher: Path) -> None:
    made = config(tmp_path, teacher, templates=["{prompt}", "{prompt}" + tiny.TEXT * 3])
    result = generate(made, tmp_path / "a.jsonl")
    assert (result.dropped["prompt too long"], result.prompts) == (7, 14)


def test_bad_configs(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(ConfigError, match="has no"):
        config(tmp_path, teacher, templates=["nothing"])
    with pytest.raises(ConfigError, match="empty string"):
        config(tmp_path, teacher, stop=[""])
    made = config(tmp_path, teacher, teacher={"model": "tests.tiny:tokenizer"})
    with pytest.raises(ConfigError, match="transformers library"):
        generate(made, tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("answer", "keys", "why"),
    [
        (None, {}, "prompt too long"),
        (Answer("  ", (5,), True, 2, True), {}, "empty"),
        (Answer("a", (5,), True, 2, True), {"min_tokens": 2}, "too short"),
        (Answer("a b", (5, 6), True, 3, True), {"max_tokens": 1}, "too long"),
        (Answer("a", (5,), False, 1, True), {"must_end": True}, "not ended"),
        (Answer("a", (1,) * 9, True, 9, True), {"max_repeat": 0.5}, "repeats itself"),
        (Answer("a", (5,), True, 2, False), {"same_tokens": True}, "other tokens"),
        (Answer(" known", (5,), True, 2, True), {"unique": True}, "equal"),
        (Answer("known", (5,), False, 2, False), {}, None),
    ],
)
def test_the_filter(answer: Answer | None, keys: dict[str, Any], why: str | None) -> None:
    assert reason(answer, FilterConfig(**keys), ["known"]) == why


def test_repetition_is_the_share_of_runs_seen_before() -> None:
    assert repeated([1, 2, 3]) == 0
    assert repeated([1, 2, 3, 4, 5]) == 0
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_a_begin_token_of_the_template_is_not_written_twice(tmp_path: Path, teacher: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    words = tiny.tokenizer()
    words.chat_template = "<s>" + tiny.TEMPLATE
    document = Document("d", text="The fog")
    assert prompts_of(document, ["{prompt}"], words, chat=True)[0].text.startswith("<s><|user|>")
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    prompt = prompts_of(document, ["{prompt}"], words, chat=True)[0]
    assert prompt.text.startswith("<|user|>")
    assert words(prompt.text)["input_ids"].count(words.bos_token_id) == 1
    words.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        prompts_of(document, ["{prompt}"], words, chat=True)
