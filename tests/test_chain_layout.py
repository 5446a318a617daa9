"""A chain is laid out, and refused, as a whole before its first step."""

from pathlib import Path
from typing import Any

import pytest

from kdcache.capture.config import CaptureConfig
from kdcache.chain import ChainConfig, plan, run_chain
from kdcache.config import load_config
from kdcache.errors import ConfigError
from tests.test_chain import NAMES, read, tree_of


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return tree_of(tmp_path / "pixels")


def test_names_stand_for_folders_of_earlier_steps(tree: dict[str, Any], tmp_path: Path) -> None:
    steps = {one.name: one for one in plan(read(tree), tmp_path / "out")}
    assert list(steps) == NAMES
    folders = {name: str(tmp_path / "out" / name) for name in NAMES}
    assert [steps[name].config.teacher.model for name in ("says", "heard-1", "heard-2")] == [
        folders[name] for name in ("teacher", "student", "again-1")
    ]
    assert (steps["again-2"].store, steps["again-2"].config.run.seed) == (folders["heard-2"], 2)
    assert steps["student"].config.data.validation == folders["says"]
    assert (steps["last"].config.student, steps["last"].config.store) == (folders["again-2"], folders["says"])
    assert isinstance(steps["labels"].config, CaptureConfig)
    assert steps["labels"].config.teacher.kind == "module"


def again(*steps: Any, **keys: Any) -> dict[str, Any]:
    return {"generations": {"count": 2, **keys, "steps": list(steps)}}


def listening(model: str, name: str = "heard") -> dict[str, Any]:
    return {"name": name, "capture": {"teacher": {"model": model}}}


def changed(tree: dict[str, Any], step: int, **keys: Any) -> dict[str, Any]:
    steps = list(tree["steps"])
    steps[step] = keys
    return {**tree, "steps": steps}


@pytest.mark.parametrize(
    ("step", "keys", "said"),
    [
        (3, {"name": "student", "train": {"store": "sais"}}, "Did you mean 'says'"),
        (3, {"name": "student", "train": {"store": "teacher"}}, "is a train, and a capture is wanted"),
        (3, {"name": "student", "train": {}}, "'train.store' is missing"),
        (3, {"name": "student", "train": {"store": "says", "los": {}}}, "Did you mean 'loss'"),
        (2, {"name": "says", "capture": {"teacher": {"model": "${taecher}"}}}, "Did you mean 'teacher'"),
        (2, {"name": "says", "capture": {"teacher": {"model": "${student}"}}}, "names no earlier step"),
        (2, {"name": "says", "capture": {"teacher": {"model": "x", "kind": "studnet"}}}, "Did you mean 'student'"),
        (2, {"name": "says", "capture": {}}, "'teacher.model' is missing"),
        (2, {"name": "labels", "capture": {"teacher": {"model": "x"}}}, "Two steps are called 'labels'"),
        (2, {"name": "a/b", "capture": {"teacher": {"model": "x"}}}, "is no name"),
        (2, {"nam": "says", "capture": {}}, "Did you mean 'name'"),
        (2, {"name": "says"}, "exactly one of capture"),
        (2, {"capture": {"teacher": {"model": "x"}}}, "give a name"),
        (4, {"name": "m", "eval": {"student": "says", "store": "says"}}, "is a capture, and a train is wanted"),
        (4, {"name": "m", "eval": {"student": "student", "store": "says", "batch": 1}}, "Did you mean 'batch_size'"),
        (5, again(listening("${previous.heard}")), "generations.first"),
        (5, again(listening("y"), first={"herd": "says"}), "Did you mean 'heard'"),
        (5, again(listening("y", "says")), "Two steps are called 'says'"),
        (5, again(again(count=1)), "inside generations"),
    ],
)
def test_mistakes_are_said_before_the_first_step(
    step: int, keys: dict[str, Any], said: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        run_chain(read(changed(tree, step, **keys)), tmp_path / "out", quiet=True)
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_source_and_a_student_that_no_folder_runs(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["base"]["capture"] = {"source": {"path": "x.txt"}}
    labels = {"name": "labels", "capture": {"teacher": {"model": "m"}}}
    for teacher, said in (
        ({"model": "${teacher}", "kind": "student"}, "answers for examples"),
        ({"model": "${teacher}"}, "made by a factory"),
    ):
        steps = [labels, tree["steps"][1], {"name": "says", "capture": {"teacher": teacher}}]
        with pytest.raises(ConfigError, match=said):
            plan(read({**tree, "steps": steps}), tmp_path)
    with pytest.raises(ConfigError, match="no steps"):
        plan(read({"steps": []}), tmp_path)


def test_the_recipe_of_the_digits_is_laid_out(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "pipelines" / "digits_chain" / "chain.yaml"
    steps = {one.name: one for one in plan(load_config(ChainConfig, file), tmp_path)}
    members = steps["ensemble-says"].config.teacher.members
    assert [one.model for one in members] == [str(tmp_path / name) for name in ("teacher", "born-1", "born-2")]
    assert steps["heard-1"].config.teacher.model == str(tmp_path / "teacher")
    assert steps["born-measured-2"].config.student == str(tmp_path / "born-2")
