"""The projector."""

import pytest
import torch
from torch import Tensor

from kdcache.losses.features.mse import mse
from kdcache.losses.projector import Projector
from tests.losses.dense import rows


def kept(projector: Projector, hidden: Tensor) -> Tensor:
    return projector(hidden).norm(dim=1) / hidden.norm(dim=1)


def test_the_projector_starts_as_the_identity_where_the_widths_agree() -> None:
    hidden = rows(5, 6, 1).float()
    torch.testing.assert_close(Projector(6, 6)(hidden), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projector_starts_by_keeping_lengths_and_angles(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    projector = Projector(6, 10, dtype=dtype)
    hidden = rows(5, 6, 1).to(dtype)
    torch.testing.assert_close(kept(projector, hidden), torch.ones(5, dtype=dtype))
    narrowing = Projector(10, 6)
    torch.testing.assert_close(narrowing.weight @ narrowing.weight.T, torch.eye(6), atol=1e-5, rtol=0)


def test_the_projector_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    hidden = rows(200, 4, 1).float()
    teacher = hidden @ rows(4, 6, 2).float() + 1.0
    projector = Projector(4, 6)
    optimiser = torch.optim.Adam(projector.parameters(), lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        mse(projector(hidden), teacher).mean().backward()
        optimiser.step()
    assert mse(projector(hidden), teacher).mean() < 1e-3
