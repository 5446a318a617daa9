"""What was measured of a batch, on its way from the teacher's device to the host.

The device is given the next batch before the numbers of this one are waited for: it never idles while the host sorts
rows into columns. On the CPU there is nothing to wait for.

Legend: `N` positions of the batch, `D` hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.targets.tensor import TensorTargets


@dataclass(frozen=True, slots=True)
class Flight:
    """Numbers of one batch that may still be on their way.

    Attributes:
        targets: Its targets, on the host.
        hidden: Layer name to features [N, D] in the teacher's dtype, on the host.
        ready: Set by the device once all of them are there; None where they are.
    """

    targets: TensorTargets
    hidden: Mapping[str, Tensor]
    ready: "torch.cuda.Event | None"

    @staticmethod
    def of(targets: TensorTargets, hidden: Mapping[str, Tensor]) -> "Flight":
        """Have a device's tensors copied, and return before they are."""
        sent = targets.each(_to_host), {name: _to_host(values) for name, values in hidden.items()}
        if targets.ids.device.type != "cuda":
            return Flight(*sent, None)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(targets.ids.device))
        return Flight(*sent, ready)

    def wait(self) -> None:
        """Wait until the numbers can be read; an error of the device's is raised here."""
        if self.ready is not None:
            self.ready.synchronize()


def _to_host(values: Tensor) -> Tensor:
    if values.device.type != "cuda":
        return values.cpu()
    # only into page-locked memory does a device copy while the host goes on; torch keeps such memory for the next time
    room = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return room.copy_(values, non_blocking=True)
