"""A student with a tokenizer of its own: what counts, what the losses are, exact resume, measures, and refusals."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import AccessError, ConfigError, MismatchError
from kdcache.evaluate import evaluate
from kdcache.export import export
from kdcache.losses.spans import Sides, span_loss
from kdcache.online import train_online
from kdcache.seeds import compare_variants
from kdcache.store import Store, open_store
from kdcache.stream import Loader, StreamConfig
from kdcache.tokenizer import load_tokenizer, tokenizer_fingerprint
from kdcache.train import METRICS, TrainResult, train
from kdcache.train.config import TrainConfig
from kdcache.train.objective import Objective
from kdcache.train.spans import held_out_by_text
from kdcache.train.student import build_student
from kdcache.train.texts import Texts
from kdcache.train.validate import held_out
from tests import tiny
from tests.killed import killed_at

SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
OTHER = "A bell, a book, a fog: the ships were late and the hour was told by hand at dusk. "


def own_tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer(290, text=OTHER * 3)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of texts (`whole` with every logit, `top` with eight) and of answers to prompts; two tokenizers."""
    folder = tmp_path_factory.mktemp("texts")
    tree = tiny.capture_tree(folder)
    for name, targets in {"whole": {"k": 300, "logits": "float32"}, "top": {"k": 8, "draws": 4}}.items():
        capture(parse_config(CaptureConfig, {**tree, "targets": targets}), folder / name)
    asked = [
        {"id": f"q{n}", "prompt": tiny.TEXT[n : n + 17], "completion": tiny.TEXT[n + 17 : n + 60]} for n in range(4)
    ]
    (folder / "asked.jsonl").write_text("\n".join(json.dumps(one) for one in asked) + "\n")
    answers = {**tree, "source": {"path": str(folder / "asked.jsonl"), "id_field": "id"}, "samples": {"max_length": 80}}
    capture(parse_config(CaptureConfig, answers), folder / "answers")
    own_tokenizer().save_pretrained(folder / "own")
    tiny.tokenizer().save_pretrained(folder / "same")
    return folder


def config_of(stores: Path, tokenizer: str | None = "own", **sections: Any) -> TrainConfig:
    student = {"config": SIZES, "tokenizer": None if tokenizer is None else str(stores / tokenizer)}
    run = {"steps": 5, "device": "cpu", **sections.pop("run", {})}
    student |= sections.pop("student", {})
    data = {"batch_size": 3, **sections.pop("data", {})}
    return parse_config(TrainConfig, {"student": student, "data": data, "run": run, **sections})


def losses(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def one_batch(store: Store) -> Any:
    return next(iter(Loader(store, StreamConfig(batch_size=len(store), shuffle=False))))


@pytest.mark.parametrize(
    "loss",
    [
        {"alpha": 0.0},
        {"alpha": 0.6, "divergence": "span_likelihood", "options": {"tau": 10.0}},
        {"alpha": 0.6, "divergence": "uld", "temperature": 2.0},
    ],
)
def test_the_loss_is_that_of_dense_logits_span_by_span(stores: Path, loss: dict[str, Any]) -> None:
    store = open_store(stores / "whole")
    texts = Texts(store, own_tokenizer())
    config = config_of(stores, loss=loss)
    student = build_student(config.student, store, seed=3, tokenizer=texts.student.tokenizer).double().eval()
    read = one_batch(store)
    batch = texts.fill(read)
    objective = Objective(config.loss, student, store, vocab_size=texts.vocab_size)
    temperature = loss.get("temperature", 1.0)
    found = objective(batch, loss["alpha"], temperature, float(batch.mask.sum()))

    table = torch.zeros(len(read.labels), 300, dtype=torch.float64)
    table = table.scatter(1, read.targets.ids.long(), read.targets.logits.double())
    ce, kd, counted, place = 0.0, 0.0, 0, 0
    offsets = read.offsets.tolist()
    for begin, end in pairwise(offsets):
        ids = [*read.input_ids[begin:end].tolist(), int(read.labels[end - 1])]
        aligned = texts._aligner.align(ids)
        own = torch.from_numpy(aligned.tokens.astype(np.int64))
        with torch.no_grad():
            logits = student(own[None]).logits[0, :, : texts.vocab_size]
        log_q, log_p = logits.log_softmax(1), table[begin:end].log_softmax(1)
        for a, b, c, d, _ in aligned.spans.tolist():
            if a == 0 or c == 0:
                continue
            theirs = sum(log_p[t - 1, ids[t]] for t in range(a, b))
            ours = sum(log_q[t - 1, own[t]] for t in range(c, d))
            ce -= float(ours)
            counted += d - c
            if loss["alpha"] and loss["divergence"] == "span_likelihood":
                kd += float(span_loss("span_likelihood", tau=10.0).loss(Sides(theirs[None], ours[None])))
            elif loss["alpha"]:
                p, q = (
                    (z / temperature).softmax(0).sort(descending=True).values
                    for z in (table[begin + a - 1], logits[c - 1])
                )
                p, q = (torch.nn.functional.pad(one, (0, 300 - len(one))) for one in (p, q))
                kd += float((p - q).abs().sum())
        place += len(own) - 1
    assert counted == int(batch.mask.sum())
    assert place == len(batch.labels)
    assert float(found["cross_entropy"]) == pytest.approx(ce / counted, abs=1e-6)
    assert float(found["divergence"]) == pytest.approx(kd / counted, abs=1e-5)
    expected = loss["alpha"] * kd / counted + (1 - loss["alpha"]) * ce / counted
    assert float(found["loss"].detach()) == pytest.approx(expected, abs=1e-5)


def test_a_students_own_tokenizer_that_is_the_teachers_changes_nothing(stores: Path, tmp_path: Path) -> None:
    loss = {"alpha": 0.0}
    validation = {"validation": str(stores / "whole")}
    plain = train(config_of(stores, None, loss=loss, data=validation), stores / "whole", tmp_path / "plain")
    same = train(config_of(stores, "same", loss=loss, data=validation), stores / "whole", tmp_path / "same")
    assert np.allclose(losses(tmp_path / "plain"), losses(tmp_path / "same"), atol=1e-6)
    assert plain.positions == same.positions
    assert plain.validation is not None
    assert same.validation is not None
    for name in ("cross_entropy", "teacher_cross_entropy", "top1_agreement", "accuracy", "positions"):
        assert same.validation[name] == pytest.approx(plain.validation[name], abs=1e-5)
    assert plain.validation["bits_per_byte"] is None


def test_bits_per_byte_are_nats_over_the_bytes_of_the_text(stores: Path) -> None:
    store, words = open_store(stores / "whole"), tiny.tokenizer()
    student = build_student(config_of(stores, None).student, store, seed=0)
    found = held_out_by_text(student, store, tokenizer=words)
    plain = held_out(student, store)
    nbytes = sum(len(words.decode(one.labels.tolist()).encode()) for one in (store[n] for n in range(len(store))))
    assert plain.teacher_cross_entropy is not None
    for bits, nats in (
        (found.bits_per_byte, plain.cross_entropy),
        (found.teacher_bits_per_byte, plain.teacher_cross_entropy),
    ):
        assert bits == pytest.approx(nats * plain.positions / nbytes / math.log(2), rel=1e-5)
    bernoulli = 0.0
    read = one_batch(store)
    log_p = (read.targets.label_logit - read.targets.log_partition(1.0)).double()
    with torch.no_grad():
        padded = read.padded()
        logits = student(padded.input_ids, padded.attention_mask).logits.flatten(0, 1)[padded.index]
        log_q = logits.log_softmax(1).gather(1, read.labels[:, None])[:, 0].double()
    p, q = log_p.exp(), log_q.exp()
    bernoulli = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert found.kl == pytest.approx(float(bernoulli), rel=1e-4)


def test_what_the_store_does_not_count_no_student_counts(stores: Path) -> None:
    store, words = open_store(stores / "answers"), own_tokenizer()
    texts = Texts(store, words)
    batch = texts.fill(one_batch(store))
    assert batch.spans is not None
    offsets = batch.offsets.tolist()
    for number, (begin, end) in enumerate(pairwise(offsets)):
        learned = batch.labels[begin:end][batch.mask[begin:end]].tolist()
        answer = tiny.TEXT[number + 17 : number + 60]
        # a token that also has a part of the prompt counts on neither side
        assert answer.endswith(words.decode(learned))
        assert len(words.decode(learned)) > len(answer) - 12
        assert words.decode(batch.input_ids[begin:end].tolist()).startswith(tiny.TEXT[number : number + 17])
    rows = batch.spans.rows
    assert bool(one_batch(store).mask[rows].all())


def test_targets_that_are_unpacked_where_the_batch_is_moved_to_are_the_same(stores: Path) -> None:
    store, found = open_store(stores / "top"), []
    texts = Texts(store, own_tokenizer())
    for packed in (False, True):
        config = config_of(stores, loss={"divergence": "uld", "alpha": 0.5})
        student = build_student(config.student, store, seed=0, tokenizer=texts.student.tokenizer)
        read = next(iter(Loader(store, StreamConfig(batch_size=4, shuffle=False, packed=packed))))
        assert (read.packed is not None) == packed
        batch = texts.fill(read).to("cpu")
        objective = Objective(config.loss, student, store, vocab_size=texts.vocab_size)
        found.append(float(objective(batch, 0.5, 1.0, 9.0)["divergence"]))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("name", ["span_likelihood", "uld"])
def test_a_batch_of_which_nothing_counts_costs_nothing(stores: Path, name: str) -> None:
    store, words = open_store(stores / "top"), own_tokenizer()
    texts = Texts(store, words)
    config = config_of(stores, loss={"divergence": name, "alpha": 0.5})
    student = build_student(config.student, store, seed=0, tokenizer=words)
    read = one_batch(store)
    batch = texts.fill(replace(read, mask=torch.zeros_like(read.mask)))
    assert batch.spans is not None
    assert len(batch.spans) == 0
    loss = Objective(config.loss, student, store, vocab_size=texts.vocab_size)(batch, 0.5, 1.0, 1.0)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(one.grad is None or not one.grad.any() for one in student.parameters())


def test_a_comparison_of_variants_is_by_the_text(stores: Path, tmp_path: Path) -> None:
    base = {
        "student": {"config": SIZES, "tokenizer": str(stores / "own")},
        "data": {"batch_size": 4, "validation": str(stores / "top")},
        "run": {"steps": 2, "device": "cpu"},
    }
    variants = {"hard labels": {"loss": {"alpha": 0.0}}, "spans": {"loss": {"divergence": "span_likelihood"}}}
    table = compare_variants(base, variants, stores / "top", tmp_path / "out", seeds=(0, 1))
    assert "| bits a byte |" in table.markdown()
    held = json.loads((tmp_path / "out" / "spans" / "1" / "train.json").read_text())["result"]["validation"]
    assert table.teacher["bits_per_byte"] == pytest.approx(held["teacher_bits_per_byte"])
    assert table.rows[1].metrics["bits_per_byte"][0] > table.teacher["bits_per_byte"] / 10
    variants["the teacher's"] = {"student": {"tokenizer": None}, "loss": {"divergence": "forward_kl"}}
    with pytest.raises(ConfigError, match="do not compare"):
        compare_variants(base, variants, stores / "top", tmp_path / "mixed", seeds=(0,))


@pytest.mark.parametrize("name", ["span_likelihood", "uld"])
def test_workers_change_nothing_and_resuming_is_exact_to_the_bit(stores: Path, tmp_path: Path, name: str) -> None:
    loss = {"divergence": name, "alpha": 0.5}
    run = {"steps": 6, "checkpoint_every": 1}

    def config(workers: int) -> TrainConfig:
        return config_of(stores, loss=loss, run=run, data={"batch_size": 3, "workers": workers})

    train(config(0), stores / "top", tmp_path / "whole")
    if name == "uld":
        train(config(2), stores / "top", tmp_path / "workers")
        assert losses(tmp_path / "workers") == losses(tmp_path / "whole")

    killed_at(3, config(0), stores / "top", tmp_path / "killed")
    result = train(config(0), stores / "top", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    same = [(tmp_path / one / "model.safetensors").read_bytes() for one in ("killed", "whole")]
    assert same[0] == same[1]
    assert result.tail.startswith(name)


def test_the_students_own_tokenizer_is_saved_beside_it_and_measures_it(stores: Path, tmp_path: Path) -> None:
    config = config_of(
        stores, loss={"divergence": "span_likelihood", "alpha": 0.5}, data={"validation": str(stores / "top")}
    )
    result = train(config, stores / "top", tmp_path / "run")
    own = tokenizer_fingerprint(own_tokenizer())
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "run"))) == own
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == own["vocabulary_size"]
    found = evaluate(tmp_path / "run")
    assert result.validation is not None
    assert found.scores["bits_per_byte"] == pytest.approx(result.validation["bits_per_byte"], rel=1e-5)
    assert found.scores["teacher_bits_per_byte"] > 0
    written = export(tmp_path / "run", tmp_path / "out", "safetensors")
    assert written.parity is None or written.parity
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "out"))) == own
    # without the run's record nothing says that another tokenizer is meant
    with pytest.raises(MismatchError, match="tokenizer is not the store's"):
        evaluate(tmp_path / "out", stores / "top")
    measured = export(tmp_path / "run", tmp_path / "other", "safetensors", store=stores / "top").quality_after
    assert measured is not None
    by_text = evaluate(tmp_path / "run", stores / "top").scores["bits_per_byte"]
    assert measured.scores["bits_per_byte"] == pytest.approx(by_text, rel=1e-5)


def test_a_run_does_not_go_on_with_another_tokenizer_in_the_same_folder(stores: Path, tmp_path: Path) -> None:
    own_tokenizer().save_pretrained(tmp_path / "own")
    config = config_of(stores, loss={"alpha": 0.0}, student={"tokenizer": str(tmp_path / "own")})
    train(config, stores / "top", tmp_path / "run")
    tiny.tokenizer(285, text=OTHER).save_pretrained(tmp_path / "own")
    with pytest.raises(MismatchError, match="another run"):
        train(config, stores / "top", tmp_path / "run")


def test_a_checkpoint_with_another_tokenizer_is_trained_only_where_that_is_said(stores: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    words = own_tokenizer()
    tiny.llama(320, width=8).save_pretrained(folder)
    words.save_pretrained(folder)

    def tried(tokenizer: str | None) -> TrainResult:
        student = {"config": None, "model": str(folder), "tokenizer": tokenizer}
        loss = {"divergence": "forward_kl" if tokenizer is None else "uld"}
        return train(config_of(stores, student=student, loss=loss), stores / "top", tmp_path / "run")

    with pytest.raises(MismatchError, match="not the teacher's") as error:
        tried(None)
    assert "student.tokenizer" in error.value.hint
    with pytest.raises(MismatchError, match="not the one in student"):
        tried(str(stores / "same"))
    assert tried(str(folder)).steps == 5


def test_a_student_reads_no_further_than_it_can(stores: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {**SIZES, "model_type": "gpt2", "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    student = {"config": {one: sizes[one] for one in ("model_type", "n_positions", "n_embd", "n_layer", "n_head")}}
    train(config_of(stores, student=student, loss={"alpha": 0.0}), stores / "top", tmp_path / "run")
    assert [one.message for one in caplog.records if "cut to the 12" in one.message]
    store = open_store(stores / "top")
    batch = Texts(store, own_tokenizer(), limit=12).fill(one_batch(store))
    assert int(batch.offsets.diff().max()) == 11
    assert batch.spans is not None
    assert torch.equal(batch.mask.nonzero()[:, 0], batch.spans.positions)


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"loss": {"divergence": "forward_kl"}}, "loss.divergence"),
        ({"loss": {"divergence": "uld", "tail": "sampled"}}, "loss.tail"),
        ({"loss": {"divergence": "uld", "tail": "exact"}}, "loss.tail"),
        ({"loss": {"divergence": "uld", "hidden": [{"teacher": "final"}]}}, "loss.hidden"),
        ({"loss": {"divergence": "uld", "pairs": {"rule": "last"}}}, "loss.pairs"),
        ({"loss": {"divergence": "uld", "weights": {"by": "entropy"}}}, "loss.weights"),
        ({"loss": {"divergence": "uld", "hard": "mse"}}, "loss.hard"),
        ({"loss": {"divergence": "uld", "temperature": {"sure": 1.0, "unsure": 2.0}}}, "loss.temperature"),
        ({"loss": {"divergence": "span_likelihood", "temperature": 2.0}}, "loss.temperature"),
        ({"loss": {"divergence": "uld"}, "data": {"teachers": [{"store": "x"}]}}, "data.teachers"),
        ({"loss": {"divergence": "uld", "options": {"tau": 3.0}}}, ""),
    ],
)
def test_what_needs_shared_positions_is_refused_before_the_first_step(
    stores: Path, tmp_path: Path, sections: dict[str, Any], where: str
) -> None:
    config = config_of(stores, **sections)
    if "teachers" in sections.get("data", {}):
        sections["data"]["teachers"] = [{"store": str(stores / "whole")}]
        config = config_of(stores, **sections)
    with pytest.raises(ConfigError) as error:
        train(config, stores / "top", tmp_path / "run")
    assert error.value.where == where
    assert not (tmp_path / "run" / METRICS).exists()


def test_other_refusals_say_what_to_do(stores: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has the teacher's") as error:
        train(config_of(stores, None, loss={"divergence": "uld"}), stores / "top", tmp_path / "run")
    assert "student.tokenizer" in error.value.hint
    uld = {"divergence": "uld"}
    with pytest.raises(ConfigError, match="live teacher"):
        train_online(config_of(stores, loss=uld), stores / "top", tmp_path / "run", teacher=str(stores / "teacher"))
    student = {"config": {**SIZES, "vocab_size": 200}}
    with pytest.raises(MismatchError, match="200 embeddings, and the vocabulary is 290"):
        train(config_of(stores, loss=uld, student=student), stores / "top", tmp_path / "run")
    with pytest.raises(AccessError, match="tokenizer cannot be loaded"):
        train(config_of(stores, "nowhere", loss=uld), stores / "top", tmp_path / "run")


def test_stores_without_a_tokenizer_and_tokenizers_without_the_text_are_refused(stores: Path, tmp_path: Path) -> None:
    from tests.test_spans import lower_case

    store = open_store(stores / "top")
    with pytest.raises(MismatchError, match="lie in spans that both tokenizers spell"):
        Texts(store, lower_case())
    plain = tiny.write_store(tmp_path / "plain")
    with pytest.raises(MismatchError, match="keeps no tokenizer"):
        Texts(plain, own_tokenizer())
