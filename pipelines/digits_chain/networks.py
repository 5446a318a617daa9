"""Networks of the digits, from large to small: pixels [S, 1, 28, 28] of 0 to 255 to logits [S, 10]."""

import torch
from torch import Tensor, nn


class Convolutions(nn.Module):
    """Two convolutions, each halving height and width, and a hidden layer."""

    def __init__(self, first: int, second: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, first, 3, padding=1)
        self.second = nn.Conv2d(first, second, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.hidden = nn.Linear(second * 49, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits."""
        found = pixels.float() / 255
        for layer in (self.first, self.second):
            found = nn.functional.max_pool2d(torch.relu(layer(found)), 2)
        return self.out(self.drop(torch.relu(self.hidden(found.flatten(1)))))


class Perceptron(nn.Module):
    """One hidden layer."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits."""
        return self.out(torch.relu(self.hidden(pixels.float().flatten(1) / 255)))


def teacher(vocab_size: int) -> nn.Module:
    """Return the largest: 121,656 parameters."""
    return Convolutions(16, 32, 74, vocab_size)


def assistant(vocab_size: int) -> nn.Module:
    """Return one of the student's kind and between both in size: 25,450 parameters."""
    return Perceptron(32, vocab_size)


def student(vocab_size: int) -> nn.Module:
    """Return the smallest: 4,780 parameters."""
    return Perceptron(6, vocab_size)


def nothing(pixels: Tensor) -> Tensor:
    """Return logits that know nothing: a store of these carries labels to train a first teacher from."""
    return torch.zeros(len(pixels), 10, device=pixels.device)
