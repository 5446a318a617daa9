"""Functions and modules as teachers: from token ids to logits, and no transformers needed."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError, TeacherError
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.teachers.callable import CallableTeacher, find

INPUTS = [np.array([1, 2, 3]), np.array([4])]


class Bigram(nn.Module):
    """Logits of the next id from a table; also says what it looked up."""

    max_length = 16

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(7, 7)

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        rows = self.table(ids)
        return SimpleNamespace(logits=rows, hidden={"table": rows * 2})


def uniform(ids: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, 5)


def test_a_module_gives_rows_and_features_without_its_padding() -> None:
    module = Bigram()
    teacher = CallableTeacher(TeacherConfig(model="bigram:bigram", device="cpu"), module)
    output = teacher.forward(INPUTS, ["table"])
    expected = module.table.weight[torch.tensor([1, 2, 3, 4])]
    torch.testing.assert_close(output.rows, expected)
    torch.testing.assert_close(output.hidden["table"], expected * 2)
    assert (teacher.vocab_size, teacher.max_length, teacher.hidden_width("table")) == (7, 16, 7)
    assert (teacher.output_head(), teacher.tokenizer()) == (None, None)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(ConfigError, match="gives no layer 'final'"):
        teacher.hidden_width("final")


def test_the_identity_of_a_module_is_its_weights() -> None:
    config = TeacherConfig(model="bigram:bigram", device="cpu")
    prints = [CallableTeacher(config, Bigram(seed)).fingerprint["weights"] for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_path_names_a_function_or_what_a_factory_makes() -> None:
    plain = load_teacher(TeacherConfig(model=f"{__name__}:uniform"))
    assert (plain.vocab_size, plain.fingerprint["name"], plain.max_length) == (5, "uniform", None)
    made = load_teacher(TeacherConfig(model=f"{__name__}:Bigram()", dtype="bfloat16", device="cpu"))
    assert (made.vocab_size, made.dtype) == (7, torch.bfloat16)


@pytest.mark.parametrize("path", ["nowhere:f", f"{__name__}:nothing", "no colon"])
def test_a_path_that_names_nothing_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="There is no") as error:
        find(path)
    assert "module:attribute" in error.value.hint


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        find(f"{__name__}:INPUTS")


def test_a_failure_inside_is_the_teachers_and_says_so() -> None:
    def broken(ids: Tensor, mask: Tensor) -> Tensor:
        raise KeyError("weights")

    with pytest.raises(TeacherError, match="KeyError: 'weights'"):
        CallableTeacher(TeacherConfig(model="x:y"), broken).forward(INPUTS)
