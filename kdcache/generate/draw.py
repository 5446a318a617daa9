"""Tokens drawn by sample and step: what a sample gets does not depend on the batch it is answered in.

Legend: `S` prompts of a batch, `T` their padded length so far, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache.fingerprint import digest_json


class KeyedDraw:
    """Replaces logits by a draw from them, so that the likeliest token is the one drawn.

    Each prompt and step has one number u, a digest of (seed, id, step); the token is the one at which the probabilities
    in falling order, cut at top_p (Holtzman 2020) and summed up, first exceed u.

    Args:
        ids: Of the prompts, in the order of the batch.
        start: T before the first answer's token.
        temperature: Above 0.
        top_p: 1 draws from the whole distribution.
        seed: Of all draws.
    """

    def __init__(self, ids: Sequence[str], start: int, temperature: float, top_p: float, seed: int) -> None:
        self._ids = ids
        self._start = start
        self._temperature = temperature
        self._top_p = top_p
        self._seed = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return float32 [S, V], 0 at the drawn id and minus infinity elsewhere.

        Args:
            input_ids: [S, T].
            scores: Logits [S, V].
        """
        step = input_ids.shape[1] - self._start
        numbers = torch.tensor([uniform(self._seed, one, step) for one in self._ids], device=scores.device)
        sorted_, order = (scores.float() / self._temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
        before = sorted_.cumsum(-1) - sorted_
        kept = sorted_.masked_fill(before >= self._top_p, 0.0)
        summed = kept.cumsum(-1)
        place = (summed <= numbers[:, None] * summed[:, -1:]).sum(-1, keepdim=True)
        # rounding may put u at the very end of the sum: the last one with a probability is meant
        place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1)
        return torch.full_like(sorted_, -torch.inf).scatter(-1, order.gather(-1, place), 0.0)


def uniform(seed: int, id: str, step: int) -> float:
    """Return a number in [0, 1), uniform over the arguments and always the same for them."""
    return int(digest_json([seed, id, step])[:13], 16) / 16**13
