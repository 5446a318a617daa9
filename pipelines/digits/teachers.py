"""Further teachers of the digits, trained from a store of nothing but labels: the trainer makes teachers too."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kdcache.config import parse_config
from kdcache.examples import write_examples
from kdcache.seeds import merged
from kdcache.store import open_store
from kdcache.train import train
from kdcache.train.config import TrainConfig
from pipelines.digits import networks
from pipelines.digits.recipe import store


def labelled(out: Path, name: str, **fields: Any) -> dict[str, Any]:
    """Write examples and a store of their labels; return where both are, as `store` and a training's `data`.

    Args:
        out: Of the recipe.
        name: Of the examples.
        fields: `pixels` and `label`, as `kdcache.examples.write_examples`.
    """
    own = write_examples(out / name, **fields)
    label = fields["label"]
    classes = 10 if label.ndim == 1 else label.shape[1]
    made = store(out, f"{name}-store", own, {"targets": {"k": classes}}, partial(networks.nothing, classes))
    return {"store": made, "data": {"examples": str(own.folder), "batch_size": 64}}


def taught(out: Path, name: str, labels: Mapping[str, Any], changed: Mapping[str, Any]) -> Path:
    """Train a network on hard labels; return the folder of the run, which `teacher.kind: student` runs.

    Args:
        out: Of the recipe.
        name: Of the run.
        labels: What `labelled` returned.
        changed: Keys of the training that differ.
    """
    base = {
        "student": {"factory": "pipelines.digits.networks:teacher"},
        "data": labels["data"],
        "loss": {"alpha": 0.0},
        "optim": {"learning_rate": 0.003},
        "run": {"epochs": 6, "device": "cpu"},
    }
    train(parse_config(TrainConfig, merged(base, changed)), open_store(labels["store"]), out / name)
    return out / name
