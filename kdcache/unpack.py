"""Decode a column's gathered parts to tensors: the same values as its codec's, faster for some by torch's kernels.

Legend: `N` positions, `K` entries a position.

A stream keeps shards as their parts lie in the store, a third of the bytes, and unpacks what a few batches need.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kdcache.codecs import Array, Codec
from kdcache.codecs.levels import MASKED, Levels
from kdcache.codecs.log_partition import LogPartition
from kdcache.targets.log_partition import EMPTY, STEP


def unpack(codec: Codec, parts: Mapping[str, Array]) -> Tensor:
    """Return the decoded values [N, ...] of the same rows of every part; unsigned ranks come as int32.

    Args:
        codec: The column's; all its parts are a row's.
        parts: By name, as the store keeps them.
    """
    if isinstance(codec, Levels):
        return _levels(parts, codec.steps_per_nat)
    if isinstance(codec, LogPartition):
        return _log_partition(torch.from_numpy(parts[""]), codec.differences)
    values = codec.decode(parts)  # type: ignore[arg-type]
    return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)


def _levels(parts: Mapping[str, Array], steps_per_nat: int) -> Tensor:
    gaps = torch.from_numpy(parts[""])
    if parts["high"].any():
        gaps = gaps.to(torch.int16) + (torch.from_numpy(parts["high"]).to(torch.int16) << 8)
    codes = torch.cumsum(gaps, 1, dtype=torch.int16)
    # codes are whole numbers modulo 2**16, and torch sums signed ones: what is negative lies above 2**15
    wide = codes.to(torch.int32) & 0xFFFF if codes.numel() and int(codes.min()) < 0 else codes
    values = wide.to(torch.float32).mul_(-1 / steps_per_nat).add_(torch.from_numpy(parts["max"])[:, None])
    return values if wide is codes else values.masked_fill_(wide == MASKED, -torch.inf)


def _log_partition(steps: Tensor, differences: int) -> Tensor:
    for _ in range(differences):
        steps = torch.cumsum(steps, 1, dtype=torch.int16)
    values = steps.to(torch.float32).mul_(STEP)
    if steps.numel() and int(steps.min()) == EMPTY:
        values.masked_fill_(steps == EMPTY, -torch.inf)
    return values
