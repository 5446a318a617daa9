"""The running mean of a student's weights: a steadier student, and a teacher for the next one.

Sources: Polyak and Juditsky 1992; as a teacher: Mean Teacher, Tarvainen and Valpola 2017, equation 1.
"""

import copy

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """Exponential moving average of all floating numbers of a model, in float32; its buffers go with a checkpoint.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the weights of the beginning do not linger.

    Args:
        model: Whose weights are averaged; it begins with them.
        decay: Share of the mean that an update leaves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self._decay = decay
        # names of a state have dots, which a buffer's may not
        self._names = [name for name, value in model.state_dict().items() if value.is_floating_point()]
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        for place, value in enumerate(self._floating(model)):
            self.register_buffer(f"mean{place}", value.detach().clone().float())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are now."""
        updates = self.get_buffer("updates")
        count = int(updates)
        share = 1 - min(self._decay, (1 + count) / (10 + count))
        updates += 1
        for mean, value in zip(self._means(), self._floating(model), strict=True):
            mean.lerp_(value.to(mean.dtype), share)

    def averaged(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with the mean weights."""
        made = copy.deepcopy(model)
        with torch.no_grad():
            for mean, value in zip(self._means(), self._floating(made), strict=True):
                value.copy_(mean)
        return made

    def _means(self) -> list[Tensor]:
        return [self.get_buffer(f"mean{place}") for place in range(len(self._names))]

    def _floating(self, model: nn.Module) -> list[Tensor]:
        state = model.state_dict()
        return [state[name] for name in self._names]
