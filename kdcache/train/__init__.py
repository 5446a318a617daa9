"""Stage 2: train a student from a store, with no teacher in memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.errors import MismatchError
from kdcache.fingerprint import digest_json
from kdcache.store import Store, open_store
from kdcache.tokenizer import load_tokenizer, tokenizer_fingerprint
from kdcache.train.config import TrainConfig
from kdcache.train.loop import Run, Transform
from kdcache.train.result import METRICS, RESULT, TrainProgress, TrainResult
from kdcache.train.validate import HeldOut, held_out


def train(
    config: TrainConfig,
    store: Store | Path | str,
    out: Path | str,
    *,
    progress: Callable[[TrainProgress], None] | None = None,
    transform: Transform | None = None,
) -> TrainResult:
    """Train a student and save it; resume exactly if the run was stopped; do nothing if it is finished.

    Runs in one process, or in each rank of `torchrun` or `accelerate launch`. On the CPU a resumed run's losses are
    equal to the bit to those of an undisturbed one.

    Args:
        config: What is trained and how.
        store: What it is trained from.
        out: Folder for checkpoints, metrics and the student, in the form of `save_pretrained`.
        progress: Called after every step.
        transform: Fills the targets of a batch: the online baseline's live teacher. The store's are then not read.

    Raises:
        MismatchError: Student, store or folder do not belong together; said before the first step.
        ConfigError: Settings exclude each other.
        TrainingError: The loss was not finite for 20 steps in a row.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint was written and the same call goes on.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    root = Path(out)
    identity: dict[str, Any] = {
        # what is left at its default is not named: a release with more keys goes on with the runs of the one before
        "config": digest_json(config.model_dump(mode="json", exclude_defaults=True)),
        "store": opened.digest,
        "online": transform is not None,
    }
    if config.student.tokenizer is not None:
        identity["tokenizer"] = tokenizer_fingerprint(
            load_tokenizer(config.student.tokenizer, revision=config.student.revision)
        )
    if config.data.teachers:
        identity["teachers"] = [open_store(one.store).digest for one in config.data.teachers]
    if (root / RESULT).is_file():
        document = json.loads((root / RESULT).read_text())
        if document["identity"] != identity:
            raise MismatchError(
                "The folder holds the student of another run: its config or store differ.",
                where=str(root),
                hint="Choose another --out, or remove the folder.",
            )
        return TrainResult(**{**document["result"], "already_complete": True})
    return Run(config, opened, root, identity, progress, transform).run()


__all__ = [
    "METRICS",
    "RESULT",
    "HeldOut",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "held_out",
    "train",
]
