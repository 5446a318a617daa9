"""The learned map from the student's width to the teacher's."""

import torch
from torch import nn


class Projector(nn.Linear):
    """A linear layer [N, D_student] -> [N, D_teacher] that starts by keeping lengths and angles.

    The weight starts as the identity where the widths agree, else as a random (semi-)orthogonal matrix from
    torch's global generator; the bias at zero. It is trained with the student and thrown away with the loss.
    Source of the idea: FitNets, Romero et al., 2015, section 2.1.
    """

    def reset_parameters(self) -> None:
        """Set the weight and the bias to their starting values."""
        with torch.no_grad():
            if self.in_features == self.out_features:
                nn.init.eye_(self.weight)
            else:
                # the QR behind orthogonal_ has no half-precision form
                start = torch.empty_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))
                self.weight.copy_(nn.init.orthogonal_(start))
            if self.bias is not None:
                nn.init.zeros_(self.bias)
