"""A search over one store: real trials with real optuna, going on exactly where it was stopped, and no teacher."""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import kdcache.sweep as module
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.convert import export as convert_to
from kdcache.convert.intake import take_in
from kdcache.errors import ConfigError, CorruptObjectError, Interrupted, MismatchError, TrainingError
from kdcache.evaluate import evaluate
from kdcache.store import open_store
from kdcache.sweep import Axis, SweepConfig, SweepProgress, SweepResult, Trial, default_space, sweep
from kdcache.sweep.draw import next_point
from kdcache.train import METRICS, TrainProgress, train
from kdcache.train.config import TrainConfig
from tests import tiny
from tests.test_cli import run  # noqa: F401
from tests.train.test_train import STUDENT

Run = Callable[..., tuple[int, str, str]]

RATE = {"optim.learning_rate": Axis(low=1e-3, high=1e-1, log=True)}


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stores of random rows: `store` and `held`."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_store(folder / "store")
    tiny.write_store(folder / "held", rows=((9, 12), (7,)), seed=5)
    return folder


def config_of(stores: Path, **sections: Any) -> TrainConfig:
    data = {"batch_size": 2, "validation": str(stores / "held"), **sections.pop("data", {})}
    settings = {"steps": 4, "device": "cpu", "checkpoint_every": 1, **sections.pop("run", {})}
    optim = {"warmup_steps": 0}
    tree = {"student": STUDENT, "data": data, "run": settings, "optim": optim, **sections}
    return parse_config(TrainConfig, tree)


def timeless(result: SweepResult) -> list[dict[str, Any]]:
    """What a search found, without what a clock says."""
    return [{key: value for key, value in asdict(one).items() if key != "seconds"} for one in result.trials]


@pytest.fixture(scope="module")
def undisturbed(stores: Path) -> SweepResult:
    """Three trials of the default space."""
    return sweep(config_of(stores), stores / "store", stores / "undisturbed", trials=3)


def test_every_trial_is_a_run_and_the_best_is_the_lowest(stores: Path, undisturbed: SweepResult) -> None:
    root = stores / "undisturbed"
    lines = [json.loads(line) for line in (root / "trials.jsonl").read_text().splitlines()]
    assert lines == [asdict(one) for one in undisturbed.trials]
    assert [one.number for one in undisturbed.trials] == [0, 1, 2]
    assert undisturbed.best.value == min(one.value or math.inf for one in undisturbed.trials)
    assert len({one.value for one in undisturbed.trials}) == 3
    for one in undisturbed.trials:
        assert set(one.point) == set(default_space())
        assert 0.1 <= one.point["loss.alpha"] <= 1.0
        assert 1.0 <= one.point["loss.temperature"] <= 8.0
        assert 1e-4 <= one.point["optim.learning_rate"] <= 1e-2
        folder = root / "trials" / f"{one.number:03d}"
        assert evaluate(folder).cross_entropy == pytest.approx(one.value, rel=1e-5)
        assert not (folder / "checkpoints").exists()
        assert one.steps == 4
    assert undisturbed.positions == sum(one.positions for one in undisturbed.trials)
    assert undisturbed.student == str(root / "trials" / f"{undisturbed.best.number:03d}")
    assert undisturbed.metric == "cross_entropy"
    assert undisturbed.notes == []


def test_its_overrides_train_the_best_student_again(stores: Path, undisturbed: SweepResult, tmp_path: Path) -> None:
    from kdcache.config import load_config

    tree = config_of(stores).model_dump(mode="json")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree))
    settings = load_config(TrainConfig, tmp_path / "train.yaml", undisturbed.overrides)
    train(settings, stores / "store", tmp_path / "again")
    best = Path(undisturbed.student)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_the_time_with_a_live_teacher_is_an_estimate_or_unknown(stores: Path, undisturbed: SweepResult) -> None:
    assert undisturbed.live_seconds is None
    assert undisturbed.teacher_basis.startswith("not recorded")
    told = sweep(
        config_of(stores), stores / "store", stores / "undisturbed", trials=3, teacher_seconds_per_position=0.5
    )
    assert told.live_seconds == pytest.approx(undisturbed.seconds + 0.5 * undisturbed.positions, rel=1e-6)
    assert told.teacher_basis == "given"
    assert timeless(told) == timeless(undisturbed)


@pytest.mark.parametrize("moment", ["before the trial", "in the middle of it"])
def test_killed_in_the_second_trial_it_comes_to_the_same(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: SweepResult, moment: str
) -> None:
    begun: list[str] = []

    def dying(config: TrainConfig, store: Any, out: Path, *, progress: Any) -> Any:
        begun.append(out.name)

        def die(state: TrainProgress) -> None:
            if moment == "in the middle of it" and out.name == "001" and state.step == 3:
                raise Killed
            progress(state)

        if moment == "before the trial" and out.name == "001":
            raise Killed
        return train(config, store, out, progress=die)

    with monkeypatch.context() as patched:
        patched.setattr(module, "train", dying)
        with pytest.raises(Killed):
            sweep(config_of(stores), stores / "store", tmp_path / "r", trials=3)
    assert begun == ["000", "001"]
    begun.clear()
    steps: list[tuple[int, int]] = []

    def counting(config: TrainConfig, store: Any, out: Path, *, progress: Any) -> Any:
        begun.append(out.name)
        return train(config, store, out, progress=progress)

    monkeypatch.setattr(module, "train", counting)
    again = sweep(
        config_of(stores),
        stores / "store",
        tmp_path / "r",
        trials=3,
        progress=lambda state: steps.append((state.trial, state.train.step)),
    )
    assert begun == ["001", "002"]
    # the checkpoint of the second step was there: of the second trial only the rest was done
    assert steps[0] == ((1, 1) if moment == "before the trial" else (1, 3))
    assert timeless(again) == timeless(undisturbed)
    assert again.best.number == undisturbed.best.number


def test_sigterm_ends_it_and_the_same_call_goes_on(stores: Path, tmp_path: Path, undisturbed: SweepResult) -> None:
    seen: list[SweepProgress] = []

    def stop(state: SweepProgress) -> None:
        seen.append(state)
        if (state.trial, state.train.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 2 of 4"):
        sweep(config_of(stores), stores / "store", tmp_path / "r", trials=3, progress=stop)
    assert (seen[0].best, seen[-1].best, seen[-1].trials) == (None, undisturbed.trials[0].value, 3)
    again = sweep(config_of(stores), stores / "store", tmp_path / "r", trials=3)
    assert timeless(again) == timeless(undisturbed)


def test_sigterm_between_steps_is_heard_before_the_next_trial(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*arguments: Any, **options: Any) -> Any:
        result = train(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(module, "train", late)
    with pytest.raises(Interrupted, match="1 of 2 trials"):
        sweep(config_of(stores), stores / "store", tmp_path / "r", trials=2, space=RATE)


def test_more_trials_later_are_those_of_a_longer_search(stores: Path, tmp_path: Path, undisturbed: SweepResult) -> None:
    sweep(config_of(stores), stores / "store", tmp_path / "r", trials=1)
    again = sweep(config_of(stores), stores / "store", tmp_path / "r", trials=3)
    assert timeless(again) == timeless(undisturbed)
    fewer = sweep(config_of(stores), stores / "store", tmp_path / "r", trials=1)
    assert len(fewer.trials) == 3


def test_another_config_space_or_store_is_refused(stores: Path, tmp_path: Path) -> None:
    config = config_of(stores)
    sweep(config, stores / "store", tmp_path / "r", trials=1, space=RATE)
    with pytest.raises(MismatchError, match="space differ"):
        sweep(config, stores / "store", tmp_path / "r", trials=1)
    with pytest.raises(MismatchError, match="config differ"):
        sweep(config_of(stores, run={"seed": 1}), stores / "store", tmp_path / "r", trials=1, space=RATE)
    other = tiny.write_store(tmp_path / "other", seed=9)
    with pytest.raises(MismatchError, match="store differ"):
        sweep(config, other, tmp_path / "r", trials=1, space=RATE)
    copy = tmp_path / "copy"
    shutil.copytree(stores / "held", copy)
    moved = config_of(stores, data={"validation": str(copy)})
    sweep(moved, stores / "store", tmp_path / "moved", trials=1, space=RATE)
    shutil.rmtree(copy)
    tiny.write_store(copy, seed=8)
    with pytest.raises(MismatchError, match="held-out store differ"):
        sweep(moved, stores / "store", tmp_path / "moved", trials=1, space=RATE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(MismatchError, match="no search"):
        sweep(config, stores / "store", tmp_path / "mine", trials=1, space=RATE)
    (tmp_path / "r" / "trials.jsonl").write_text("{")
    with pytest.raises(CorruptObjectError, match="damaged"):
        sweep(config, stores / "store", tmp_path / "r", trials=2, space=RATE)
    (tmp_path / "r" / "trials.jsonl").write_text("")
    sweep(config, stores / "store", tmp_path / "r", trials=1, space=RATE)


def test_a_store_of_one_temperature_is_searched_at_that(stores: Path, tmp_path: Path) -> None:
    for name in ("store", "held"):
        convert_to(stores / name, tmp_path / f"{name}.out", "distillkit")
        take_in(tmp_path / f"{name}.out", tmp_path / name, "distillkit")
    assert open_store(tmp_path / "store").columns["tail_log_partition"].shape == (1,)
    found = sweep(config_of(tmp_path), tmp_path / "store", tmp_path / "r", trials=2)
    assert all("loss.temperature" not in one.point for one in found.trials)
    assert "loss.temperature=1.0" in found.overrides
    assert "held at 1" in found.notes[0]
    # a config that is at another temperature is brought to 1 as well
    warm = config_of(tmp_path, loss={"temperature": 2.0})
    assert sweep(warm, tmp_path / "store", tmp_path / "w", trials=1).notes
    only = {"loss.temperature": Axis(low=1, high=4)}
    with pytest.raises(ConfigError, match="Nothing is left"):
        sweep(config_of(tmp_path), tmp_path / "store", tmp_path / "o", trials=1, space=only)
    # renormalise needs no tail, so any temperature is possible
    free = config_of(tmp_path, loss={"tail": "renormalise"})
    assert sweep(free, tmp_path / "store", tmp_path / "f", trials=1, space=only).notes == []


def test_choices_are_of_any_kind_and_whole_numbers_stay_whole(stores: Path, tmp_path: Path) -> None:
    schedule = {"start": 4.0, "end": 1.0, "schedule": "linear"}
    space = {
        "loss.temperature": Axis(choices=(schedule, 2.0)),
        "run.steps": Axis(low=1, high=3, integer=True),
        "loss.divergence": Axis(choices=("forward_kl", "jsd")),
    }
    found = sweep(config_of(stores), stores / "store", tmp_path / "r", trials=4, space=space)
    assert all(one.point["loss.temperature"] in (schedule, 2.0) for one in found.trials)
    assert all(one.steps == one.point["run.steps"] for one in found.trials)
    assert timeless(sweep(config_of(stores), stores / "store", tmp_path / "r", trials=4, space=space)) == timeless(
        found
    )


def test_positions_without_the_teacher_are_not_charged_to_it(stores: Path, tmp_path: Path) -> None:
    space = {"loss.alpha": Axis(choices=(0.0,))}
    found = sweep(
        config_of(stores), stores / "store", tmp_path / "r", trials=1, space=space, teacher_seconds_per_position=9.0
    )
    assert found.trials[0].teacher_positions == 0 < found.positions
    assert found.live_seconds == found.seconds


def test_the_value_is_of_the_student_that_was_saved(stores: Path, tmp_path: Path) -> None:
    # validated at the second and fourth of five steps, and saved after the fifth
    config = config_of(stores, run={"steps": 5, "validate_every": 2})
    found = sweep(config, stores / "store", tmp_path / "r", trials=1, space=RATE)
    assert evaluate(tmp_path / "r" / "trials" / "000").cross_entropy == pytest.approx(found.best.value, rel=1e-5)
    patient = config_of(stores, run={"steps": 40, "validate_every": 1, "patience": 2, "metric": "kl"})
    hot = {"optim.learning_rate": Axis(low=0.2, high=0.4)}
    found = sweep(patient, stores / "store", tmp_path / "p", trials=1, space=hot)
    assert found.best.steps < 40
    assert found.metric == "kl"
    assert evaluate(tmp_path / "p" / "trials" / "000").kl == pytest.approx(found.best.value, rel=1e-5)


def test_a_trial_whose_training_fails_is_passed_over(stores: Path, tmp_path: Path) -> None:
    wild = {"optim.learning_rate": Axis(choices=(1e-2, 1e30))}
    config = config_of(stores, run={"steps": 25, "seed": 1})
    found = sweep(config, stores / "store", tmp_path / "r", trials=5, space=wild)
    failed = [one for one in found.trials if one.value is None]
    assert failed
    assert len(failed) < 5
    assert all(one.point["optim.learning_rate"] == 1e30 and one.error for one in failed)
    assert found.best.point["optim.learning_rate"] == 1e-2
    none = {"optim.learning_rate": Axis(choices=(1e30,))}
    with pytest.raises(TrainingError, match="No trial"):
        sweep(config, stores / "store", tmp_path / "n", trials=1, space=none)


def test_points_are_drawn_where_good_ones_were() -> None:
    axes = {"a": Axis(low=0.0, high=1.0), "b": Axis(low=1e-4, high=1.0, log=True)}
    done: list[Trial] = []
    for number in range(40):
        point = next_point(axes, 3, done)
        assert point == next_point(axes, 3, done)
        assert point != next_point(axes, 4, done)
        value = (point["a"] - 0.3) ** 2 + (math.log10(point["b"]) + 2) ** 2
        error = "not finite" if number == 7 else None
        done.append(Trial(number, point, None if error else value, error, 1, 1, 1, 1.0))
    values = [one.value for one in done if one.value is not None]
    assert statistics.median(values[-20:]) < statistics.median(values[:10]) / 2


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"sweep": {"loss.alpha": {"low": 0.1}}}, "both low and high"),
        ({"sweep": {"loss.alpha": {"low": 0.5, "high": 0.5}}}, "low is a number below high"),
        ({"sweep": {"loss.alpha": {"low": 0, "high": 1, "log": True}}}, "begins above 0"),
        ({"sweep": {"loss.alpha": {"low": 0.5, "high": 2, "integer": True}}}, "whole numbers"),
        ({"sweep": {"loss.alpha": {"choices": []}}}, "one or more values"),
        ({"sweep": {"loss.alpha": {"choices": [1, 1]}}}, "each once"),
        ({"sweep": {"loss.alpha": {"choices": [1], "low": 0}}}, "choices alone"),
        ({"sweep": {"loss.alpha": {"lo": 1}}}, "unknown key"),
        ({"sweep": {}}, "at least 1"),
        ({"loss.alpha": {"low": 0.1, "high": 1}}, "Known keys: sweep"),
    ],
)
def test_a_space_that_is_none_is_refused(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(SweepConfig, tree)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"loss.alpa": Axis(low=0.1, high=1)}, "Did you mean 'alpha'"),
        ({"loss.alpha": Axis(low=0.5, high=1.5)}, "no value of loss.alpha"),
        ({"loss.temperature": Axis(low=0, high=2)}, "no value of loss.temperature"),
        ({"loss.temperature.start": Axis(low=1, high=2)}, "a value, not a group"),
        ({"optim.learning_rate": Axis(low=-1, high=2)}, "greater than 0"),
        ({"loss.tail": Axis(choices=("bucket", "bin"))}, "tail"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_the_first_trial(
    stores: Path, tmp_path: Path, space: dict[str, Axis], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        sweep(config_of(stores), stores / "store", tmp_path / "r", space=space)
    assert words in str(refused.value)
    assert not (tmp_path / "r").exists()


def test_a_search_needs_a_held_out_store(stores: Path, tmp_path: Path) -> None:
    config = config_of(stores, data={"validation": None})
    with pytest.raises(ConfigError, match="needs a held-out store"):
        sweep(config, stores / "store", tmp_path / "r")


def test_without_optuna_it_says_what_installs_it_and_no_teacher_is_imported(stores: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from kdcache.errors import ConfigError
import kdcache.sweep
wrong = [name for name in sys.modules if name.startswith(("optuna", "kdcache.teachers", "kdcache.capture"))]
assert not wrong, wrong
sys.modules["optuna"] = None
try:
    kdcache.sweep.sweep(None, {str(stores / "store")!r}, {str(tmp_path / "r")!r})
except ConfigError as error:
    sys.exit(0 if "pip install 'kdcache[sweep]'" in error.hint else 1)
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_from_the_command_line(tmp_path: Path, run: Run) -> None:  # noqa: F811
    tree = tiny.capture_tree(tmp_path)
    capture(parse_config(CaptureConfig, tree), tmp_path / "store")
    config = {"student": STUDENT, "run": {"steps": 2, "device": "cpu"}, "optim": {"warmup_steps": 0}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "space.yaml").write_text("sweep: {optim.learning_rate: {low: 1e-3, high: 1e-2, log: true}}\n")
    arguments: list[Any] = ["sweep", tmp_path / "train.yaml", "--store", tmp_path / "store", "--out", tmp_path / "r"]
    code, _, err = run(*arguments)
    assert (code, "data.validation" in err) == (2, True)
    arguments += ["--trials", 2, "--set", f"data.validation={tmp_path / 'store'}", "--space", tmp_path / "space.yaml"]
    code, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found["trials"]) == 2
    assert list(found["best"]["point"]) == ["optim.learning_rate"]
    rate = open_store(tmp_path / "store").manifest.part("provenance")["positions_per_second"]
    assert found["teacher_seconds_per_position"] == pytest.approx(1 / rate)
    assert found["live_seconds"] > found["seconds"]
    assert (tmp_path / "r" / "trials" / "000" / METRICS).is_file()
    code, out, _ = run(*arguments, "-q")
    assert code == 0
    assert "best: --set optim.learning_rate=" in out
    assert "with a live teacher" in out
    code, _, err = run(*arguments, "--set", "run.steps=3")
    assert (code, "another search" in err) == (4, True)
