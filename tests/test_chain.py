"""A chain runs in order, and gives the same numbers wherever it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kdcache import chain as chain_module
from kdcache.chain import CHAIN, ChainConfig, run_chain
from kdcache.cli import main
from kdcache.config import load_config, parse_config
from kdcache.errors import Interrupted
from kdcache.examples import Examples, write_examples
from kdcache.fingerprint import digest_file
from tests import tiny

COUNT, CLASSES = 60, 5


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, 1, 8, 8)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("pixels")
    return write_examples(folder, pixels=images, label=random.integers(0, CLASSES, COUNT))


@pytest.fixture
def tree(examples: Examples) -> dict[str, Any]:
    return tree_of(examples.folder)


@pytest.fixture(scope="module")
def straight(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a chain that nothing stopped."""
    out = tmp_path_factory.mktemp("straight")
    run_chain(read(tree_of(examples.folder)), out, quiet=True)
    return out


def tree_of(pixels: Path) -> dict[str, Any]:
    return {
        "base": {
            "capture": {
                "examples": {"path": str(pixels), "batch_size": 16},
                "teacher": {"kind": "student", "device": "cpu"},
                "store": {"shard_positions": 16, "chunk_positions": 8},
            },
            "train": {
                "student": {"factory": "tests.networks:conv"},
                "data": {"examples": str(pixels), "batch_size": 10},
                "optim": {"learning_rate": 0.01, "warmup_steps": 0},
                "run": {"epochs": 2, "device": "cpu", "checkpoint_every": 3},
            },
        },
        "steps": [
            {"name": "labels", "capture": {"teacher": {"kind": "module", "model": "tests.test_chain:nothing"}}},
            {"name": "teacher", "train": {"store": "labels", "loss": {"alpha": 0.0}}},
            {"name": "says", "capture": {"teacher": {"model": "${teacher}"}}},
            {"name": "student", "train": {"store": "says", "data": {"validation": "${says}"}}},
            {"name": "measured", "eval": {"student": "student", "store": "says"}},
            {
                "generations": {
                    "count": 2,
                    "first": {"again": "student"},
                    "steps": [
                        {"name": "heard", "capture": {"teacher": {"model": "${previous.again}"}}},
                        {"name": "again", "train": {"store": "heard", "run": {"seed": "${generation}"}}},
                    ],
                }
            },
            {"name": "last", "eval": {"student": "again", "store": "${says}"}},
        ],
    }


def nothing(pixels: Any) -> Any:
    return pixels.new_zeros((len(pixels), CLASSES)).float()


NAMES = ["labels", "teacher", "says", "student", "measured", "heard-1", "again-1", "heard-2", "again-2", "last"]


def read(tree: dict[str, Any]) -> ChainConfig:
    return parse_config(ChainConfig, tree)


def weights(out: Path) -> dict[str, str]:
    return {str(one.parent.name): digest_file(one) for one in sorted(out.glob("*/model.safetensors"))}


def digests(out: Path) -> list[Any]:
    found = json.loads((out / CHAIN).read_text())["steps"]
    return [one["result"].get("digest", one["result"].get("kl")) for one in found]


def test_a_chain_runs_and_run_again_does_nothing(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run_chain(read(tree), out, quiet=True)
    assert [one.name for one in first.steps] == NAMES
    assert first["student"]["validation"]["kl"] == pytest.approx(first["measured"]["kl"], rel=1e-4)
    assert json.loads((out / CHAIN).read_text()) == json.loads(json.dumps(first.as_dict()))
    monkeypatch.setattr(chain_module, "evaluate", None)  # what was measured is not measured again
    before = weights(out)
    again = run_chain(read(tree), out, quiet=True)
    assert all(one.result["already_complete"] for one in again.steps if one.kind != "eval")
    assert (again["measured"], weights(out)) == (first["measured"], before)


@pytest.mark.parametrize("at", [("teacher", 7), ("says", 2), ("student", 1), ("again-2", 11)])
def test_stopped_inside_a_step_it_goes_on_to_the_same_numbers(
    at: tuple[str, int], tree: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = {name: getattr(chain_module, name) for name in ("capture", "train")}

    def stopping(kind: str) -> Any:
        def work(*arguments: Any, progress: Any) -> Any:
            calls = []

            def told(_state: Any) -> None:
                calls.append(None)
                if Path(arguments[-1]).name == at[0] and len(calls) == at[1]:
                    os.kill(os.getpid(), signal.SIGTERM)

            return real[kind](*arguments, progress=told)

        return work

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        for kind in real:
            patch.setattr(chain_module, kind, stopping(kind))
        with pytest.raises(Interrupted):
            run_chain(read(tree), out, quiet=True)
    done = json.loads((out / CHAIN).read_text())["steps"]
    assert [one["name"] for one in done] == NAMES[: NAMES.index(at[0])]
    run_chain(read(tree), out, quiet=True)
    assert (weights(out), digests(out)) == (weights(straight), digests(straight))
    assert len(weights(out)) == 4


def test_stopped_between_steps_and_while_measuring(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = chain_module.evaluate, tmp_path / "out"

    def stopped(*arguments: Any, **keys: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **keys)

    monkeypatch.setattr(chain_module, "evaluate", stopped)
    with pytest.raises(Interrupted, match="after 4 of 10 steps"):
        run_chain(read(tree), out, quiet=True)
    monkeypatch.setattr(chain_module, "evaluate", real)
    said = []

    def between(line: str) -> None:
        said.append(line)
        if line == "== capture heard-1":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(chain_module.display, "say", between)
    with pytest.raises(Interrupted):
        run_chain(read(tree), out)
    assert said[-1] == "== capture heard-1"
    assert len(run_chain(read(tree), out, quiet=True).steps) == len(NAMES)


@pytest.mark.slow
def test_killed_from_the_command_line_it_goes_on(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree["base"]["train"]["run"]["epochs"] = 15
    file, out = tmp_path / "chain.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(tree))
    run_chain(load_config(ChainConfig, file), tmp_path / "straight", quiet=True)
    line = [sys.executable, "-m", "kdcache", "chain", str(file), "--out", str(out), "--json", "-q"]
    codes = []
    for number, (place, wanted) in enumerate((("teacher", signal.SIGKILL), ("student", signal.SIGTERM))):
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        late = time.monotonic() + 120
        while not list((out / place).glob("checkpoints/step-*")) and process.poll() is None:
            assert time.monotonic() < late
            time.sleep(0.005)
        process.send_signal(wanted)
        said, _ = process.communicate()
        codes.append(process.returncode)
        assert number == 0 or json.loads(said)["code"] == "KD750"
    assert codes == [-signal.SIGKILL, 75]
    # a process takes long to start: the third call is in this one
    monkeypatch.setattr(sys, "argv", ["kdcache", *line[3:-2], "-q"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("heard-2", "cross entropy", "digest"))
    assert (weights(out), digests(out)) == (weights(tmp_path / "straight"), digests(tmp_path / "straight"))


def test_a_language_model_teaches_the_next_and_a_finished_chain_does_nothing(tmp_path: Path) -> None:
    sizes = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tree = {
        "base": {
            "capture": tiny.capture_tree(tmp_path),
            "train": {
                "student": {"config": {**sizes, **heads}},
                "data": {"batch_size": 2},
                "run": {"steps": 4, "device": "cpu"},
            },
        },
        "steps": [
            {"name": "says", "capture": {}},
            {"name": "assistant", "train": {"store": "says"}},
            {"name": "heard", "capture": {"teacher": {"model": "${assistant}"}}},
            {"name": "student", "train": {"store": "heard"}},
            {"name": "measured", "eval": {"student": "assistant", "store": "heard"}},
        ],
    }
    first = run_chain(read(tree), tmp_path / "out", quiet=True)
    assert first["measured"]["top1_agreement"] == 1.0
    again = run_chain(read(tree), tmp_path / "out", quiet=True)
    assert all(one.result["already_complete"] for one in again.steps if one.kind != "eval")
    assert [one["digest"] for one in (first["heard"], again["heard"])] == [first["heard"]["digest"]] * 2
