"""EfficientNet-lite (Tan and Le 2019, without squeeze-and-excitation, with ReLU6): pictures to the classes of ImageNet.

Legend: `S` pictures, `C` channels, `H` height, `W` width.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional

from kdcache.teachers.gguf import home
from pipelines.weights import read_tensors

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first block, expansion and channels of each stage of lite0."""

SIZES = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}
"""Factors on channels and on blocks."""

STEM, HEAD = 32, 1280
"""Channels of the first and of the last convolution, the same in every size."""


class Convolution(nn.Sequential):
    """Convolution, batch norm and, unless told otherwise, ReLU6; a stride of s leaves ceil(size / s) places.

    Args:
        inputs: Channels.
        outputs: Channels.
        kernel: Side.
        stride: Of places.
        groups: Of channels.
        active: Whether ReLU6 follows.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, active: bool = True
    ) -> None:
        own = (
            nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3),
        )
        super().__init__(*own, *([nn.ReLU6()] if active else []))
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return [S, outputs, ceil(H / stride), ceil(W / stride)]; zeros go around, the odd one right and below."""
        edges = []
        for size in (x.shape[3], x.shape[2]):
            both = max((math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size, 0)
            edges += [both // 2, both - both // 2]
        return super().forward(functional.pad(x, edges) if any(edges) else x)


class Block(nn.Module):
    """An inverted bottleneck: widen, a convolution of each channel, narrow; added to its input where shapes agree.

    Args:
        inputs: Channels.
        outputs: Channels.
        kernel: Side.
        stride: Of places.
        expansion: Times as many channels in the middle.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = Convolution(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = Convolution(wide, outputs, active=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return [S, outputs, ceil(H / stride), ceil(W / stride)]."""
        made = self.project(self.depthwise(self.expand(x)))
        return x + made if self.adds else made


class Lite(nn.Module):
    """Pixels uint8 [S, 3, H, W] to logits.

    Args:
        size: Of `SIZES`.
        classes: Outputs.
        shrink: Each square of so many pixels becomes their mean first; 1 for none.
        settled: Whether batch norms keep their means and variances while the rest is trained: those of a small batch
            of small pictures are too far from what the published weights expect.
    """

    def __init__(self, size: str, classes: int = 1000, shrink: int = 1, *, settled: bool = False) -> None:
        super().__init__()
        self.settled = settled
        width, depth = SIZES[size]
        self.shrink = shrink
        self.stem = Convolution(3, STEM, 3, 2)
        self.stages = nn.ModuleList()
        inputs = STEM
        for number, (blocks, kernel, stride, expansion, channels) in enumerate(STAGES):
            outputs = scaled(channels, width)
            count = blocks if number in (0, len(STAGES) - 1) else math.ceil(blocks * depth)
            made = [Block(inputs, outputs, kernel, stride, expansion)]
            made += [Block(outputs, outputs, kernel, 1, expansion) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*made))
            inputs = outputs
        self.head = Convolution(inputs, HEAD)
        self.classifier = nn.Linear(HEAD, classes)
        self.train()

    def train(self, mode: bool = True) -> "Lite":
        """Set the mode of all but settled batch norms."""
        super().train(mode)
        for one in self.modules():
            if self.settled and isinstance(one, nn.BatchNorm2d):
                one.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [S, classes]."""
        # a picture's channels side by side: convolutions of single channels take half the time on a CPU
        x = (pixels.float().contiguous(memory_format=torch.channels_last) - 127) / 128
        x = self.stem(functional.avg_pool2d(x, self.shrink) if self.shrink > 1 else x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(self.head(x).mean((2, 3)))


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times a factor, as the nearest multiple of 8 that is not below 90 % of that."""
    near = max(8, int(channels * width + 4) // 8 * 8)
    return near if near >= 0.9 * channels * width else near + 8


def published(checkpoint: Path, size: str) -> Lite:
    """Return a published model; its checkpoint is read without unpickling it (see `pipelines.weights`)."""
    model = Lite(size)
    # the published names differ, their order does not
    pairs = zip(model.state_dict(), read_tensors(checkpoint).values(), strict=True)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in pairs})
    return model.eval()


def weights(size: str) -> Path:
    """Return where the weights of a published model are kept: in the folder of converted models."""
    return home() / "models" / f"efficientnet-{size}.safetensors"


def student(vocab_size: int) -> nn.Module:
    """Return lite0 with its published weights, on pictures of half the side."""
    model = Lite("lite0", vocab_size, shrink=2, settled=True)
    load_model(model, str(weights("lite0")))
    return model
