"""The tiny teacher that answers."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_teacher(tmp_path_factory.mktemp("answering"))
