"""One YAML a run: keys from the file and from key=value, and a sentence for every mistake."""

from pathlib import Path

import pytest

from kdcache.capture.config import CaptureConfig
from kdcache.config import MAX_CONFIG_BYTES, load_config
from kdcache.errors import ConfigError, KdcacheError
from kdcache.train.config import TrainConfig

SMALLEST = "source: {path: text.txt}\nteacher: {model: folder, dtype: bfloat16}\ntargets: {k: 32}\n"


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_four_keys_are_enough_and_the_rest_has_defaults(tmp_path: Path) -> None:
    config = load_config(CaptureConfig, written(tmp_path, SMALLEST))
    assert (config.source.path, config.teacher.dtype, config.targets.k) == ("text.txt", "bfloat16", 32)
    assert (config.store.shard_positions, config.samples.packing, config.targets.exact) == (65536, "none", False)


def test_any_key_is_set_from_the_command_line_over_the_file(tmp_path: Path) -> None:
    overrides = ["targets.k=5", "targets.hidden=[{layer: 3}, final]", "samples.packing=concat", "seed=9"]
    config = load_config(CaptureConfig, written(tmp_path, SMALLEST), overrides)
    assert (config.targets.k, config.samples.packing, config.seed) == (5, "concat", 9)
    assert [one.layer for one in config.targets.hidden] == ["3", "final"]


def test_a_run_needs_no_file_at_all() -> None:
    config = load_config(TrainConfig, None, ["student.model=folder", "loss.temperature={start: 4, end: 1}"])
    assert config.loss.temperature.end == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "override", "message", "hint"),
    [
        (SMALLEST + "targest: {k: 2}", "", "unknown key 'targest'", "Did you mean 'targets'"),
        (SMALLEST, "targets.zzz=2", "unknown key 'targets.zzz'", "Known keys: bytes_per_position, draws, exact"),
        (SMALLEST, "teacher.dytpe=float32", "unknown key 'teacher.dytpe'", "Did you mean 'dtype'"),
        (SMALLEST, "teacher.dtype=float12", "key 'teacher.dtype'", ""),
        (SMALLEST, "targets.k=many", "key 'targets.k'", ""),
        (SMALLEST, "targets.k=0", "greater than or equal to 1", ""),
        ("source: {path: p}", "", "key 'teacher' is missing", ""),
        ("teacher: {model: m}", "", "give one of source and examples", ""),
        (SMALLEST, "targets.k", "is not key=value", "--set targets.k=64"),
        (SMALLEST, "seed=[1", "is not YAML", ""),
        (SMALLEST, "seed.of.what=1", "key 'seed'", ""),
        (SMALLEST + "seed: 1", "seed.of.what=1", "is a value, not a group", ""),
        ("- a\n- b\n", "", "not a mapping", ""),
        ("a: [1,\nb: 2", "", "not YAML", ""),
        ("a: !!python/object/apply:os.system ['true']", "", "not YAML", ""),
        (b"\xff\xfe\x00", "", "not YAML", ""),
        ("[" * 5000, "", "not YAML", ""),
        ("a: 1 #" + "x" * MAX_CONFIG_BYTES, "", "over 1 MiB", ""),
    ],
)
def test_every_mistake_is_named(tmp_path: Path, text: str | bytes, override: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(CaptureConfig, written(tmp_path, text), [override] if override else [])
    assert hint in error.value.hint
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("loss.options={beta: .nan}", "loss.options.beta"),
        ("loss.hidden=[{options: {heads: .inf}}]", "loss.hidden.0.options.heads"),
        ("optim.learning_rate=.nan", "optim.learning_rate"),
    ],
)
def test_a_number_is_finite_wherever_it_stands(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"key '{key}': not a finite number"):
        load_config(TrainConfig, None, ["student.model=folder", override])


def test_yaml_that_does_not_parse_says_on_which_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CaptureConfig, written(tmp_path, "source:\n  path: a\n bad"))
    assert "line 3" in error.value.where


def test_a_missing_file_is_told_from_an_unreadable_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(CaptureConfig, tmp_path / "missing.yaml")
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(KdcacheError, match="cannot be read"):
        load_config(CaptureConfig, loop)


@pytest.mark.parametrize("keys", [[], ["student.model=a", "student.factory=b:c"]])
def test_a_student_has_one_origin(keys: list[str]) -> None:
    with pytest.raises(ConfigError):
        load_config(TrainConfig, None, keys)
