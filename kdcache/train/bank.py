"""Samples of the store outside a batch, for losses that hold a sample against many others.

Legend: `B` samples of the bank, `M` drawn, `D` width.
"""

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.store import Store

LIMIT = 16384
"""Samples of a bank at most, spread evenly over the store: 67 MB of float32 at a width of 1,024."""


class Bank:
    """The teacher's feature of many samples, in memory.

    Args:
        store: Where from; each shard is read once.
        layer: Which feature: one vector a position of a language model (their mean is kept), or one a sample.

    Raises:
        ConfigError: The feature is not a vector.
    """

    def __init__(self, store: Store, layer: str) -> None:
        column = f"hidden.{layer}"
        if len(store.columns[column].shape) != 1:
            raise ConfigError(
                f"The feature {layer!r} has the shape {store.columns[column].shape} and no vector a sample.",
                where="loss.hidden.negatives",
                hint="Capture it pooled, such as with the tap NAME|mean.",
            )
        causal, wanted = store.manifest.kind == "causal_lm", min(LIMIT, len(store))
        numbers = np.unique(np.linspace(0, len(store) - 1, wanted).round().astype(np.int64))
        kept = []
        for index, shard in enumerate(store.shards):
            inside = numbers[(numbers >= shard.first_sample) & (numbers < shard.first_sample + shard.samples)]
            if not len(inside):
                continue
            read = store.read_shard(index, [column])
            begins, ends = (read.offsets[inside - shard.first_sample + after] for after in (0, 1))
            values = read.columns[column]
            rows = [values[a:b].mean(0) if causal else values[a] for a, b in zip(begins, ends, strict=True)]
            kept.append(np.stack(rows).astype(np.float32))
        self._features = torch.from_numpy(np.concatenate(kept))
        self._numbers = torch.from_numpy(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def draw(self, count: int, without: Tensor) -> Tensor:
        """Return features [M, D] of samples drawn with torch's own generator, whose state a checkpoint keeps.

        Args:
            count: Drawn, with replacement; M is smaller by those that are in the batch.
            without: int64, numbers of the batch's samples.
        """
        drawn = torch.randint(len(self), (count,))
        outside = ~torch.isin(self._numbers[drawn], without.cpu())
        return self._features[drawn[outside]].to(without.device)
