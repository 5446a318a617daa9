"""The on-disk format: Zarr shards and a Parquet sample table behind a manifest. Imports no torch."""

from kdcache.store.arrays import encoded_bytes
from kdcache.store.check import Problem, check
from kdcache.store.encode import SampleTable, shard_objects, start_objects
from kdcache.store.manifest import VERSION, Manifest, ShardInfo, load_manifest
from kdcache.store.progress import Progress, progress
from kdcache.store.ranking import rank_by_count, ranks
from kdcache.store.reader import Store, open_store
from kdcache.store.rows import PackedShard, Sample, Shard, is_packed
from kdcache.store.schema import (
    Column,
    HiddenSpec,
    Kept,
    OutputHead,
    ShardPlan,
    StorePlan,
    plan_shards,
    standard_columns,
)
from kdcache.store.writer import Begun, StoreWriter

__all__ = [
    "VERSION",
    "Begun",
    "Column",
    "HiddenSpec",
    "Kept",
    "Manifest",
    "OutputHead",
    "PackedShard",
    "Problem",
    "Progress",
    "Sample",
    "SampleTable",
    "Shard",
    "ShardInfo",
    "ShardPlan",
    "Store",
    "StorePlan",
    "StoreWriter",
    "check",
    "encoded_bytes",
    "is_packed",
    "load_manifest",
    "open_store",
    "plan_shards",
    "progress",
    "rank_by_count",
    "ranks",
    "shard_objects",
    "standard_columns",
    "start_objects",
]
