"""What goes out in another tool's format comes back, what is lost is said, and foreign files are not believed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from kdcache.cli import app
from kdcache.config import parse_config
from kdcache.convert import Reading, export
from kdcache.convert.distillkit import _unpacked
from kdcache.convert.intake import take_in
from kdcache.describe import first_samples
from kdcache.errors import CorruptObjectError, KdcacheError, MismatchError, SourceError, UnsupportedError
from kdcache.losses.tails import policy
from kdcache.store import Store, check, open_store
from kdcache.store.manifest import parse_manifest
from kdcache.targets.tensor import TensorTargets
from kdcache.train import train
from kdcache.train.config import TrainConfig
from tests import tiny

ROWS = ((20, 20, 11), (30, 9))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return tiny.write_store(tmp_path / "store", rows=ROWS)


def log_probabilities(store: Store, number: int) -> Any:
    targets = store[number].targets
    return targets.logits - targets.log_partition(1.0)[:, None]


@pytest.mark.parametrize("name", ["distillkit", "axolotl", "parquet"])
def test_there_and_back(name: str, store: Store, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sent = export(store, tmp_path / "out", name, progress=lambda done, total: seen.append((done, total)))
    assert (sent.samples, sent.positions, sent.digest, seen[-1]) == (5, 90, store.digest, (90, 90))
    assert sent.lost
    reading = Reading(vocab_size=50 if name != "distillkit" else None)
    back = take_in(tmp_path / "out", tmp_path / "back", name, reading)
    found = open_store(tmp_path / "back")
    assert check(found) == []
    assert (back.samples, back.positions, back.digest) == (5, 90, found.digest)
    tolerance = 6e-6 if name == "axolotl" else 1e-6
    for number in range(5):
        ours, theirs = store[number], found[number]
        assert np.array_equal(ours.input_ids, theirs.input_ids)
        assert np.array_equal(ours.targets.ids, theirs.targets.ids)
        assert np.allclose(
            theirs.targets.log_partition(1.0), 0 if name != "parquet" else ours.targets.log_partition(1.0), atol=2e-3
        )
        assert np.abs(log_probabilities(store, number) - theirs.targets.logits).max() < tolerance or name == "parquet"
        assert np.abs(ours.targets.tail_mass(1.0) - theirs.targets.tail_mass(1.0)).max() < 1e-3
        assert theirs.id == ours.id or name == "distillkit"
        if name == "parquet":
            for field in ("logits", "tail", "label_logit"):
                assert np.array_equal(getattr(ours.targets, field), getattr(theirs.targets, field))
        else:
            labels = np.where((ours.targets.ids == ours.labels[:, None]).any(1), 1.0, np.nan)
            told = ours.targets.label_log_probability(1.0) * labels
            assert np.allclose(theirs.targets.label_logit, told, atol=1e-3, equal_nan=True)


def test_what_a_partial_store_does_not_know_it_does_not_say(store: Store, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "distillkit")
    take_in(tmp_path / "out", tmp_path / "back", "distillkit")
    found = open_store(tmp_path / "back")
    document = json.loads((tmp_path / "back" / "manifest.json").read_text())
    assert (document["format_version"], document["required_features"]) == ("1.2", ["partial_targets"])
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["format_version"] == "1.1"
    targets = found[0].targets
    assert not targets.any_temperature
    for hot in (targets, TensorTargets.from_numpy(targets)):
        with pytest.raises(MismatchError, match="T = 1 only"):
            hot.log_partition(2.0)
    logits = TensorTargets.from_numpy(targets)
    student = logits.logits * 0
    assert policy("renormalise")(logits, student, student[:, 0], 2.0).log_p.isfinite().all()
    assert policy("bucket")(logits, student, student[:, 0], 1.0).log_p.exp().sum(1).allclose(student[:, 0] + 1)
    narrow = targets.narrow(3)
    assert np.allclose(narrow.tail_mass(1.0), 1 - np.exp(narrow.logits.astype(float)).sum(1), atol=2e-3)
    rows = first_samples(tmp_path / "back", 1, positions=20, candidates=2, temperature=1.0)[0]["rows"]
    assert 0 < [row["label_probability"] for row in rows].count(None) < 20


def test_a_partial_store_trains_at_one_temperature(store: Store, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "distillkit")
    take_in(tmp_path / "out", tmp_path / "back", "distillkit")
    settings: dict[str, Any] = {
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        },
        "run": {"steps": 2, "device": "cpu"},
        "data": {"batch_size": 2, "validation": str(tmp_path / "back")},
    }
    result = train(parse_config(TrainConfig, settings), tmp_path / "back", tmp_path / "run")
    assert result.steps == 2
    hot = parse_config(TrainConfig, {**settings, "loss": {"temperature": 2.0}})
    with pytest.raises(MismatchError, match="T = 1 alone"):
        train(hot, tmp_path / "back", tmp_path / "hot")
    biased = parse_config(TrainConfig, {**settings, "loss": {"temperature": 2.0, "tail": "renormalise"}})
    assert train(biased, tmp_path / "back", tmp_path / "biased").steps == 2


def test_a_manifest_that_hides_or_invents_the_feature_is_refused(store: Store, tmp_path: Path) -> None:
    from kdcache.store.manifest import seal

    export(store, tmp_path / "out", "distillkit")
    take_in(tmp_path / "out", tmp_path / "back", "distillkit")
    for folder, features in ((tmp_path / "back", []), (tmp_path / "store", ["partial_targets"])):
        document = json.loads((folder / "manifest.json").read_text())
        sealed = seal({**document, "required_features": features})
        with pytest.raises(KdcacheError, match="required features"):
            parse_manifest(json.dumps(sealed).encode(), "here")
    sealed = seal({**document, "required_features": ["partial_targets", "telepathy"]})
    with pytest.raises(UnsupportedError, match="telepathy"):
        parse_manifest(json.dumps(sealed).encode(), "here")


def test_ids_are_packed_as_distillkit_packs_them() -> None:
    # 5, 1, 6 of three bits: 101 001 110, filled up to 10100111 00000000
    assert _unpacked(np.array([[0b10100111, 0]], dtype=np.uint8), 3, 3).tolist() == [[5, 1, 6]]


def fitted(values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Compress log-probabilities as DistillKit's settings say, by other means than the reader: bytes a row."""
    rows = []
    for row in values.astype(np.float64):
        if config["delta_encoding"]:
            row = np.concatenate([row[:1], np.diff(row)])
        exact, rest = row[: config["exact_k"]], row[config["exact_k"] :]
        data = exact.astype("<f4").tobytes()
        if config.get("polynomial_terms"):
            place = np.linspace(0, 1, len(rest)) if config["normalize_t"] else np.arange(len(rest)) * 1.0
            powers = {"sqrt": 0.5}
            matrix = np.stack([place ** powers.get(term, term) for term in config["polynomial_terms"]], 1)
            coefficients = np.linalg.lstsq(matrix, rest, rcond=None)[0].astype("<f4")
            data += coefficients.tobytes()
            rest = rest - matrix @ coefficients
        at = 0
        for one in config["residual_bins"]:
            part = rest[at : at + one["num_elements"]]
            bits, at = one["element_bits"], at + one["num_elements"]
            scale = np.float16(np.abs(part).max() / 2 ** (bits - 1))
            steps = np.clip(np.rint(part / float(scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
            text = "".join(f"{int(step):0{bits}b}" for step in steps)
            text += "0" * (-len(text) % 8)
            data += scale.tobytes() + bytes(int(text[place : place + 8], 2) for place in range(0, len(text), 8))
        rows.append(list(data))
    return np.asarray(rows, dtype=np.uint8)


def step_bin(bits: int, count: int) -> dict[str, Any]:
    return {"scale_dtype": "float16", "element_bits": bits, "num_elements": count}


@pytest.mark.parametrize(
    ("terms", "bins", "delta", "normal", "tolerance"),
    [
        ([0, 1, 2, "sqrt"], [], False, False, 0.5),
        ([0, 1, 2], [step_bin(8, 10)], False, True, 0.5),
        ([0, 1, 2], [step_bin(8, 12)], False, True, 0.02),
        (None, [step_bin(7, 6), step_bin(11, 6)], False, False, 0.15),
        ([0, 1], [step_bin(10, 12)], True, False, 0.02),
    ],
)
def test_a_compressed_capture_is_read(
    terms: Any, bins: Any, delta: bool, normal: bool, tolerance: float, tmp_path: Path
) -> None:
    vocabulary, k, exact_k, tokens = 300, 16, 4, np.arange(30) % 7
    logits = tiny.dense_rows(29, vocabulary)
    whole = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    ids = np.argsort(-whole, axis=1)[:, :k]
    values = np.take_along_axis(whole, ids, 1)
    config = {
        "d": vocabulary, "k": k, "exact_k": exact_k, "exact_dtype": "float32", "polynomial_terms": terms,
        "term_dtype": "float32", "residual_bins": bins, "delta_encoding": delta, "error_diffusion": False,
        "normalize_t": normal,
    }  # fmt: skip
    packed = [[int("".join(f"{one:09b}" for one in row)[at : at + 8], 2) for at in range(0, 144, 8)] for row in ids]
    columns = {
        "input_ids": pa.array([tokens.tolist()], pa.list_(pa.uint64())),
        "compressed_logprobs": pa.array([fitted(values, config).tolist()], pa.list_(pa.list_(pa.uint8()))),
        "bytepacked_indices": pa.array([packed], pa.list_(pa.list_(pa.uint8()))),
    }
    pq.write_table(pa.table(columns), tmp_path / "data_0.parquet")
    with pytest.raises(SourceError, match="compression_config"):
        take_in(tmp_path, tmp_path / "back", "distillkit")
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(config))
    back = take_in(tmp_path, tmp_path / "back", "distillkit", Reading(pad_id=int(tokens[-1])))
    assert any("from a fit" in one for one in back.lost)
    found = open_store(tmp_path / "back")[0]
    assert found.loss_mask.tolist() == [True] * 28 + [False]
    said = {(row, one): values[row, rank] for row in range(29) for rank, one in enumerate(ids[row])}
    for row in range(29):
        for one, value in zip(found.targets.ids[row], found.targets.logits[row], strict=True):
            assert abs(said[row, int(one)] - value) < tolerance


def test_an_old_capture_is_read(tmp_path: Path) -> None:
    vocabulary, k, exact_k, degree = 50, 9, 3, 4
    logits = tiny.dense_rows(5, vocabulary)
    whole = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    ids = np.argsort(-whole, axis=1)[:, :k]
    values = np.take_along_axis(whole, ids, 1)
    place = np.arange(k - exact_k) + 1.0
    matrix = np.stack([place**-power for power in range(degree + 1)], 1)
    coefficients = np.linalg.lstsq(matrix, values[:, exact_k:].T, rcond=None)[0].T
    words = [[int(sum(int(one) << 6 * at for at, one in enumerate(row)))] for row in ids]  # 9 ids of 6 bits in 54 bits
    columns = {
        "input_ids": pa.array([[1, 2, 3, 4, 5, 6]], pa.list_(pa.uint64())),
        "packed_indices": pa.array([words], pa.list_(pa.list_(pa.uint64()))),
        "exact_values": pa.array([values[:, :exact_k].tolist()], pa.list_(pa.list_(pa.float32()))),
        "coeffs": pa.array([coefficients.tolist()], pa.list_(pa.list_(pa.float32()))),
    }
    pq.write_table(pa.table(columns), tmp_path / "data_0.parquet")
    settings = {"k": k, "exact_k": exact_k, "polynomial_degree": degree, "vocab_size": vocabulary}
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    take_in(tmp_path, tmp_path / "back", "distillkit")
    found = open_store(tmp_path / "back")[0].targets
    assert np.array_equal(np.sort(found.ids, 1), np.sort(ids, 1))
    assert np.allclose(found.logits[:, :exact_k], values[:, :exact_k], atol=1e-6)
    assert np.abs(np.sort(found.logits, 1) - np.sort(values, 1)).max() < 0.3


def served(tokenizer: Any, messages: list[dict[str, str]], last: int, shift: int = 0) -> list[Any]:
    """What a server says of the last tokens of a chat: five candidates a token, the token itself among them."""
    tokens = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    said: list[Any] = []
    for place in range(len(tokens) - last, len(tokens)):
        own = tokens[min(place + shift, len(tokens) - 1)]
        ids = [own, *(one for one in range(40, 45) if one != own)][:5]
        said.append([{"token": f"token_id:{one}", "logprob": math.log(0.5 / 2**rank)} for rank, one in enumerate(ids)])
    return said


def test_served_chats_are_read(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path / "words")
    messages = [
        {"role": "user", "content": "When the fog came?"},
        {"role": "assistant", "content": "He rang the bell by hand, and wrote the hour."},
    ]
    said = served(words, messages, 12)
    said[3] = None
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "logprobs": said, "id": "one"}) + "\n")
    reading = Reading(tokenizer=str(tmp_path / "words"))
    result = take_in(tmp_path / "a.jsonl", tmp_path / "back", "axolotl", reading)
    found = open_store(tmp_path / "back")
    sample = found[0]
    assert (sample.id, found.k, result.counts) == ("one", 5, {})
    assert sample.loss_mask.tolist() == [False] * (len(sample.labels) - 12) + [True] * 3 + [False] + [True] * 8
    counted = sample.loss_mask
    assert (sample.targets.ids[counted, 0] == sample.labels[counted]).all()
    assert np.allclose(sample.targets.tail_mass(1.0)[counted], 1 - sum(0.5 / 2**rank for rank in range(5)), atol=1e-3)
    structured = {
        "messages": messages,
        "lp": [[one["logprob"] for one in row or []] for row in said],
        "target_token_ids": [[int(one["token"].split(":")[1]) for one in row or []] for row in said],
    }
    (tmp_path / "b.jsonl").write_text(json.dumps(structured))
    take_in(tmp_path / "b.jsonl", tmp_path / "second", "axolotl", Reading(tokenizer=reading.tokenizer, field="lp"))
    assert np.array_equal(open_store(tmp_path / "second")[0].targets.ids, sample.targets.ids)


def test_lists_that_are_off_by_one_are_refused(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path / "words")
    messages = [{"role": "assistant", "content": "He rang the bell by hand, and wrote the hour in his book."}]
    line = {"messages": messages, "logprobs": served(words, messages, 14, shift=1)}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(SourceError, match="fit the token after"):
        take_in(tmp_path / "a.jsonl", tmp_path / "back", "axolotl", Reading(tokenizer=str(tmp_path / "words")))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logprobs": [[[0.1, 0.2]] * 3]}, "add up to"),
        ({"logprobs": [[[-9.0, -9.0]] * 5]}, "as many rows as tokens"),
        ({"token_ids": [[[1, 1]] * 3]}, "stands twice"),
        ({"token_ids": [[[1, 99]] * 3]}, "outside the vocabulary"),
        ({"input_ids": [[1, 2, 3, 70]]}, "outside the vocabulary"),
        ({"input_ids": [[1]]}, "log-probabilities"),
        ({"logprobs": [["a"]]}, "list"),
    ],
)
def test_foreign_files_are_not_believed(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    table = {"input_ids": [[1, 2, 3, 4]], "token_ids": [[[5, 6]] * 3], "logprobs": [[[-1.0, -2.0]] * 3], **change}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises((SourceError, CorruptObjectError), match=match):
        take_in(tmp_path / "a.parquet", tmp_path / "back", "parquet", Reading(vocab_size=50))
    assert not (tmp_path / "back" / "manifest.json").exists()


def test_positions_with_too_few_candidates_do_not_count(tmp_path: Path) -> None:
    table = {
        "input_ids": [[1, 2, 3, 4]],
        "token_ids": [[[2, 6, 7], [3, 5, 8], [4]]],
        "logprobs": [[[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-1.0]]],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    result = take_in(tmp_path / "a.parquet", tmp_path / "back", "parquet", Reading(vocab_size=50))
    assert result.counts == {"too few candidates": 1}
    assert open_store(tmp_path / "back")[0].loss_mask.tolist() == [True, True, False]
    narrow = take_in(tmp_path / "a.parquet", tmp_path / "narrow", "parquet", Reading(vocab_size=50, top=1))
    assert narrow.counts == {}
    assert open_store(tmp_path / "narrow")[0].targets.tail_mass(1.0) == pytest.approx([1 - math.exp(-1)] * 3, abs=1e-3)


def test_a_killed_conversion_goes_on(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.convert import intake, parquet

    write, calls = parquet.PlainParquet.write, []

    def once(self: Any, *args: Any) -> None:
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(parquet.PlainParquet, "write", once)
    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / "out", "parquet")
    export(store, tmp_path / "out", "parquet")
    assert calls == [0, 1, 1]
    other = tiny.write_store(tmp_path / "other", seed=3)
    with pytest.raises(MismatchError, match="another store"):
        export(other, tmp_path / "out", "parquet")
    with pytest.raises(MismatchError, match="empty folder"):
        export(other, tmp_path / "store", "parquet")
    monkeypatch.setattr(intake, "SHARD_ROWS", 64)
    monkeypatch.setattr(intake, "CHUNK_ROWS", 16)
    straight = take_in(tmp_path / "out", tmp_path / "straight", "parquet", Reading(vocab_size=50))
    assert len(open_store(tmp_path / "straight").shards) == 2
    real = intake.columns_of

    def killed(sample: Any, **rest: Any) -> Any:
        if sample.id == "sample-1-0":
            raise KeyboardInterrupt
        return real(sample, **rest)

    monkeypatch.setattr(intake, "columns_of", killed)
    with pytest.raises(KeyboardInterrupt):
        take_in(tmp_path / "out", tmp_path / "back", "parquet", Reading(vocab_size=50))
    monkeypatch.setattr(intake, "columns_of", real)
    assert take_in(tmp_path / "out", tmp_path / "back", "parquet", Reading(vocab_size=50)).digest == straight.digest


def test_the_command(store: Store, tmp_path: Path) -> None:
    run = CliRunner()
    there = run.invoke(
        app, ["convert", str(tmp_path / "store"), "--to", "distillkit", "--out", str(tmp_path / "out"), "-q"]
    )
    assert there.exit_code == 0
    assert "Lost: The tail's log-partition" in " ".join(there.output.split())
    args = ["convert", str(tmp_path / "out"), "--from", "distillkit", "--out", str(tmp_path / "back"), "--json", "-q"]
    back = run.invoke(app, args)
    assert json.loads(back.stdout)["digest"] == open_store(tmp_path / "back").digest
    assert run.invoke(app, ["convert", "x", "--out", "y"]).exit_code != 0
    assert run.invoke(app, ["convert", "x", "--to", "csv", "--out", "y"]).exit_code != 0
