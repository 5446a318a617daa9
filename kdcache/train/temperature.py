"""T of both sides where it is not one number for all: by how sure the teacher is at a position, or learned.

Legend: `N` counted positions, `V` vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdcache.losses.difficulty import entropy
from kdcache.targets.tensor import TensorTargets
from kdcache.train.config import EntropyTemperature, LearnedTemperature

LEVELS = 9
"""Temperatures between the two ends: positions of a level go through the losses together, each at one number."""

STEP = 0.01
"""Relative change of T to either side of which the loss is measured, for its slope."""


@torch.no_grad()
def by_entropy(config: EntropyTemperature, targets: TensorTargets) -> Tensor:
    """Return T of every position [N]: sure + (unsure - sure) * H / log V, in `LEVELS` steps of the same size.

    H is the teacher's entropy at T = 1 in nats, with the tail as one outcome: 0 where it is certain, log V where all
    outcomes are alike; a lower bound of the whole entropy, exact where K = V. float32; deterministic.
    """
    share = (entropy(targets).float() / math.log(max(2, targets.vocab_size))).clamp(0, 1)
    level = (share * (LEVELS - 1)).round() / (LEVELS - 1)
    return config.sure + (config.unsure - config.sure) * level


class Learned(nn.Module):
    """One T for all positions that is learned with the student, and against it.

    T = low + (high - low) * sigmoid(x), where x follows the gradient of T**2 * divergence(T): upwards where `towards`
    is harder (the reversed gradient of Curriculum Temperature, Li et al. 2023, equation 5), downwards where it is
    easier. The paper lets the reversal's strength grow; here it does not, for AdamW divides a common factor out. The
    slope is a central difference at T * (1 +- 0.01) of two more evaluations without gradients, so it works with every
    divergence and tail policy; its error is of second order in the step.
    """

    def __init__(self, config: LearnedTemperature) -> None:
        super().__init__()
        self._config = config
        share = (config.start - config.low) / (config.high - config.low)
        self.x = nn.Parameter(torch.tensor(math.log(share) - math.log1p(-share)))

    def forward(self) -> Tensor:
        """Return T, a scalar with a gradient."""
        config = self._config
        return config.low + (config.high - config.low) * torch.sigmoid(self.x)

    def pull(self, loss: Callable[[float], Tensor]) -> Tensor:
        """Return a scalar 0 whose gradient moves x.

        Args:
            loss: T to T**2 * divergence(T), averaged over positions.
        """
        now = self()
        value = float(now.detach())
        with torch.no_grad():
            high, low = (loss(value * (1 + side * STEP)) for side in (1, -1))
            slope = (high - low) / (2 * STEP * value)
        sign = -1.0 if self._config.towards == "harder" else 1.0
        pulled: Tensor = sign * slope.nan_to_num(0.0).detach() * (now - now.detach())
        return pulled
