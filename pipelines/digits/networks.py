"""The teacher and the student of the digits."""

import torch
from torch import Tensor, nn


class Convolutions(nn.Module):
    """Pixels uint8 [S, 1, 28, 28] to ten classes.

    Args:
        width: Channels of the first layer; the second has twice as many.
        classes: Outputs.
        dropout: Share of the hidden units that are dropped while it is trained.
    """

    def __init__(self, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 5, stride=2, padding=2), nn.ReLU())
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * 49, 4 * width), nn.ReLU())
        if dropout:
            self.hidden.append(nn.Dropout(dropout))
        self.out = nn.Linear(4 * width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [S, classes]."""
        return self.out(self.hidden(self.second(self.first(pixels.float() / 255))))


def teacher(vocab_size: int = 10) -> nn.Module:
    """A network of 0.45 million weights."""
    return Convolutions(32, vocab_size)


def dropping(vocab_size: int = 10) -> nn.Module:
    """The teacher's kind, with a dropout that several passes through it can leave at work."""
    return Convolutions(32, vocab_size, 0.3)


def nothing(classes: int, pixels: Tensor) -> Tensor:
    """Return answers [S, classes] that know nothing: a store of these carries labels to train a teacher from."""
    return torch.zeros(len(pixels), classes)


def student(vocab_size: int = 10) -> nn.Module:
    """A network of 7 thousand weights."""
    return Convolutions(4, vocab_size)


def trained(path: str) -> nn.Module:
    """Return the teacher with the weights of a safetensors file."""
    from safetensors.torch import load_model

    model = teacher()
    load_model(model, path)
    return model.eval()


def fit(model: nn.Module, pixels: Tensor, labels: Tensor, *, epochs: int, seed: int) -> None:
    """Train a model on hard labels, in place: AdamW, batches of 64, shifts of up to two pixels."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps = epochs * (len(labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for at in range(0, len(labels) - 63, 64):
            some = order[at : at + 64]
            down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
            images = torch.roll(pixels[some], (down, right), (2, 3))
            loss = nn.functional.cross_entropy(model(images), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
