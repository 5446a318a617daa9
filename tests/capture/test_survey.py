"""The look at the teacher before a capture: what a byte budget buys."""

from pathlib import Path

import numpy as np
import pytest

from kdcache.capture import CaptureProgress, SamplesProgress, capture
from kdcache.capture.config import CaptureConfig
from kdcache.capture.keep import columns_of
from kdcache.capture.survey import MARGIN, SAMPLE_BYTES, entries_within, row_bytes, survey
from kdcache.config import parse_config
from kdcache.errors import ConfigError, MismatchError
from kdcache.samples import SampleSet, prepare
from kdcache.sources import open_source
from kdcache.store import open_store
from kdcache.teachers import Teacher, load_teacher
from tests import tiny


def config_of(tmp_path: Path, budget: float, preset: str = "compact") -> CaptureConfig:
    tree = tiny.capture_tree(tmp_path)
    store = {**tree["store"], "preset": preset}
    return parse_config(CaptureConfig, {**tree, "store": store, "targets": {"bytes_per_position": budget}})


def set_up(config: CaptureConfig, folder: Path) -> tuple[Teacher, SampleSet]:
    teacher = load_teacher(config.teacher)
    samples = prepare(
        open_source(config.source),
        teacher.tokenizer(),
        config.samples,
        limits=(teacher.max_length, teacher.vocab_size),
        identity={},
        folder=folder,
    )
    return teacher, samples


def with_k(config: CaptureConfig, k: int) -> CaptureConfig:
    return config.model_copy(update={"targets": config.targets.model_copy(update={"k": k})})


@pytest.mark.parametrize("preset", ["compact", "lossless", "raw"])
def test_a_budget_buys_the_largest_k_that_fits(preset: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, 60, preset)
    teacher, samples = set_up(config, tmp_path / "work")
    seen = survey(teacher, samples, 64)

    def size(k: int) -> float:
        return row_bytes(seen, k, columns_of(with_k(config, k), teacher))

    k = entries_within(60, seen, lambda k: columns_of(with_k(config, k), teacher))
    assert 1 < k < 64
    assert size(k) <= 60 * MARGIN < size(k + 1)


def test_the_estimate_is_what_the_store_takes(tmp_path: Path) -> None:
    config = config_of(tmp_path, 60)
    whole = {"shard_positions": 4096, "chunk_positions": 4096}
    config = config.model_copy(update={"store": config.store.model_copy(update=whole)})
    result = capture(config, tmp_path / "s")
    store = open_store(tmp_path / "s")
    teacher, samples = set_up(config, tmp_path / "work")
    estimated = row_bytes(survey(teacher, samples, 64), store.k, columns_of(with_k(config, store.k), teacher))
    data = [path for path in (tmp_path / "s" / "columns").rglob("*") if "/c/" in path.as_posix() and path.is_file()]
    taken = sum(path.stat().st_size for path in data) + SAMPLE_BYTES * len(store)
    taken /= store.num_positions
    assert result.k == store.k == store[0].targets.k
    assert estimated == pytest.approx(taken, rel=0.08)  # the unused rows of the last shard cost a little
    assert taken < 1.05 * 60


def test_what_goes_on_keeps_the_k_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, 60)
    whole = capture(config, tmp_path / "whole")

    def stop(state: CaptureProgress | SamplesProgress) -> None:
        if isinstance(state, CaptureProgress) and state.shard == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(config, tmp_path / "s", progress=stop)

    def again(*_: object) -> None:
        raise AssertionError("looked at the teacher twice")

    monkeypatch.setattr("kdcache.capture.survey", again)
    assert capture(config, tmp_path / "s").digest == whole.digest
    done = capture(config, tmp_path / "s")
    assert (done.already_complete, done.k) == (True, whole.k)
    with pytest.raises(MismatchError, match="bytes_per_position"):
        capture(config_of(tmp_path, 50), tmp_path / "s")


def test_a_budget_for_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No logit fits") as caught:
        capture(config_of(tmp_path, 3), tmp_path / "s")
    assert "One needs about" in str(caught.value.hint)


def test_the_survey_is_of_samples_all_over_the_source(tmp_path: Path) -> None:
    config = config_of(tmp_path, 60)
    teacher, samples = set_up(config, tmp_path / "work")
    seen = survey(teacher, samples, 8)
    assert len(seen.targets) == len(seen.input_ids) == len(seen.labels)
    assert np.array_equal(seen.input_ids[: len(samples[0].tokens) - 1], samples[0].tokens[:-1])
    ranking = seen.ranking(8)
    assert sorted(ranking.tolist()) == list(range(teacher.vocab_size))
