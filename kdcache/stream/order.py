"""The order of an epoch: a pure function of (seed, epoch, shard layout).

Legend: `S` samples of the store.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.stream.sampling import drawn_counts


def sample_order(
    counts: Sequence[int], *, seed: int, epoch: int, pool_shards: int, weights: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """Return the numbers [S] of samples in the shuffled order of an epoch: each once, or as often as weights say.

    Shards are permuted, taken `pool_shards` at a time, and the samples of each such pool permuted; a Philox
    generator keyed by (seed, epoch) draws both, and before them how often each sample comes.

    Args:
        counts: Samples of each shard.
        seed: Of the run.
        epoch: Counts from 0.
        pool_shards: Shards of a pool.
        weights: How often each sample comes in the mean [S], or None for each once.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    firsts = np.concatenate([[0], np.cumsum(counts)])
    times = None if weights is None else drawn_counts(weights, random)
    shards = random.permutation(len(counts))
    pools = []
    for start in range(0, len(shards), pool_shards):
        members = [np.arange(firsts[one], firsts[one + 1]) for one in shards[start : start + pool_shards]]
        pool = np.concatenate(members)
        pools.append(random.permutation(pool if times is None else np.repeat(pool, times[pool])))
    return np.concatenate(pools) if pools else np.zeros(0, dtype=np.int64)
