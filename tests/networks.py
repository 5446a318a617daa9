"""Tiny networks of examples, made by the names that configs give."""

from typing import Any

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    """Pixels [S, 1, 8, 8] to classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.fc = nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(pixels.float() / 255)).mean((2, 3)))


class Tagger(nn.Module):
    """Token ids [S, T] to classes of every token."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.fc = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fc(self.embed(input_ids) * attention_mask[..., None])


class Values(nn.Module):
    """Numbers [S, 4] to values."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, values))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.net(numbers)


def conv(vocab_size: int) -> nn.Module:
    return Conv(4, vocab_size)


def tagger(vocab_size: int) -> nn.Module:
    return Tagger(6, vocab_size)


def values(vocab_size: int) -> nn.Module:
    return Values(8, vocab_size)


def teacher(kind: Any, width: int, classes: int) -> nn.Module:
    torch.manual_seed(11)
    model = kind(width, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model
