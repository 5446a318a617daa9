"""Training from a store: the same losses as online, exact resume, no teacher in memory, and refusals before step 1."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import AccessError, ConfigError, Interrupted, MismatchError, StorageFullError, TrainingError
from kdcache.evaluate import evaluate
from kdcache.online import train_online
from kdcache.store import open_store
from kdcache.train import METRICS, TrainProgress, train
from kdcache.train.config import TrainConfig
from tests import tiny
from tests.killed import killed_at

STUDENT = {
    "config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
}


def config_of(**sections: Any) -> TrainConfig:
    tree = {"student": STUDENT, "data": {"batch_size": 2}, "run": {"steps": 6, "device": "cpu"}, **sections}
    return parse_config(TrainConfig, tree)


def losses(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of the tiny teacher: `whole` keeps every logit losslessly, `top` eight with draws and hidden features."""
    folder = tmp_path_factory.mktemp("train")
    tree = tiny.capture_tree(folder)
    kept = {
        "whole": {"k": 300, "logits": "float32", "exact": True},
        "top": {"k": 8, "draws": 4, "hidden": ["final", "1"]},
    }
    for name, targets in kept.items():
        tree["targets"] = targets
        capture(parse_config(CaptureConfig, tree), folder / name)
    return folder


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "exact"])
def test_cached_and_online_give_the_same_losses_over_20_steps(
    captured: Path, tmp_path: Path, tail: str, temperature: float
) -> None:
    loss = {"tail": tail, "alpha": 0.7, "temperature": temperature}
    config = config_of(loss=loss, run={"steps": 20, "device": "cpu"})
    train(config, captured / "whole", tmp_path / "cached")
    train_online(config, captured / "whole", tmp_path / "online", teacher=str(captured / "teacher"))
    cached, online = losses(tmp_path / "cached"), losses(tmp_path / "online")
    assert len(cached) == len(online) == 20
    assert np.abs(np.subtract(cached, online)).max() <= 1e-5
    assert cached[-1] < cached[0]


def test_bucket_and_exact_agree_when_every_logit_is_kept(captured: Path, tmp_path: Path) -> None:
    for tail in ("bucket", "exact"):
        train(config_of(loss={"tail": tail, "alpha": 1.0}), captured / "whole", tmp_path / tail)
    assert np.allclose(losses(tmp_path / "bucket"), losses(tmp_path / "exact"), atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_every_step_is_exact_to_the_bit(captured: Path, tmp_path: Path, workers: int) -> None:
    loss = {"hidden": [{"teacher": "1", "student": "1", "kind": "cosine"}], "tail": "sampled"}
    run = {"steps": 7, "device": "cpu", "checkpoint_every": 1}
    config = config_of(loss=loss, run=run, data={"batch_size": 2, "workers": workers})
    train(config, captured / "top", tmp_path / "whole")
    reference = losses(tmp_path / "whole")

    for step in (1, 2, 4, 6) if workers == 0 else (3,):
        folder = tmp_path / f"killed-{step}"
        killed_at(step, config, captured / "top", folder)
        train(config, captured / "top", folder)
        assert losses(folder) == reference
        same = (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
        assert same


def test_a_disk_without_room_is_said_and_the_same_call_goes_on(captured: Path, tmp_path: Path) -> None:
    config = config_of(run={"steps": 4, "device": "cpu", "checkpoint_every": 2})
    train(config, captured / "top", tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = (tmp_path / "whole" / "model.safetensors").stat().st_size
    for limit in (whole - 100, whole + 2000):  # not even the weights; the weights, and not the optimiser's two moments
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(StorageFullError, match="no space left"):
                train(config, captured / "top", tmp_path / "r")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    train(config, captured / "top", tmp_path / "r")
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")


def test_a_gradient_scaler_goes_on_where_it_was(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scaling(Accelerator):
        """Half precision's scaler, which a CPU is not given, at work on float32."""

        def __init__(self, **keys: Any) -> None:
            super().__init__(**keys)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    monkeypatch.setattr("kdcache.train.loop.Accelerator", Scaling)
    config = config_of(run={"steps": 7, "device": "cpu", "checkpoint_every": 1})
    train(config, captured / "top", tmp_path / "whole")
    killed_at(4, config, captured / "top", tmp_path / "killed")
    train(config, captured / "top", tmp_path / "killed")
    states = [
        json.loads((tmp_path / name / "checkpoints" / "step-00000007" / "state.json").read_bytes())["state"]["scaler"]
        for name in ("whole", "killed")
    ]
    assert states[0] == states[1]
    assert (states[0]["scale"], states[0]["_growth_tracker"]) == (64.0, 1)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(captured: Path, tmp_path: Path) -> None:
    config = config_of(run={"steps": 6, "device": "cpu", "checkpoint_every": 2})
    train(config, captured / "top", tmp_path / "whole")

    killed_at(5, config, captured / "top", tmp_path / "r")
    newest = sorted((tmp_path / "r" / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"torn")
    train(config, captured / "top", tmp_path / "r")
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")


def test_sigterm_writes_a_checkpoint_and_the_same_call_goes_on(captured: Path, tmp_path: Path) -> None:
    import signal

    config = config_of()
    train(config, captured / "top", tmp_path / "whole")

    def stop(state: TrainProgress) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 3 of 6"):
        train(config, captured / "top", tmp_path / "r", progress=stop)
    train(config, captured / "top", tmp_path / "r")
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")


def test_a_finished_run_does_nothing_again_and_another_config_is_refused(captured: Path, tmp_path: Path) -> None:
    first = train(config_of(), captured / "top", tmp_path / "r")
    again = train(config_of(), captured / "top", tmp_path / "r")
    assert again.already_complete
    assert again.loss == first.loss
    with pytest.raises(MismatchError, match="another run"):
        train(config_of(loss={"alpha": 0.5}), captured / "top", tmp_path / "r")


def test_accumulation_gives_the_gradient_of_one_large_batch(captured: Path, tmp_path: Path) -> None:
    optim = {"clip_norm": 0.0}
    large = config_of(data={"batch_size": 4}, optim=optim, run={"steps": 3, "device": "cpu"})
    small = config_of(data={"batch_size": 2}, optim=optim, run={"steps": 3, "device": "cpu", "accumulation": 2})
    train(large, captured / "top", tmp_path / "large")
    train(small, captured / "top", tmp_path / "small")
    assert np.allclose(losses(tmp_path / "large"), losses(tmp_path / "small"), atol=2e-5)


def test_no_teacher_module_is_imported_by_a_training_step(captured: Path, tmp_path: Path) -> None:
    code = f"""
import json, sys
from kdcache.config import parse_config
from kdcache.train import train
from kdcache.train.config import TrainConfig
tree = json.loads({json.dumps(json.dumps({"student": STUDENT, "run": {"steps": 1, "device": "cpu"}}))})
result = train(parse_config(TrainConfig, tree), {str(captured / "top")!r}, {str(tmp_path / "r")!r})
loaded = [name for name in sys.modules if name.startswith(("kdcache.teachers", "kdcache.capture", "kdcache.online"))]
sys.exit(bool(loaded) or result.teacher_in_memory)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_hard_labels_alone_read_no_teacher_column(captured: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(captured / "top", copy)
    for name in ("head_ids", "head_logits", "tail_log_partition"):
        shutil.rmtree(copy / "columns" / name / "c")
    result = train(config_of(loss={"alpha": 0.0}), copy, tmp_path / "r")
    assert result.tail == "none: hard labels only"
    assert losses(tmp_path / "r", "divergence") == [0.0] * 6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "sampled", "renormalise"])
def test_every_divergence_trains_with_every_tail_policy(
    captured: Path, tmp_path: Path, divergence: str, tail: str
) -> None:
    loss = {"divergence": divergence, "tail": tail, "alpha": 1.0, "temperature": 2.0}
    optim = {"learning_rate": 0.01, "warmup_steps": 0, "schedule": "constant"}
    for steps in (1, 30):
        run = {"steps": steps, "device": "cpu"}
        train(config_of(loss=loss, run=run, optim=optim), captured / "top", tmp_path / str(steps))
    assert np.isfinite(losses(tmp_path / "30")).all()
    before, after = (evaluate(tmp_path / str(steps), captured / "whole").kl for steps in (1, 30))
    assert after < before


def test_the_saved_student_is_a_transformers_folder_and_evaluates(captured: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(config_of(), captured / "top", tmp_path / "r")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r")
    assert sum(one.numel() for one in model.parameters()) == result.student_parameters
    assert AutoTokenizer.from_pretrained(tmp_path / "r").eos_token == "</s>"
    store = open_store(captured / "whole")
    metrics = evaluate(tmp_path / "r", captured / "whole")
    ce = kl = teacher = positions = 0.0
    head = store.output_head()
    assert head is not None
    with torch.no_grad():
        for sample in store:
            log_q = model(torch.from_numpy(sample.input_ids)[None]).logits[0, :-1].double().log_softmax(-1)
            log_p = torch.tensor(sample.hidden["final"] @ head.weight.T).double().log_softmax(-1)
            rows = torch.arange(len(log_q))
            ce -= float(log_q[rows, sample.labels].sum())
            teacher -= float(log_p[rows, sample.labels].sum())
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            positions += len(rows)
    assert metrics.positions == positions
    assert metrics.cross_entropy == pytest.approx(ce / positions, abs=1e-4)
    assert metrics.kl == pytest.approx(kl / positions, abs=1e-4)
    assert metrics.kl_kind == "exact"
    assert metrics.teacher_perplexity == pytest.approx(np.exp(teacher / positions), rel=1e-3)
    bound = evaluate(tmp_path / "r", captured / "top")
    assert bound.kl_kind == "a lower bound"
    assert bound.kl < metrics.kl


def test_a_distilled_student_comes_nearer_to_its_teacher_than_chance(captured: Path, tmp_path: Path) -> None:
    run = {"steps": 60, "device": "cpu"}
    for name, alpha in (("kd", 1.0), ("hard", 0.0)):
        config = config_of(loss={"alpha": alpha}, run=run, optim={"learning_rate": 0.02})
        train(config, captured / "top", tmp_path / name)
    kd, hard = (evaluate(tmp_path / name, captured / "whole").kl for name in ("kd", "hard"))
    assert kd < hard


def test_validation_patience_and_the_best_student(captured: Path, tmp_path: Path) -> None:
    config = config_of(
        data={"batch_size": 2, "validation": str(captured / "top")},
        loss={"alpha": 1.0},
        optim={"learning_rate": 1.0, "warmup_steps": 0},
        run={"steps": 40, "device": "cpu", "validate_every": 2, "patience": 2, "metric": "kl"},
    )
    result = train(config, captured / "top", tmp_path / "r")
    assert result.stopped_early
    assert result.steps < 40
    lines = [json.loads(line) for line in (tmp_path / "r" / METRICS).read_text().splitlines()]
    best = min(line["validation"]["kl"] for line in lines if "validation" in line)
    assert evaluate(tmp_path / "r", captured / "top").kl == pytest.approx(best, abs=1e-4)


def test_alpha_and_temperature_follow_their_schedules(captured: Path, tmp_path: Path) -> None:
    loss = {
        "alpha": {"start": 1.0, "end": 0.5, "schedule": "linear"},
        "temperature": {"start": 4.0, "end": 1.0, "schedule": "cosine"},
    }
    train(config_of(loss=loss), captured / "top", tmp_path / "r")
    assert np.allclose(losses(tmp_path / "r", "alpha"), np.linspace(1.0, 0.5, 6))
    expected = 4 - 3 * (1 - np.cos(np.pi * np.linspace(0, 1, 6))) / 2
    assert np.allclose(losses(tmp_path / "r", "temperature"), expected)


class Unigram(nn.Module):
    """A student that is no transformers model."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table(input_ids)


def test_any_module_can_be_a_student(captured: Path, tmp_path: Path) -> None:
    config = config_of(
        student={"factory": "tests.train.test_train:Unigram"}, optim={"learning_rate": 0.1, "warmup_steps": 0}
    )
    result = train(config, captured / "top", tmp_path / "r")
    assert result.student_parameters == 300 * 300
    values = losses(tmp_path / "r")
    assert values[-1] < values[0]
    assert evaluate(tmp_path / "r", captured / "top").positions > 0


def test_bf16_autocast_stays_close(captured: Path, tmp_path: Path) -> None:
    train(config_of(), captured / "top", tmp_path / "a")
    train(config_of(run={"steps": 6, "device": "cpu", "precision": "bf16"}), captured / "top", tmp_path / "b")
    assert np.allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=0.05)


def test_a_loss_that_stays_nan_stops_the_run(captured: Path, tmp_path: Path) -> None:
    config = config_of(student={"factory": "tests.train.test_train:Broken"}, run={"steps": 30, "device": "cpu"})
    with pytest.raises(TrainingError, match="20 steps in a row"):
        train(config, captured / "top", tmp_path / "r")


class Broken(Unigram):
    """A student whose logits are NaN."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask) * float("nan")


def refusal_student(folder: Path, *, vocabulary: int = 300, text: str = tiny.TEXT) -> Path:
    tiny.llama(vocabulary).save_pretrained(folder)
    tiny.tokenizer(vocabulary, text=text).save_pretrained(folder)
    return folder


def test_another_tokenizer_or_vocabulary_is_refused_before_the_first_step(captured: Path, tmp_path: Path) -> None:
    other = refusal_student(tmp_path / "other", text="entirely different words make different merges " * 4)
    with pytest.raises(MismatchError, match="tokenizer is not the teacher's: vocabulary differs"):
        train(config_of(student={"model": str(other)}), captured / "top", tmp_path / "a")
    small = {"config": {**STUDENT["config"], "vocab_size": 200}}
    with pytest.raises(MismatchError, match="200 embeddings"):
        train(config_of(student=small), captured / "top", tmp_path / "b")
    same = refusal_student(tmp_path / "same")
    train(config_of(student={"model": str(same)}), captured / "top", tmp_path / "c")
    chats = refusal_student(tmp_path / "chats")
    words = tiny.tokenizer()
    words.chat_template = "{{ messages }}"
    words.save_pretrained(chats)
    with pytest.raises(MismatchError, match="chat_template differs"):
        train(config_of(student={"model": str(chats)}), captured / "top", tmp_path / "e")
    meant = config_of(student={"model": str(chats), "any_template": True}, run={"steps": 1, "device": "cpu"})
    train(meant, captured / "top", tmp_path / "e")
    sees = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    with pytest.raises(MismatchError, match="sees the tokens"):
        train(config_of(student={"config": sees}), captured / "top", tmp_path / "f")
    blind = config_of(student={"config": {**sees, "is_decoder": True}}, run={"steps": 1, "device": "cpu"})
    train(blind, captured / "top", tmp_path / "g")
    padded = {"config": {**STUDENT["config"], "vocab_size": 320}}
    train(config_of(student=padded), captured / "top", tmp_path / "d")  # padding rows are no difference
    assert not (tmp_path / "a" / METRICS).exists()


def test_a_weight_by_a_loss_that_is_not_computed_is_refused(captured: Path, tmp_path: Path) -> None:
    weights = {"by": "student_loss"}
    for alpha in (1.0, {"start": 1.0, "end": 1.0}):
        config = config_of(loss={"tail": "exact", "alpha": alpha, "weights": weights})
        with pytest.raises(ConfigError, match="would weigh the same"):
            train(config, captured / "whole", tmp_path / "r")
    for number, loss in enumerate(({"tail": "exact", "alpha": 0.9}, {"alpha": 1.0})):
        train(config_of(loss={**loss, "weights": weights}), captured / "whole", tmp_path / str(number))


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"loss": {"tail": "exact"}}, MismatchError, "last hidden state"),
        ({"loss": {"hidden": [{"teacher": "2"}]}}, MismatchError, "no hidden layer '2'"),
        ({"loss": {"alpha": 1.5}}, ConfigError, "outside 0 to 1"),
        ({"loss": {"temperature": 0.0}}, ConfigError, "positive"),
        ({"loss": {"divergence": "forward_k"}}, ConfigError, "no divergence"),
        ({"student": {"model": "./nowhere"}}, AccessError, "does not load"),
        ({"student": {"factory": "os:nothing"}}, ConfigError, "no student factory"),
        ({"student": {"config": {"model_type": "lama"}}}, ConfigError, "makes no model"),
    ],
)
def test_mistakes_are_said_before_the_first_step(
    captured: Path, tmp_path: Path, sections: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(config_of(**sections), captured / "top", tmp_path / "r")
    assert not (tmp_path / "r" / METRICS).exists()


def test_sampled_needs_draws(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "s")
    with pytest.raises(MismatchError, match="needs tail draws"):
        train(config_of(loss={"tail": "sampled"}), store, tmp_path / "r")


def test_a_student_takes_exactly_one_origin() -> None:
    with pytest.raises(ConfigError, match="exactly one of"):
        config_of(student={**STUDENT, "model": "x"})


def on_two_ranks(tree: dict[str, Any], store: Path, out: Path) -> None:
    import yaml

    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511", "-m"]
    line += ["kdcache", "train", str(config), "--store", str(store), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_ranks_train_as_one_with_twice_the_batch(captured: Path, tmp_path: Path) -> None:
    tree = {"student": STUDENT, "data": {"batch_size": 2}, "run": {"steps": 4, "device": "cpu"}}
    on_two_ranks(tree, captured / "top", tmp_path / "two")
    train(config_of(data={"batch_size": 4}, run={"steps": 4, "device": "cpu"}), captured / "top", tmp_path / "one")
    first = np.array(losses(tmp_path / "one", "learning_rate"))
    assert np.array_equal(first, losses(tmp_path / "two", "learning_rate"))
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=2e-4), name


class OnceBroken(Unigram):
    """A student whose logits are NaN once, in one rank; its normalisation sees other batches in each."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.norm = nn.BatchNorm1d(vocab_size)
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += self.training
        logits = self.norm(super().forward(input_ids, attention_mask).transpose(1, 2)).transpose(1, 2)
        return logits * float("nan") if self.training and self.calls == 2 and os.environ.get("RANK") == "1" else logits


@pytest.mark.slow
def test_what_happens_in_one_rank_is_decided_by_all(captured: Path, tmp_path: Path) -> None:
    run = {"steps": 6, "device": "cpu", "validate_every": 1, "patience": 2, "ema": 0.5}
    student = {"factory": "tests.train.test_train:OnceBroken"}
    # a rate at which the student soon gets worse: ranks must see so in the same step, or wait for each other for ever
    data = {"batch_size": 2, "validation": str(captured / "top")}
    tree = {"student": student, "data": data, "run": run, "optim": {"learning_rate": 0.5, "warmup_steps": 0}}
    on_two_ranks({**tree, "loss": {"temperature": {"towards": "harder"}}}, captured / "top", tmp_path / "two")
    values = losses(tmp_path / "two")
    assert len(values) > 2
    assert np.isfinite(values).all()  # the first rank's
    found = losses(tmp_path / "two", "temperature")
    assert found[1] == found[2] != found[0]  # the step is left out of both


def test_patience_without_a_held_out_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="held-out store"):
        config_of(run={"patience": 2})
