"""Answers to prompts: neither batches nor kills change them, what is dropped is counted, students are compared."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.cli import main
from kdcache.config import parse_config
from kdcache.errors import CorruptObjectError, Interrupted, MismatchError, SourceError
from kdcache.generate import GenerateConfig, generate
from kdcache.generate import written as written_module
from kdcache.generate.ask import Asker
from kdcache.generate.report import score
from kdcache.store import open_store
from kdcache.train import train
from kdcache.train.config import TrainConfig
from tests.generate.asking import config, lines_of, tree
from tests.train.test_train import STUDENT


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


def test_out_of_memory_halves_the_batch(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(config(tmp_path, teacher), tmp_path / "whole.jsonl")
    plain: Callable[..., Any] = Asker._generate

    def small(self: Asker, prompts: list[Any], tokens: list[Any]) -> Any:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return plain(self, prompts, tokens)

    monkeypatch.setattr(Asker, "_generate", small)
    assert generate(config(tmp_path, teacher), tmp_path / "small.jsonl").digest == whole.digest


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
