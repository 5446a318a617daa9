"""Random kills of real commands: however often, what comes out at the end is what an undisturbed run gives."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kdcache.store import open_store
from kdcache.train.result import METRICS
from kdcache.verify import verify
from tests import tiny
from tests.train.test_train import STUDENT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def killed_until_done(line: list[str], seed: int, kills: int, longest: float) -> int:
    """Run a command, killing it at random moments; return how many kills landed before it finished."""
    chance = random.Random(seed)
    landed = 0
    for _ in range(kills):
        job = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        time.sleep(chance.uniform(0.0, longest))
        if job.poll() is None:
            job.kill()
            landed += 1
        if job.wait() == 0:
            break
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return landed


def timed(line: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(line, check=True, capture_output=True, env=ENVIRONMENT)
    return time.monotonic() - began


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_a_capture_killed_at_random_ends_in_the_same_digest(seed: int, tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    tree["source"]["path"] = str(tiny.write_text(tmp_path, documents=150))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    line = [sys.executable, "-m", "kdcache", "capture", str(tmp_path / "c.yaml"), "-q", "--out"]
    seconds = timed([*line, str(tmp_path / "whole")])
    assert killed_until_done([*line, str(tmp_path / "s")], seed, kills=20, longest=seconds / 2) > 0
    assert open_store(tmp_path / "s").digest == open_store(tmp_path / "whole").digest
    assert verify(tmp_path / "s").problems == ()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_a_training_run_killed_at_random_has_the_same_losses(seed: int, tmp_path: Path) -> None:
    tiny.write_store(tmp_path / "store", rows=[(20, 20, 11), (30, 9)] * 6)
    tree = {
        "student": STUDENT,
        "run": {"epochs": 12, "checkpoint_every": 3, "device": "cpu"},
        "data": {"batch_size": 2},
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tree))
    line = [sys.executable, "-m", "kdcache", "train", str(tmp_path / "t.yaml"), "-q"]
    line += ["--store", str(tmp_path / "store"), "--out"]
    seconds = timed([*line, str(tmp_path / "whole")])
    assert killed_until_done([*line, str(tmp_path / "r")], seed, kills=20, longest=seconds / 2) > 0

    def losses(folder: str) -> list[float]:
        lines = (tmp_path / folder / METRICS).read_text().splitlines()
        return [json.loads(one)["loss"] for one in lines if "loss" in one]

    assert losses("r") == losses("whole")
    weights = [(tmp_path / one / "model.safetensors").read_bytes() for one in ("r", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_training_on_any_ranks_and_workers_killed_at_random_has_the_same_losses(
    ranks: int, workers: int, tmp_path: Path
) -> None:
    tiny.write_store(tmp_path / "store", rows=[(20, 20, 11), (30, 9)] * 12)
    tree = {
        "student": STUDENT,
        "run": {"epochs": 4, "checkpoint_every": 2, "device": "cpu"},
        "data": {"batch_size": 12 // ranks, "workers": workers},
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tree))
    port = str(29600 + 10 * ranks + workers)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port, "-m"]
    line += ["kdcache", "train", str(tmp_path / "t.yaml"), "-q", "--store", str(tmp_path / "store"), "--out"]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    began = time.monotonic()
    subprocess.run([*line, str(tmp_path / "whole")], check=True, capture_output=True, env=environment)
    seconds, chance = time.monotonic() - began, random.Random(10 * ranks + workers)
    for _ in range(3):
        job = subprocess.Popen(
            [*line, str(tmp_path / "r")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        time.sleep(chance.uniform(0.5, 1.0) * seconds)
        os.killpg(job.pid, signal.SIGKILL)  # all ranks and their workers at once, as a lost machine does
        job.wait()
    subprocess.run([*line, str(tmp_path / "r")], check=True, capture_output=True, env=environment)

    def losses(folder: str) -> list[float]:
        lines = (tmp_path / folder / METRICS).read_text().splitlines()
        return [json.loads(one)["loss"] for one in lines if "loss" in one]

    assert losses("r") == losses("whole")
    weights = [(tmp_path / one / "model.safetensors").read_bytes() for one in ("r", "whole")]
    assert weights[0] == weights[1]
