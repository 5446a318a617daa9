"""What recipes bring themselves: a checkpoint reader that runs nothing, networks of the size they say."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.config import parse_config
from kdcache.train.config import TrainConfig
from pipelines.digits import networks
from pipelines.digits.recipe import VARIANTS as DIGITS
from pipelines.spam.recipe import STUDENT
from pipelines.spam.recipe import VARIANTS as SPAM
from pipelines.weights import read_tensors


def test_a_checkpoint_is_read_without_unpickling(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 4), torch.nn.BatchNorm1d(3)).state_dict()
    state["part"] = torch.arange(24.0).reshape(4, 6)[1:3, ::2]
    torch.save(state, tmp_path / "a.pth")
    found = read_tensors(tmp_path / "a.pth")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert np.array_equal(found[name], tensor.numpy())


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_something_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3), "evil": Evil(tmp_path / "made")}, tmp_path / "a.pth")
    with pytest.raises((ValueError, KeyError, IndexError)):
        read_tensors(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(8)}, tmp_path / "a.pth")
    data = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "a.pth") as whole, zipfile.ZipFile(data, "w") as cut:
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[:16] if name.endswith("/data/0") else content)
    (tmp_path / "b.pth").write_bytes(data.getvalue())
    with pytest.raises((ValueError, KeyError, IndexError)):
        read_tensors(tmp_path / "b.pth")


@pytest.mark.parametrize("variants", [DIGITS, SPAM], ids=["digits", "spam"])
def test_every_variant_is_a_config(variants: dict[str, dict[str, Any]]) -> None:
    for changed in variants.values():
        parse_config(TrainConfig, {"student": {"factory": "a:b"}, **changed})
    assert variants["hard labels"] == {"loss": {"alpha": 0.0}}


def test_students_are_a_quarter_of_their_teachers_at_most() -> None:
    teacher, student = (
        sum(one.numel() for one in made().parameters()) for made in (networks.teacher, networks.student)
    )
    assert student * 4 < teacher
    assert STUDENT["hidden_size"] == 128
