"""The baseline: a live teacher fills the same batches that a store would, for the same training code.

Legend: `N` positions of a batch, `S` its samples.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from kdcache.batch import Batch
from kdcache.errors import ConfigError, MismatchError
from kdcache.store import Store, open_store
from kdcache.targets.measure import measure_rows
from kdcache.teachers import Teacher, TeacherConfig, load_teacher
from kdcache.train import TrainConfig, TrainProgress, TrainResult, train
from kdcache.train.objective import needs


def online_targets(teacher: Teacher, *, k: int | None) -> Callable[[Batch], Batch]:
    """Return a function that runs the teacher on a batch and fills in what it knew.

    Args:
        teacher: The live model.
        k: Kept entries, as a store would have; None keeps everything: the last hidden state and the output layer, for
            the tail policy `exact` (or all V logits where the teacher has no output layer).
    """

    @torch.inference_mode()
    def fill(batch: Batch) -> Batch:
        bounds = batch.offsets.tolist()
        ids = batch.input_ids.cpu().numpy()
        output = teacher.forward([ids[start:stop] for start, stop in pairwise(bounds)])
        if k is None and output.head is not None:
            return replace(batch, hidden={"final": output.rows.clone()}, output_head=output.head)
        kept = teacher.vocab_size if k is None else k
        targets = measure_rows(output.rows, batch.labels, k=kept, head=output.head)
        return replace(batch, targets=targets.to(batch.input_ids.device))

    def outside_inference(batch: Batch) -> Batch:
        # autograd refuses to save inference tensors for the backward pass: hand out ordinary ones
        filled = fill(batch)
        targets = filled.targets
        if targets is not None:
            targets = targets[torch.arange(len(targets), device=targets.ids.device)]
        return replace(filled, targets=targets, hidden={name: one.clone() for name, one in filled.hidden.items()})

    return outside_inference


def train_online(
    config: TrainConfig,
    store: Store | Path | str,
    out: Path | str,
    *,
    teacher: str | Teacher,
    progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train on the store's samples in the same order as `kdcache.train.train`, with the live teacher in every step.

    With `loss.tail` exact the teacher's whole distribution is used; else its head and tail, as a store has them.

    Raises:
        MismatchError: The teacher is not the one that was captured.
        ConfigError: The loss reads hidden features or draws, which the baseline does not make.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    recorded = opened.manifest.part("teacher")
    model = teacher
    if isinstance(model, str):
        kind = recorded.get("dtype", "auto")
        model = load_teacher(
            TeacherConfig(model=model, dtype=kind if kind in ("float32", "bfloat16", "float16") else "auto")
        )
    if model.vocab_size != opened.vocab_size:
        raise MismatchError(
            f"The teacher has a vocabulary of {model.vocab_size}, and the store's is {opened.vocab_size}.",
            where="--teacher",
            hint="Give the model that the store was captured from.",
        )
    wanted = needs(config.loss)
    if wanted.draws or config.loss.hidden:
        raise ConfigError(
            "The online baseline makes no tail draws and no hidden features.",
            where="loss",
            hint="Use loss.tail=bucket or exact, and no loss.hidden.",
        )
    k = None if config.loss.tail == "exact" else opened.k
    return train(config, opened, out, progress=progress, transform=online_targets(model, k=k))
