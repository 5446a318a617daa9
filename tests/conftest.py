"""Settings and fixtures shared by all tests: single-threaded torch, derandomised properties, the real teacher."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("soak", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave soak tests to `make soak`: they run only when asked for by marker."""
    if "soak" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="long; run `make soak`")
    for item in items:
        if "soak" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    """The real teacher (SmolLM2-135M-Instruct) as a transformers folder, made by `make models`."""
    folder = os.environ.get("KDCACHE_TEACHER")
    if not folder or not (Path(folder) / "config.json").is_file():
        pytest.skip("set KDCACHE_TEACHER to the converted SmolLM2 folder (`make test` does)")
    return Path(folder)
