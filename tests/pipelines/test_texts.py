"""Recipes of texts: what they say is a config, and what they read is what stands in the package."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kdcache.config import parse_config
from kdcache.train.config import TrainConfig
from pipelines.reviews.recipe import INSIDE, SURE, reviews
from pipelines.reviews.recipe import VARIANTS as REVIEWS
from pipelines.smollm2_wiki.methods import GROUPS, LAYERS, STUDENT


@pytest.mark.parametrize("group", GROUPS)
def test_every_variant_is_a_config_and_reads_what_is_kept(group: str) -> None:
    for changed in GROUPS[group].values():
        config = parse_config(TrainConfig, {"student": {"config": STUDENT}, **changed})
        assert {one.teacher for one in config.loss.hidden} <= set(LAYERS)
    assert {"hard labels", "T = 1"} < set(GROUPS[group])


def test_every_variant_of_reviews_is_a_config() -> None:
    for changed in REVIEWS.values():
        parse_config(TrainConfig, {"student": {"factory": "a:b"}, **changed})


def packed(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def test_reviews_are_those_that_people_agreed_on(tmp_path: Path) -> None:
    lines = ["1\t2.5\tFine film.", "2\t-1.5\tA bore.", "3\t0.1\tIt is a film.", "4\t2.5\tFine film.", "5\t0.9\tA\ttab."]
    inner = packed({f"somewhere/{INSIDE[1]}": "\n".join(lines).encode()})
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(packed({f"vader/{INSIDE[0]}": inner}))
    texts, labels = reviews(tmp_path)
    assert dict(zip(texts, labels.tolist(), strict=True)) == {"Fine film.": 1, "A bore.": 0, "A\ttab.": 1}
    again = reviews(tmp_path)
    assert again[0] == texts
    assert np.array_equal(again[1], labels)
    assert SURE > 0.1
