"""Students made by factories, some of which one exporter or the other cannot write."""

import torch
from torch import Tensor, nn


class Bigram(nn.Module):
    """A causal model of two tokens; it looks at its mask."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 12)
        self.out = nn.Linear(12, vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        here = self.embed(input_ids) * attention_mask[..., None]
        before = torch.nn.functional.pad(here, (0, 0, 1, 0))[:, :-1]
        return self.out(torch.tanh(here + 0.5 * before))


class Short(Bigram):
    """Takes at most sixteen tokens."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.places = nn.Embedding(16, vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask) + self.places(torch.arange(input_ids.shape[1]))


class Branching(Bigram):
    """Asks for a value: beyond torch.export, and the same way every time, so that one recorded pass is right."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = super().forward(input_ids, attention_mask)
        return logits if bool((input_ids >= 0).all()) else -logits


class Treacherous(Bigram):
    """Asks for a value that the shape of its input decides: one recorded pass is wrong for others."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = super().forward(input_ids, attention_mask)
        return logits if bool(attention_mask.sum() > 10) else -logits


class Refusing(Bigram):
    """Does not let itself be exported at all."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            raise RuntimeError("not for export")
        return super().forward(input_ids, attention_mask)
