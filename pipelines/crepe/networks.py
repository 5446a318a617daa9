"""CREPE (Kim et al. 2018, ICASSP): six convolutions over 1024 samples of sound, 360 pitches as yes or no."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.weights import read_tensors

FULL, TINY = (1024, 128, 128, 128, 256, 512), (128, 16, 16, 16, 32, 64)
"""Channels of the six layers, of the published teacher and of the smallest published size."""

EPSILON = 0.0010000000474974513
"""Of the published batch norms."""


class Layer(nn.Module):
    """A convolution, then batch norm, at half the length.

    Args:
        inputs: Channels.
        outputs: Channels.
        kernel: Samples the convolution sees.
        stride: Samples it goes on by.
        padding: Zeros before and after.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride)
        self.norm = nn.BatchNorm1d(outputs, eps=EPSILON)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Return [S, outputs, length / (2 * stride)] of [S, inputs, length]."""
        return functional.max_pool1d(self.norm(torch.relu(self.conv(functional.pad(x, self.padding)))), 2)


class Crepe(nn.Module):
    """Frames [S, 1024], each with mean 0 and deviation 1, to the logits of 360 pitches, 20 cents apart.

    Args:
        channels: Of the six layers.
        pitches: Outputs.
    """

    def __init__(self, channels: tuple[int, ...], pitches: int = 360) -> None:
        super().__init__()
        first = Layer(1, channels[0], 512, 4, (254, 254))
        others = (Layer(a, b, 64, 1, (31, 32)) for a, b in pairwise(channels))
        self.layers = nn.ModuleList([first, *others])
        self.classifier = nn.Linear(4 * channels[-1], pitches)

    def forward(self, frames: Tensor) -> Tensor:
        """Return logits [S, pitches]; the published model's answers are their sigmoids."""
        x = frames[:, None]
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.transpose(1, 2).flatten(1))


def student(vocab_size: int) -> nn.Module:
    """Return a model of the smallest published size, 0.49 million weights, at random."""
    return Crepe(TINY, vocab_size)


def published(checkpoint: Path, channels: tuple[int, ...] = FULL) -> nn.Module:
    """Return a published model; its checkpoint is read without unpickling it (see `pipelines.weights`)."""
    model = Crepe(channels)
    own = {}
    for name, values in read_tensors(checkpoint).items():
        layer, _, rest = name.partition(".")
        if layer == "classifier":
            own[name] = torch.from_numpy(values)
            continue
        number = int(layer.removeprefix("conv")[0]) - 1
        kind = "norm" if layer.endswith("_BN") else "conv"
        # published as convolutions in two dimensions, the second of size 1
        own[f"layers.{number}.{kind}.{rest}"] = torch.from_numpy(values[..., 0] if values.ndim == 4 else values)
    model.load_state_dict(own)
    return model.eval()
