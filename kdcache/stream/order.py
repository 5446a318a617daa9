"""The order of an epoch: a pure function of (seed, epoch, shard layout).

Legend: `S` samples of the store.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def sample_order(counts: Sequence[int], *, seed: int, epoch: int, pool_shards: int) -> NDArray[np.int64]:
    """Return the numbers [S] of all samples in the shuffled order of an epoch.

    Shards are permuted, taken `pool_shards` at a time, and the samples of each such pool permuted; a Philox
    generator keyed by (seed, epoch) draws both.

    Args:
        counts: Samples of each shard.
        seed: Of the run.
        epoch: Counts from 0.
        pool_shards: Shards of a pool.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    firsts = np.concatenate([[0], np.cumsum(counts)])
    shards = random.permutation(len(counts))
    pools = []
    for start in range(0, len(shards), pool_shards):
        members = [np.arange(firsts[one], firsts[one + 1]) for one in shards[start : start + pool_shards]]
        pools.append(random.permutation(np.concatenate(members)))
    return np.concatenate(pools) if pools else np.zeros(0, dtype=np.int64)
