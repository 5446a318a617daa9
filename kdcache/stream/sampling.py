"""Hard samples more often: how often a sample comes in an epoch, by what the teacher said of it.

Legend: `S` samples of the store.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from kdcache.config import Section
from kdcache.losses.difficulty import Score, scores
from kdcache.store import Store
from kdcache.store.schema import COUNTS
from kdcache.targets.tensor import TensorTargets

LEAST = 1e-3
"""A score below it counts as much: no sample is left out for good."""

COLUMNS = ("labels", "loss_mask", "head_ids", "head_logits", "tail_log_partition", "label_logit")


class SamplingConfig(Section):
    """Samples that come more often than others; an epoch is still as many as the store has.

    Attributes:
        by: Score of a position (kdcache/losses/difficulty.py); a sample's is the mean over those that count.
        power: Of the score; negative turns it round, so that easy ones come more often.
        least: Share of the epoch that is spread evenly over all samples.
    """

    by: Score
    power: float = 1.0
    least: float = Field(default=0.1, ge=0, le=1)


def sample_weights(store: Store, config: SamplingConfig) -> NDArray[np.float64]:
    """Return how often every sample comes in an epoch, in the mean [S]; they add up to S.

    The store is read once, shard by shard: eight bytes a sample are kept. Deterministic.
    """
    found = []
    for index in range(len(store.shards)):
        shard = store.read_shard(index, COLUMNS)
        targets = shard.targets()
        assert targets is not None  # their columns were asked for
        labels = torch.from_numpy(shard.columns["labels"].astype(np.int64))
        each = scores(config.by, TensorTargets.from_numpy(targets), labels).double().numpy()
        counts = (shard.columns["loss_mask"] == COUNTS).astype(np.float64)
        sums, count = (np.diff(np.append(0.0, one.cumsum())[shard.offsets]) for one in (each * counts, counts))
        found.append(sums / np.maximum(1.0, count))
    # scaled to a largest of 1, so that no power is infinite
    power = config.power * np.log(np.maximum(LEAST, np.concatenate(found)))
    score = np.exp(power - power.max())
    weights: NDArray[np.float64] = config.least + (1 - config.least) * score * (len(score) / score.sum())
    return weights


def drawn_counts(weights: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each sample comes in one epoch [S]: its weight rounded down or up, right in the mean.

    Systematic resampling: one number places a comb of S teeth over the weights laid end to end, so the whole epoch has
    exactly S samples. Source: Carpenter, Clifford and Fearnhead 1999, "Improved particle filter", section 2.
    """
    total = len(weights)
    ends = np.cumsum(weights) * (total / weights.sum())
    teeth = np.floor(ends - random.random() + 1).clip(0, total).astype(np.int64)
    teeth[-1] = total
    times: NDArray[np.int64] = np.diff(teeth, prepend=0)
    return times
