"""Answers to prompts: neither batches nor kills change them, what is dropped is counted, students are compared."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.cli import main
from kdcache.config import parse_config
from kdcache.errors import ConfigError, CorruptObjectError, Interrupted, MismatchError, SourceError
from kdcache.generate import FilterConfig, GenerateConfig, generate
from kdcache.generate import written as written_module
from kdcache.generate.ask import Answer, Asker
from kdcache.generate.draw import KeyedDraw, uniform
from kdcache.generate.keep import reason, repeated
from kdcache.generate.prompts import prompts_of
from kdcache.generate.report import score
from kdcache.sources import Document
from kdcache.store import open_store
from kdcache.train import train
from kdcache.train.config import TrainConfig
from tests import tiny
from tests.train.test_train import STUDENT


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher"))


def tree(folder: Path, model: Path, /, **keys: Any) -> dict[str, Any]:
    """A config over seven prompts of different lengths, every other one with a reference."""
    path = folder / "prompts.jsonl"
    rows: list[dict[str, str]] = [{"id": f"p{n}", "prompt": tiny.TEXT[n : n + 3 + 9 * (n % 4)]} for n in range(7)]
    for row in rows[::2]:
        row["completion"] = " the sea"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "source": {"path": str(path), "id_field": "id"},
        "teacher": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "templates": ["{prompt}", "He wrote: {prompt}"],
        "batch_size": 5,
        "max_new_tokens": 12,
        "chunk_prompts": 3,
        **keys,
    }


def config(folder: Path, model: Path, /, **keys: Any) -> GenerateConfig:
    return parse_config(GenerateConfig, tree(folder, model, **keys))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}], ids=["greedy", "drawn"])
def test_a_batch_answers_as_one_prompt_at_a_time_does(tmp_path: Path, teacher: Path, drawn: dict[str, Any]) -> None:
    batched = generate(config(tmp_path, teacher, **drawn), tmp_path / "batched.jsonl")
    alone = generate(config(tmp_path, teacher, batch_size=1, **drawn), tmp_path / "alone.jsonl")
    assert batched.digest == alone.digest
    assert (batched.prompts, batched.answers + sum(batched.dropped.values())) == (14, 14)
    lines = lines_of(tmp_path / "batched.jsonl")
    assert [one["id"] for one in lines[:3]] == ["p0~0", "p0~1", "p1~0"]
    assert lines[1]["prompt"] == f"He wrote: {lines[0]['prompt']}"
    assert ["reference" in one for one in lines[:4]] == [True, True, False, False]
    assert batched.tokens > 14


def test_a_greedy_answer_is_the_largest_logit_step_by_step(tmp_path: Path, teacher: Path) -> None:
    generate(config(tmp_path, teacher), tmp_path / "a.jsonl")
    asker = Asker(config(tmp_path, teacher).teacher, config(tmp_path, teacher))
    model, words = asker._model, asker.tokenizer
    for line in lines_of(tmp_path / "a.jsonl")[:4]:
        ids = words(line["prompt"])["input_ids"]
        made: list[int] = []
        while len(made) < 12 and (not made or made[-1] != words.eos_token_id):
            with torch.no_grad():
                made.append(int(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax()))
        kept = made[:-1] if made[-1] == words.eos_token_id else made
        assert line["completion"] == words.decode(kept)
        assert (line["tokens"], line["ended"]) == (len(kept), len(kept) < len(made))


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(tmp_path: Path, teacher: Path) -> None:
    free = lines_of(Path(generate(config(tmp_path, teacher), tmp_path / "free.jsonl").path))
    stop = free[0]["completion"][4:6]
    result = generate(config(tmp_path, teacher, stop=[stop], filter={"must_end": True}), tmp_path / "stopped.jsonl")
    stopped = {one["id"]: one for one in lines_of(tmp_path / "stopped.jsonl")}
    assert stopped
    for one in free:
        if stop in one["completion"] and one["completion"].index(stop):
            assert stopped[one["id"]]["completion"] == one["completion"].split(stop)[0]
        elif not one["ended"]:
            assert one["id"] not in stopped
    assert all(one["ended"] and stop not in one["completion"] for one in stopped.values())
    assert result.dropped.get("not ended", 0) == result.cut > 0
    assert result.tokens < sum(one["tokens"] for one in free)


def test_what_a_sample_is_drawn_depends_on_the_seed_and_nothing_else(tmp_path: Path, teacher: Path) -> None:
    keys: dict[str, Any] = {"temperature": 1.0, "templates": ["{prompt}", "{prompt}"]}
    one = generate(config(tmp_path, teacher, seed=1, **keys), tmp_path / "one.jsonl")
    two = generate(config(tmp_path, teacher, seed=2, **keys), tmp_path / "two.jsonl")
    assert one.digest != two.digest
    drawn = lines_of(tmp_path / "one.jsonl")
    assert any(a["completion"] != b["completion"] for a, b in zip(drawn[::2], drawn[1::2], strict=False))


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


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, teacher: Path) -> None:
    whole = generate(config(tmp_path, teacher), tmp_path / "whole.jsonl")
    seen: list[int] = []

    def kill(done: int, total: int) -> None:
        seen.append(done)
        if done >= 7:  # in the second chunk
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(config(tmp_path, teacher), tmp_path / "cut.jsonl", progress=kill)
    assert not (tmp_path / "cut.jsonl").exists()
    with (tmp_path / "cut.jsonl.part").open("ab") as file:
        file.write(b'{"half a li')  # a chunk that was being written when the power went
    again = generate(config(tmp_path, teacher), tmp_path / "cut.jsonl", progress=lambda done, _: seen.append(done))
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "cut.jsonl.part").exists()
    assert seen[-1] == 14
    ours = {**again.as_dict(), "path": "", "seconds": 0, "tokens_per_second": 0}
    assert ours == {**whole.as_dict(), "path": "", "seconds": 0, "tokens_per_second": 0}
    assert generate(config(tmp_path, teacher), tmp_path / "cut.jsonl").already_complete


def test_a_run_that_died_between_its_last_two_writes_is_complete(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(written_module.disk, "sync", lambda folder: die() if (folder / "a.jsonl").exists() else None)
        with pytest.raises(KeyboardInterrupt):
            generate(config(tmp_path, teacher), tmp_path / "a.jsonl")
    digest = (tmp_path / "a.jsonl").read_bytes()
    generate(config(tmp_path, teacher), tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == digest
    assert json.loads((tmp_path / "a.jsonl.json").read_text())["complete"]


def test_another_config_source_or_file_is_refused(tmp_path: Path, teacher: Path) -> None:
    out = tmp_path / "a.jsonl"
    generate(config(tmp_path, teacher), out)
    with pytest.raises(MismatchError, match="another config"):
        generate(config(tmp_path, teacher, max_new_tokens=5), out)
    other = config(tmp_path, teacher)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"id": "late", "prompt": "The fog"}\n')
    with pytest.raises(MismatchError, match="another source"):
        generate(other, out)
    (tmp_path / "mine.jsonl").write_text("mine\n")
    with pytest.raises(MismatchError, match="no record"):
        generate(config(tmp_path, teacher), tmp_path / "mine.jsonl")
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(CorruptObjectError):
        generate(config(tmp_path, teacher), out)


def test_what_a_request_to_stop_does(tmp_path: Path, teacher: Path) -> None:
    tree_ = tree(tmp_path, teacher, batch_size=1, chunk_prompts=1)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree_))
    out = tmp_path / "a.jsonl"
    code = (
        "import sys, os, signal; from kdcache.config import load_config; from pathlib import Path\n"
        "from kdcache.generate import GenerateConfig, generate\n"
        "generate(load_config(GenerateConfig, Path(sys.argv[1])), sys.argv[2],"
        " progress=lambda done, _: os.kill(os.getpid(), signal.SIGTERM) if done == 5 else None)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.yaml"), str(out)], capture_output=True)
    assert Interrupted.__name__ in done.stderr.decode()
    assert json.loads((tmp_path / "a.jsonl.json").read_text())["chunks"] == 2
    assert not out.exists()
    assert generate(parse_config(GenerateConfig, tree_), out).prompts == 14


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


def test_out_of_memory_halves_the_batch(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(config(tmp_path, teacher), tmp_path / "whole.jsonl")
    plain: Callable[..., Any] = Asker._generate

    def small(self: Asker, prompts: list[Any], tokens: list[Any]) -> Any:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return plain(self, prompts, tokens)

    monkeypatch.setattr(Asker, "_generate", small)
    assert generate(config(tmp_path, teacher), tmp_path / "small.jsonl").digest == whole.digest


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


def test_answers_are_captured_trained_on_and_compared(tmp_path: Path, teacher: Path) -> None:
    keys: dict[str, Any] = {"filter": {"same_tokens": True}}
    answers = generate(config(tmp_path, teacher, **keys), tmp_path / "answers.jsonl")
    lines = lines_of(tmp_path / "answers.jsonl")
    assert len(lines) >= 2
    captured = {
        "source": {"path": answers.path, "id_field": "id"},
        "teacher": {"model": str(teacher), "dtype": "float32", "device": "cpu"},
        "targets": {"k": 4},
    }
    capture(parse_config(CaptureConfig, captured), tmp_path / "store")
    store = open_store(tmp_path / "store")
    counted = sum(
        int((store.read_shard(n, ["loss_mask"]).columns["loss_mask"] == 1).sum()) for n in range(len(store.shards))
    )
    assert counted == sum(one["tokens"] for one in lines)
    run = parse_config(TrainConfig, {"student": STUDENT, "run": {"steps": 2, "device": "cpu"}})
    train(run, tmp_path / "store", tmp_path / "run")
    report = score({"student": tmp_path / "run", "itself": teacher}, answers.path, device="cpu")
    told, student, itself = report.rows
    assert told.teacher is None
    assert itself.teacher is not None
    assert (itself.teacher.exact_match, itself.teacher.answers) == (1.0, len(lines))
    assert student.teacher is not None
    assert student.teacher.exact_match < 1
    assert student.reference is not None
    assert student.reference.answers == sum("reference" in one for one in lines)
    assert json.loads(json.dumps(report.as_dict()))["rows"][2]["name"] == "itself"
    assert report.markdown().count("\n") == 5
    with pytest.raises(SourceError):
        score({}, tmp_path / "nothing.jsonl")


def test_the_command_generates_and_compares(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree(tmp_path, teacher)))
    out = tmp_path / "a.jsonl"

    def command(*extra: str) -> str:
        line = ["kdcache", "generate", str(tmp_path / "c.yaml"), "--out", str(out), "-q", *extra]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    made = json.loads(command("--json", "--set", "max_new_tokens=6"))
    assert (made["prompts"], made["already_complete"]) == (14, False)
    scored = json.loads(command("--json", "--set", "max_new_tokens=6", "--score", str(teacher)))
    assert scored["already_complete"]
    assert scored["report"]["rows"][1]["teacher"]["exact_match"] == 1.0
    shown = command("--set", "max_new_tokens=6", "--score", str(teacher))
    assert "prompts: 14" in shown
    assert "BLEU" in shown


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
