"""How a store is read."""

from pydantic import model_validator

from kdcache.config import Section
from kdcache.stream.sampling import SamplingConfig


class StreamConfig(Section):
    """How a store is read.

    Attributes:
        batch_size: Samples a batch and rank.
        seed: Of the order.
        shuffle: Permute shards, and samples within pools of shards; else the store's own order.
        sampling: Samples that come more often; only where `shuffle` is set.
        pool_shards: Shards whose samples are mixed; a process holds these and as many of the next decoded.
        targets: Read the teacher's rows.
        packed: Leave the targets as they lie in the store; `Batch.to` unpacks them on the device, two fifths of the
            bytes having travelled there.
        draws: Read the tail draws too.
        hidden: Layers whose features are read.
        extra: Further columns, by their names.
        workers: Processes that decompress shards, into memory they share with this one (threads where the system is not
            Linux); 0 leaves it to two threads.
        rank: This process's number.
        world_size: Processes that share the epoch; with more than one, an unfilled last global batch is left out.
    """

    batch_size: int = 8
    seed: int = 0
    shuffle: bool = True
    sampling: SamplingConfig | None = None
    pool_shards: int = 4
    targets: bool = True
    packed: bool = False
    draws: bool = False
    hidden: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    workers: int = 0
    rank: int = 0
    world_size: int = 1

    @model_validator(mode="after")
    def _drawn(self) -> "StreamConfig":
        if self.sampling is not None and not self.shuffle:
            raise ValueError("sampling goes with shuffle: the store's own order has each sample once")
        return self
